"""The loop of `mlp` memories as kernels: the order of its stages, the op, and its Triton code."""
