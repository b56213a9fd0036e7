"""Self-training for semantic segmentation at the speed of the hardware: ST and ST++."""

__version__ = "0.1.0"
