"""Using a trained model: its folder, predictions and interpretation."""
