"""The order of the stages in the loop of `mlp` memories, forward and backward, and the tensors between them.

A memory is M(z) = z + c W1 silu(W2 z). Its state is what both layers differ by from their initial ones, here always
transposed: S1 = (W1 - W1_0)^T [F, K] and S2 = (W2 - W2_0)^T [K, F], with F = K. A *stage* is a function of a table of
tensors. It reads some of them for one chunk, and writes others:

    forward, for every chunk:       project: k, v, gates, and (I + T2)^-1, from the four memories that are read
                                    write: errors of every memory, u1 and u2, S1 and S2 after the chunk
    ... for every group of chunks:  read_inner, read_outer: y
    backward, for every group:      write, again, from the group's first state; read_inner
                                    outer_read_backward, inner_read_backward
    ... for its chunks, last first: systems_backward, errors_backward, project_backward

Only the states at the start of every group are kept: a chunk's tensors are five memories' [C, K], nine times. Tokens'
k, v, gates and inverse are kept, so that the second pass over a group has no projections to make.

`hope.memory.two_layer.stages` has them as kernels, benchmarks/mlp_stages.py as formulas of plain tensors. Sizes: M
sequences times heads, L tokens, C tokens of a chunk, G chunks of a group, N = 5 memories in the order k, v, eta, alpha,
main.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Table = dict[str, Tensor]
READ_BOXES = 4
"""Memories that make k, v, eta and alpha. Main comes last in the bank."""
KEPT = ("k", "v", "rk", "rv", "eta", "ell", "inverse", "starts1", "starts2")
"""What the backward needs of the forward, by name."""
OF_READS = ("u1", "u2")
"""Tiles of `write` that the reads of a chunk need, in the operands' dtype: beside x1, which is made of all memories."""
FOR_BACKWARD = ("ak", "av", "dh", "e0", "m")
"""Tiles of `write` that only its adjoint needs, beside the inverse and the norms of hidden vectors."""


@dataclass(frozen=True)
class Rule:
    """Numbers of the loop: tokens per chunk, chunks per group, the bound of eta, the contribution factor c, and the
    precision of products of fp32 operands."""

    chunk: int
    group: int
    eta_max: float
    contribution: float
    precision: str = "tf32"


class Stages(Protocol):
    """One function per stage: (table, rule, number of the chunk, its place in the group), or of a group's reads
    (table, rule, number of the first chunk, how many)."""

    project: Callable[[Table, Rule, int, int], None]
    write: Callable[[Table, Rule, int, int], None]
    read_inner: Callable[[Table, Rule, int, int], None]
    read_outer: Callable[[Table, Rule, int, int], None]
    outer_read_backward: Callable[[Table, Rule, int, int], None]
    inner_read_backward: Callable[[Table, Rule, int, int], None]
    systems_backward: Callable[[Table, Rule, int, int], None]
    errors_backward: Callable[[Table, Rule, int, int], None]
    project_backward: Callable[[Table, Rule, int, int], None]


def groups(length: int, rule: Rule) -> Iterator[tuple[int, int, int]]:
    """(number, first chunk, chunks) of every group."""
    chunks = length // rule.chunk
    for number, first in enumerate(range(0, chunks, rule.group)):
        yield number, first, min(rule.group, chunks - first)


def forward(stages: Stages, given: Table, rule: Rule) -> Table:
    """All chunks.

    Args:
        given: x, q, a_k, a_v [M, L, K] in the operands' dtype; g_eta, g_alpha [M, L]; initial states w1 = W1_0^T
            [H, N, F, K] and w2 = W2_0^T [H, N, K, F] in the operands' dtype; read_out [H, 2, K], 8 c times the
            gates' read-outs; s1, s2 [M, N, K, K] before the first token; and, if there are, valid [B, L], resets
            [B, chunks], last [B]. Everything without gaps.
    Returns: the table, with y [M, L, K], s1 and s2 after the last whole chunk, and `KEPT`.
    """
    x, w1 = given["x"], given["w1"]
    (rows, length, width), memories = x.shape, w1.shape[1]
    wide = given["s1"].dtype
    new = lambda *shape, dtype=x.dtype: torch.empty(rows, *shape, dtype=dtype, device=x.device)
    table = {**given, "s1": _begun(given, "s1"), "s2": _begun(given, "s2")}
    table |= {name: new(length, width) for name in ("k", "v", "y")}
    table |= {name: new(length, dtype=wide) for name in ("rk", "rv", "eta", "ell")}
    table["inverse"] = new(length, rule.chunk)
    count = -(-length // rule.chunk // rule.group)
    table |= {name: new(count, memories, width, width, dtype=wide) for name in ("starts1", "starts2")}
    table |= slots(x, rule, 1, OF_READS)
    table["x1"] = x.new_empty(rule.group, rows, memories, rule.chunk, width)
    for number, first, chunks in groups(length, rule):
        for layer in "12":
            table[f"starts{layer}"][:, number].copy_(table[f"s{layer}"])
        for place in range(chunks):
            stages.project(table, rule, first + place, place)
            stages.write(table, rule, first + place, place)
        stages.read_inner(table, rule, first, chunks)
        stages.read_outer(table, rule, first, chunks)
    return table


def _begun(given: Table, name: str) -> Tensor:
    """The state before the first chunk: zero where that begins a document."""
    if "resets" not in given:
        return given[name].clone()
    return given[name] * _goes_on(given["resets"], given[name])


def _goes_on(resets: Tensor, state: Tensor) -> Tensor:
    """[M, 1, 1, 1]: 0 where the first chunk begins a document, else 1."""
    heads = state.shape[0] // resets.shape[0]
    return (resets[:, 0] == 0).to(state.dtype).repeat_interleave(heads).view(-1, 1, 1, 1)


def slots(x: Tensor, rule: Rule, memories: int, names: tuple[str, ...]) -> Table:
    """Room for what `write` leaves of every chunk of a group, of the last `memories` of the bank [G, M, N, C, K], with
    the states at chunks' starts, and for what lies between the two reads."""
    rows, _, width = x.shape
    new = lambda *shape: x.new_empty(rule.group, rows, *shape)
    found = {name: new(memories, rule.chunk, width) for name in names}
    found |= {name: new(memories, width, width) for name in ("start1", "start2")}
    return found | {name: new(rule.chunk, width) for name in ("bq", "hq")}


def backward(stages: Stages, given: Table, kept: Table, dy: Tensor, dend1: Tensor, dend2: Tensor, rule: Rule) -> Table:
    """The adjoint of `forward`.

    Args:
        given: of what `forward` was given x, q, w1, w2, read_out, resets, last. kept: `KEPT`.
        dy: [M, L, K] in the operands' dtype. dend1, dend2: of s1 and s2 at the end.
    Returns: dq, dx_of (per memory that is read [M, 4, L, K]), da_k, da_v; dg_eta, dg_alpha [M, L]; dw1, dw2
        [M, N, K, K] and dread_out [M, 2, K], not summed over sequences; ds1, ds2 of the states before the first token.
    """
    x, (rows, length, width) = given["x"], given["x"].shape
    memories, wide = given["w1"].shape[1], dend1.dtype
    new = lambda *shape, dtype=x.dtype: torch.empty(rows, *shape, dtype=dtype, device=x.device)
    zeros = lambda *shape: torch.zeros(rows, *shape, dtype=wide, device=x.device)
    table = {**given, **kept, "dy": dy, "ds1": dend1.clone(), "ds2": dend2.clone()}
    table |= {name: zeros(memories, width, width) for name in ("dw1", "dw2")} | {"dread_out": zeros(2, width)}
    table |= {name: new(length, width) for name in ("dq", "da_k", "da_v", "hq_all", "db_all")}
    table |= {name: new(length, dtype=wide) for name in ("dg_eta", "dg_alpha")}
    table["dx_of"] = new(READ_BOXES, length, width)
    table |= {name: zeros(memories, width, width) for name in ("s1", "s2")}
    table |= slots(x, rule, memories, (*OF_READS, "x1", *FOR_BACKWARD))
    of_group = lambda *shape, dtype=x.dtype: x.new_empty(rule.group, rows, memories, *shape, dtype=dtype)
    table |= {"inverse1": of_group(rule.chunk, rule.chunk), "norm": of_group(rule.chunk, dtype=wide)}
    table |= _between_stages(table, rule, memories)
    for number, first, chunks in reversed(list(groups(length, rule))):
        for layer in "12":
            table[f"s{layer}"].copy_(kept[f"starts{layer}"][:, number])
        for place in range(chunks):
            stages.write(table, rule, first + place, place)
        stages.read_inner(table, rule, first, chunks)
        stages.outer_read_backward(table, rule, first, chunks)
        stages.inner_read_backward(table, rule, first, chunks)
        for place in reversed(range(chunks)):
            stages.systems_backward(table, rule, first + place, place)
            stages.errors_backward(table, rule, first + place, place)
            stages.project_backward(table, rule, first + place, place)
    # of the main memory's initial state as the reads have it: products over all tokens
    table["dw1"][:, -1] += rule.contribution * (table["hq_all"].mT @ dy).to(wide)
    table["dw2"][:, -1] += (given["q"].mT @ table["db_all"]).to(wide)
    if "resets" in given:
        for name in ("ds1", "ds2"):
            table[name] *= _goes_on(given["resets"], table[name])
    return table


def _between_stages(table: Table, rule: Rule, memories: int) -> Table:
    """Of a group's reads: adjoints du1, dx1, du2, dk [G, M, C, K], of states [G, M, K, K], and of the gates' decays. Of
    one chunk's systems and errors: G = eta dE, adjoints of keys and values, of rates and decays, per memory."""
    x, wide = table["x"], table["ds1"].dtype
    (rows, _, width), chunk = x.shape, rule.chunk
    in_group = lambda *shape: x.new_empty(rule.group, rows, *shape)
    found = {name: in_group(chunk, width) for name in ("read_du1", "read_dx1", "read_du2", "read_dk")}
    found |= {name: in_group(width, width) for name in ("read_ds1", "read_ds2")}
    found |= {name: in_group(chunk).to(wide) for name in ("read_o1", "read_o2")}
    of_chunk = lambda *shape: x.new_empty(rows, memories, *shape)
    found |= {name: of_chunk(chunk, width) for name in ("g1", "g2", "dx1", "dk_inner", "dk", "dv", "dm")}
    found |= {name: of_chunk(2, chunk).to(wide) for name in ("written", "dell")}
    return found | {"hx": x.new_empty(rows, READ_BOXES, chunk, width)}
