"""Images of any size: reading from storage, decoding to upright RGB pixels, and batching."""
