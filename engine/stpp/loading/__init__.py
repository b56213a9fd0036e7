"""Training samples: which ones a step takes, how they are augmented, and the pixels."""
