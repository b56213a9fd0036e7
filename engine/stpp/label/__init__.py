"""Pseudo labels: writing them, and judging which to trust."""
