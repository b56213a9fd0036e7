"""Run on disk: folder, lease and stages."""
