"""One image of any size, from where it is stored to upright RGB pixels and to batches."""
