"""From presized images to augmented batches."""
