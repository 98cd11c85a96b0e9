"""The adjoints of the loop of `mlp` memories, as kernels."""
