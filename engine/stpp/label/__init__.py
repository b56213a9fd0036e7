"""Pseudo labelling, and selection of reliable images."""
