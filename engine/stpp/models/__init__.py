"""Segmentation networks with the state-dict keys of the public implementation; they return low-resolution
logits."""
