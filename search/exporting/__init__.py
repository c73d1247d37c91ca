"""Export formats, their verification and the model card."""
