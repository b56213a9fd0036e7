"""Training data: sampling, augmentation and loading."""
