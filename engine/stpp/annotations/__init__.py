"""The files of annotation tools: one file a format, its shapes to masks, or masks to it."""
