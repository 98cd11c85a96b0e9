"""Dense arithmetic around products and memory loops, as functions of tensors that torch.compile may fuse.

Norms, gates, convolutions and rotations read and write whole activations at every operation: of the 21 ms that a layer
of HOPE takes with its kernels, 18 are outside of them. A module writes such a part as a function of tensors and calls
it as `self.form(function)(...)`. `Model.set_compile` exchanges the form. Products stay outside, with the libraries, and
so do the memory loop, collectives and all that depends on data.

A host that issues a block's hundreds of operations one by one can be slower than the GPU that computes them. `block`
therefore hands a whole block to torch.compile where nothing depends on data, see `hope.block.Block`. Blocks of mixers
that are slower so keep to their dense parts (`Mixer.compiles_whole`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from hope.devices import has_triton

F = TypeVar("F", bound=Callable[..., Any])

COMPILE = ("none", "dense", "block")
COMPILED = {"dense": "dense parts", "block": "blocks"}
"""What is compiled, in words."""
SHAPES = 6
"""Lengths of sequences that a compiled run may have in training: torch keeps eight forms of a function, and evaluation
is one more."""


class CannotCompile(RuntimeError):
    """The message says what is missing, and what would work without."""


class Form(Protocol):
    """Takes a function of tensors, gives one with the same values."""

    def __call__(self, function: F, /) -> F: ...


def eager(function: F, /) -> F:
    """The function as it is."""
    return function


class Compiled:
    """Every function compiled once, for all modules that call it. backend: of torch.compile."""

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend
        self._made: dict[Callable[..., Any], Callable[..., Any]] = {}

    def __call__(self, function: F, /) -> F:
        if torch.compiler.is_compiling():  # a part of a block that is compiled as a whole
            return function
        if function not in self._made:
            self._made[function] = torch.compile(function, backend=self.backend, dynamic=False, fullgraph=True)
        return self._made[function]  # type: ignore[return-value]


def whole(function: F, backend: str = "inductor") -> F:
    """A pass compiled as one graph; an error where it cannot be one. Methods of modules that are alike share it."""
    return torch.compile(function, backend=backend, dynamic=False, fullgraph=True)  # type: ignore[return-value]


class Dense(nn.Module):
    """Base of modules with such parts."""

    form: Form = staticmethod(eager)


def set_form(model: nn.Module, form: Form) -> None:
    """Let every module inside compute its dense parts by `form`."""
    for module in model.modules():
        if isinstance(module, Dense):
            module.form = form


def form_for(what: str, device: str) -> Form:
    """Of `train.compile` (one of `COMPILE`) on a type of device. Raises CannotCompile."""
    if what not in COMPILE:
        raise ValueError(f"compile {what!r} is none of {', '.join(COMPILE)}")
    if what == "none":
        return eager
    if reason := cannot_compile(device):
        raise CannotCompile(f"train.compile={what} {reason}; train.compile=none needs none")
    return Compiled()


def cannot_compile(device: str) -> str:
    """Why nothing can be compiled for a type of device here, or nothing."""
    if device == "cuda" and not has_triton():
        return "needs triton on a GPU, which is not installed"
    # triton builds its launchers in C, and for a CPU all of it is C++
    language, variable, names = (
        ("C", "CC", ("gcc", "clang")) if device == "cuda" else ("C++", "CXX", ("g++", "clang++"))
    )
    if any(shutil.which(name) for name in (os.environ.get(variable, ""), *names) if name):
        return ""
    return f"needs a {language} compiler, and neither {variable} nor {' nor '.join(names)} is one here"
