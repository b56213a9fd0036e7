"""A run on disk: folder, lease and stages."""
