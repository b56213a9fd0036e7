"""Training loop, shared by all methods."""
