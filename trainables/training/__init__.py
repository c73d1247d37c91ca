"""The training loop, its checkpoints and the learning-rate finder."""
