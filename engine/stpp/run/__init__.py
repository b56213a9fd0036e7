"""One run on disk: its folder, its lease, its stages."""
