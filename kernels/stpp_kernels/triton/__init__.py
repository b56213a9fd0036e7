"""Triton kernels, one a file; `import triton` inside them is the compiler's package, not this folder."""
