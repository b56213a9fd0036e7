"""Triton kernels, one per file; `import triton` in them imports the compiler's package, not this folder."""
