"""Annotation-tool formats, one module per format: reading shapes into masks and exporting masks."""
