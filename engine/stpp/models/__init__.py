"""Segmentation networks with the public implementation's state-dict keys. They return low-resolution
logits."""
