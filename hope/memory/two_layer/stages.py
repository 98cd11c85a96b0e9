"""The stages of `hope.memory.two_layer.loop` as kernels. Imported where one is called: not every machine has triton."""

from hope.memory.two_layer.backward import fused as backward
from hope.memory.two_layer.forward import fused as forward


class Kernels:
    """`hope.memory.two_layer.loop.Stages`."""

    project = staticmethod(forward.project)
    write = staticmethod(forward.write)
    read_inner = staticmethod(forward.read_inner)
    read_outer = staticmethod(forward.read_outer)
    outer_read_backward = staticmethod(backward.outer_read_backward)
    inner_read_backward = staticmethod(backward.inner_read_backward)
    systems_backward = staticmethod(backward.systems_backward)
    errors_backward = staticmethod(backward.errors_backward)
    project_backward = staticmethod(backward.project_backward)
