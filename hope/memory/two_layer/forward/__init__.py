"""The loop of `mlp` memories, as kernels."""
