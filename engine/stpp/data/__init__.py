"""From files to batches: index, splits, sampling, augmentation, loading."""
