"""The loop of matrix memories whose keys are given, as kernels: the op and its Triton code."""
