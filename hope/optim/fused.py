"""DMGD over a whole flat parameter in one launch: `rules.update` and `rules.sums` as Triton kernels, for fp32 on a GPU.

Networks are unrolled, so that hidden units and the sums of their gradients stay in registers. Each program has a span
of one tensor and adds up its elements; a second kernel adds a tensor's spans in float64, in a fixed order: no atomics,
a resumed run is bit-equal.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hope.optim import coordinate_memory as memory
from hope.optim.rules import Rates, Stretch, UpdateRule, Whole
from hope.optim.segments import Segments, chunks

# Elements of a program. A network's weights are loaded, and its sums over threads made, once per span; without one,
# only the last programs to finish count.
_SPAN = {"network": 1 << 15, "linear": 1 << 12}
# Elements at a time, and warps. With a network, two per thread, or one where the sums' accumulators fill the registers.
_BLOCK = {"network": {"update": 256, "sums": 128}, "linear": {"update": 1024, "sums": 1024}}
_WARPS = 4
_ALIGNED = tl.constexpr(4)  # elements: where all spans start and end at multiples of it, loads are of 16 bytes
_LIMIT = tl.constexpr(memory.LIMIT)
_LOG_SCALE = tl.constexpr(memory.LOG_SCALE)
_LOG_FACTOR = tl.constexpr(0.6931471805599453 / memory.LOG_DIVISOR)  # of a binary logarithm
_TWICE_LOG2E = tl.constexpr(2 * 1.4426950408889634)
_SIGN = tl.constexpr(-(1 << 31))
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # on a CPU, which knows no instructions of a GPU


class Table(NamedTuple):
    """Programs over a flat parameter, those of one tensor next to each other.

    starts, numels, tensors: per program its first element (int64), how many, and which tensor they are of (int32).
    bounds: [tensors + 1], the first program of each tensor. elements: [tensors, 1], float64. aligned: see `_ALIGNED`.
    """

    starts: Tensor
    numels: Tensor
    tensors: Tensor
    bounds: Tensor
    elements: Tensor
    aligned: bool


def update(rule: UpdateRule, x: Stretch, segments: Segments, c: Rates, whole: Whole) -> None:
    """`rules.update` on all pieces of a flat parameter [N]; networks [tensors, P] and r [tensors] of its tensors."""
    table = _table(segments, _SPAN[_kind(rule)], x.p.device)
    if not len(table.starts):
        return
    with torch.cuda.device_of(x.p):
        _update[(len(table.starts),)](
            *_pointers(x, table, whole),
            c.scale, c.lr, c.keep, c.beta1, c.gain1, c.beta2, c.gain2, c.correct1, c.correct2, c.correct1_before, c.eps,
            CLIP=rule.clip, ERASE=rule.erase, **_choices(rule, table, "update"),
        )  # fmt: skip


def sums(rule: UpdateRule, x: Stretch, segments: Segments, c: Rates, whole: Whole) -> Tensor:
    """`rules.sums` of every tensor [tensors, 2 or 3 + P], float64."""
    table = _table(segments, _SPAN[_kind(rule)], x.p.device)
    programs, numbers = len(table.starts), 2 + rule.size if rule.width else 1
    partial = torch.empty(numbers, programs, device=x.p.device)
    total = torch.empty(segments.tensors, numbers, dtype=torch.float64, device=x.p.device)
    with torch.cuda.device_of(x.p):
        if programs:
            _sums[(programs,)](
                *_pointers(x, table, whole), partial, programs,
                c.scale, c.beta2, c.gain2, c.correct2, c.correct1_before, c.correct2_before, c.eps,
                L2=rule.l2, **_choices(rule, table, "sums"),
            )  # fmt: skip
        _add_up[(segments.tensors, numbers)](partial, total, table.bounds, programs, numbers, BLOCK=256, num_warps=4)
    return torch.cat([table.elements, total], 1)


def _kind(rule: UpdateRule) -> str:
    return "network" if rule.width else "linear"


def _pointers(x: Stretch, table: Table, whole: Whole) -> tuple[Tensor, ...]:
    """Where there is no v, the kernels look at none."""
    assert x.s is not None
    v = x.s if x.v is None else x.v
    return x.p, x.s, v, x.g, table.starts, table.numels, table.tensors, whole.network.contiguous(), whole.r


def _choices(rule: UpdateRule, table: Table, kernel: str) -> dict[str, int | bool]:
    return {
        "ADAM": rule.adam,
        "AT_VALUE": rule.at_value,
        "WIDTH": rule.width,
        "FEATURES": rule.features,
        "GRADIENT_KEY": rule.gradient_key,
        "NEEDS_R": rule.whole,
        "ALIGNED": table.aligned,
        "BLOCK": _BLOCK[_kind(rule)][kernel],
        "num_warps": _WARPS,
    }


@lru_cache(maxsize=256)
def _table(segments: Segments, span: int, device: torch.device) -> Table:
    pieces = sorted(segments.pieces, key=lambda piece: piece.tensor)
    spans = [(piece.tensor, s) for piece in pieces for s in chunks(piece.start, piece.numel, span)]
    starts = torch.tensor([s.start for _, s in spans], dtype=torch.int64)
    numels = torch.tensor([s.stop - s.start for _, s in spans], dtype=torch.int32)
    tensors = torch.tensor([tensor for tensor, _ in spans], dtype=torch.int32)
    per_tensor = torch.bincount(tensors, minlength=segments.tensors)
    elements = torch.zeros(segments.tensors, dtype=torch.float64).index_add_(0, tensors, numels.double())
    bounds = torch.cat([per_tensor.new_zeros(1), per_tensor.cumsum(0)]).int()
    aligned = not ((starts % _ALIGNED.value).any() or (numels % _ALIGNED.value).any())
    on_device = lambda t: t.to(device)
    starts, numels, tensors, bounds, elements = map(on_device, (starts, numels, tensors, bounds, elements[:, None]))
    return Table(starts, numels, tensors, bounds, elements, aligned)


@triton.jit
def _update(
    p, s, v, g, starts, numels, tensors, networks, rms,
    scale, lr, keep, beta1, gain1, beta2, gain2, correct1, correct2, correct1_before, eps,
    CLIP: tl.constexpr, ERASE: tl.constexpr,
    ADAM: tl.constexpr, AT_VALUE: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr,
    GRADIENT_KEY: tl.constexpr, NEEDS_R: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    NORMALISED: tl.constexpr = ADAM and not AT_VALUE
    start, numel, tensor = _mine(starts, numels, tensors, ALIGNED)
    r, inverse_r = _scale_of(rms, tensor, NEEDS_R)
    if WIDTH:
        first, last = _network(networks, tensor, WIDTH, FEATURES)
    p += start
    s += start
    v += start
    g += start
    for offset in range(0, numel, BLOCK):
        i = offset + tl.arange(0, BLOCK)
        inside = i < numel
        w = tl.load(g + i, mask=inside, other=0.0) * scale
        held = tl.load(s + i, mask=inside, other=0.0)
        weight = tl.load(p + i, mask=inside, other=0.0)
        unit, inverse_unit = r, inverse_r
        if ADAM:
            square = tl.load(v + i, mask=inside, other=0.0) * beta2 + w * w * gain2
            tl.store(v + i, square, mask=inside)
            root = tl.sqrt(square) * correct2 + eps
            inverse_root = _reciprocal(root)
            if AT_VALUE:
                w = w * inverse_root
            else:
                unit, inverse_unit = root, inverse_root
        if WIDTH and GRADIENT_KEY:
            keys = _gradient_key(w * inverse_unit, held * correct1_before * inverse_unit)
        if ERASE > 0.0:
            x = w * inverse_r
            forgotten = ERASE * x * x
            held = held * (beta1 - forgotten * _reciprocal(1.0 + forgotten)) + w * gain1
        else:
            held = held * beta1 + w * gain1
        tl.store(s + i, held, mask=inside)
        found = held * correct1
        if WIDTH:
            if not GRADIENT_KEY:
                keys = _memory_key(found, found * inverse_unit, inverse_r, NORMALISED)
            hidden = _tanh(_products(first, keys, WIDTH, FEATURES), WIDTH)
            found += _read(last, hidden, WIDTH) * unit
        if CLIP > 0.0:
            bound = CLIP * r
            found = tl.maximum(found, -bound, propagate_nan=tl.PropagateNan.ALL)
            found = tl.minimum(found, bound, propagate_nan=tl.PropagateNan.ALL)
        if NORMALISED:
            found = found * inverse_root
        tl.store(p + i, weight * keep - found * lr, mask=inside)


@triton.jit(do_not_specialize=["programs"])
def _sums(
    p, s, v, g, starts, numels, tensors, networks, rms, partial, programs,
    scale, beta2, gain2, correct2, correct1_before, correct2_before, eps,
    L2: tl.constexpr,
    ADAM: tl.constexpr, AT_VALUE: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr,
    GRADIENT_KEY: tl.constexpr, NEEDS_R: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial [numbers, programs]: sum of w^2, then with a network the norm and gradient of `read_and_gradient`.

    Elements beyond the end load as zeros, whose terms all vanish.
    """
    NORMALISED: tl.constexpr = ADAM and not AT_VALUE
    SIZE: tl.constexpr = WIDTH * FEATURES + WIDTH
    start, numel, tensor = _mine(starts, numels, tensors, ALIGNED)
    r, inverse_r = _scale_of(rms, tensor, NEEDS_R)
    square_sum = tl.zeros([BLOCK], tl.float32)
    if WIDTH:
        first, last = _network(networks, tensor, WIDTH, FEATURES)
        norm = tl.zeros([BLOCK], tl.float32)
        gradient = ()
        for _ in tl.static_range(SIZE):
            gradient = gradient + (tl.zeros([BLOCK], tl.float32),)
    s += start
    v += start
    g += start
    # Loads run one round ahead: with so few warps per processor nothing else would hide what they take.
    g_next, s_next, v_next = _load(g, s, v, 0, numel, ADAM, WIDTH, BLOCK)
    for offset in range(0, numel, BLOCK):
        w, held, before = g_next * scale, s_next * correct1_before, v_next
        g_next, s_next, v_next = _load(g, s, v, offset + BLOCK, numel, ADAM, WIDTH, BLOCK)
        inverse_unit = inverse_r
        if ADAM:
            inverse_root = _reciprocal(tl.sqrt(before * beta2 + w * w * gain2) * correct2 + eps)
            if AT_VALUE:
                w = w * inverse_root
            else:
                inverse_unit = inverse_root
        square_sum += w * w
        if WIDTH:
            value, known = w * inverse_unit, held * inverse_unit
            if GRADIENT_KEY:
                keys = _gradient_key(value, known)
            elif NORMALISED:
                inverse_before = _reciprocal(tl.sqrt(before) * correct2_before + eps)
                keys = _memory_key(held, held * inverse_before, inverse_r, True)
            else:
                keys = _memory_key(held, known, inverse_r, False)
            hidden = _tanh(_products(first, keys, WIDTH, FEATURES), WIDTH)
            y = _read(last, hidden, WIDTH)
            slope = 1.0 - y * y
            error = known + y - value if L2 else -value
            found, gradient = _gradient(gradient, last, keys, hidden, error * slope, WIDTH, FEATURES)
            norm += slope * slope * found
    program = tl.program_id(0)
    tl.store(partial + program, tl.sum(square_sum, 0))
    if WIDTH:
        tl.store(partial + programs + program, tl.sum(norm, 0))
        for n in tl.static_range(SIZE):
            tl.store(partial + (n + 2) * programs + program, tl.sum(gradient[n], 0))


@triton.jit(do_not_specialize=["programs", "numbers"])
def _add_up(partial, total, bounds, programs, numbers, BLOCK: tl.constexpr):
    """total [tensors, numbers], float64: sums over the programs of a tensor."""
    tensor, number = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(bounds + tensor), tl.load(bounds + tensor + 1)
    partial += number * programs
    found = tl.zeros([BLOCK], tl.float64)
    for offset in range(begin, end, BLOCK):
        i = offset + tl.arange(0, BLOCK)
        found += tl.load(partial + i, mask=i < end, other=0.0).to(tl.float64)
    tl.store(total + tensor * numbers + number, tl.sum(found, 0))


@triton.jit
def _mine(starts, numels, tensors, ALIGNED: tl.constexpr):
    program = tl.program_id(0)
    start, numel = tl.load(starts + program), tl.load(numels + program)
    if ALIGNED:
        start, numel = tl.multiple_of(start, _ALIGNED), tl.multiple_of(numel, _ALIGNED)
    return start, numel, tl.load(tensors + program)


@triton.jit
def _load(g, s, v, offset, numel, ADAM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Of gradient, memory and squares what is looked at, zeros for the rest and beyond the end."""
    i = offset + tl.arange(0, BLOCK)
    inside = i < numel
    gradient = tl.load(g + i, mask=inside, other=0.0)
    held, square = tl.zeros_like(gradient), tl.zeros_like(gradient)
    if WIDTH:
        held = tl.load(s + i, mask=inside, other=0.0)
    if ADAM:
        square = tl.load(v + i, mask=inside, other=0.0)
    return gradient, held, square


@triton.jit
def _scale_of(rms, tensor, NEEDS_R: tl.constexpr):
    """r and 1 / r, 0 for a tensor that never had a gradient. (sqrt(v) + eps is never 0.)"""
    r = 0.0
    inverse = 0.0
    if NEEDS_R:
        r = tl.load(rms + tensor)
        inverse = tl.where(r > 0.0, 1.0 / r, 0.0)
    return r, inverse


@triton.jit
def _network(networks, tensor, WIDTH: tl.constexpr, FEATURES: tl.constexpr):
    """W1, in units that `_tanh` takes, and w2: tuples of numbers."""
    networks += tensor.to(tl.int64) * (WIDTH * FEATURES + WIDTH)
    first, last = (), ()
    for n in tl.static_range(WIDTH * FEATURES):
        first = first + (tl.load(networks + n) * _TWICE_LOG2E,)
    for n in tl.static_range(WIDTH):
        last = last + (tl.load(networks + WIDTH * FEATURES + n),)
    return first, last


@triton.jit
def _gradient_key(value, held):
    return _clamp(value), _signed_log(value), _clamp(held), _signed_log(held)


@triton.jit
def _memory_key(held, own, inverse_r, NORMALISED: tl.constexpr):
    if NORMALISED:
        return _clamp(own), _signed_log(own), _clamp(held * inverse_r)
    else:
        return _clamp(own), _signed_log(own)


@triton.jit
def _clamp(x):
    return tl.clamp(x, -_LIMIT, _LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _signed_log(x):
    z = tl.abs(x) * _LOG_SCALE
    return _signed(tl.minimum(_log2(z + tl.sqrt(z * z + 1.0)) * _LOG_FACTOR, _LIMIT), x)


@triton.jit
def _signed(size, x):
    """size >= 0 with the sign of x: functions of it are exactly odd."""
    return (size.to(tl.int32, bitcast=True) | (x.to(tl.int32, bitcast=True) & _SIGN)).to(tl.float32, bitcast=True)


@triton.jit
def _reciprocal(x):
    """One instruction, right to a unit in the last place; a division takes six."""
    if _INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _log2(x):
    """One instruction; the polynomial would take twenty."""
    if _INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _products(first, keys, WIDTH: tl.constexpr, FEATURES: tl.constexpr):
    found = ()
    for h in tl.static_range(WIDTH):
        total = first[h * FEATURES] * keys[0]
        for f in tl.static_range(1, FEATURES):
            total += first[h * FEATURES + f] * keys[f]
        found = found + (total,)
    return found


@triton.jit
def _tanh(scaled, WIDTH: tl.constexpr):
    """tanh of x, given 2 log2(e) x: (1 - t) / (1 + t), t = exp(-2 |x|), with one division for up to 8 of them.

    1 + t is between 1 and 2: products of 8 are harmless.
    """
    ts, products = (), ()
    for h in tl.static_range(WIDTH):
        t = tl.exp2(-tl.abs(scaled[h]))
        ts = ts + (t,)
        if h % 8 == 0:
            product = 1.0 + t
        else:
            product = product + product * t
        products = products + (product,)
    found = ()
    for h in tl.static_range(WIDTH - 1, -1, -1):
        if h == WIDTH - 1 or h % 8 == 7:
            inverse = _reciprocal(products[h])
        if h % 8 == 0:
            quotient = inverse
        else:
            quotient = inverse * products[h - 1]
            inverse = inverse + inverse * ts[h]
        found = (_signed(quotient - ts[h] * quotient, scaled[h]),) + found
    return found


@triton.jit
def _read(last, hidden, WIDTH: tl.constexpr):
    """y."""
    total = last[0] * hidden[0]
    for h in tl.static_range(1, WIDTH):
        total += last[h] * hidden[h]
    return _tanh((total * _TWICE_LOG2E,), 1)[0]


@triton.jit
def _gradient(gradient, last, keys, hidden, delta, WIDTH: tl.constexpr, FEATURES: tl.constexpr):
    """Squared norm of y's gradient but for y's own slope, and `gradient` with the loss's gradient added, W1 and w2."""
    key_square = keys[0] * keys[0]
    for f in tl.static_range(1, FEATURES):
        key_square += keys[f] * keys[f]
    square = tl.zeros_like(delta)
    back_square = tl.zeros_like(delta)
    inner, outer = (), ()
    for h in tl.static_range(WIDTH):
        back = (1.0 - hidden[h] * hidden[h]) * last[h]
        square += hidden[h] * hidden[h]
        back_square += back * back
        back = back * delta
        for f in tl.static_range(FEATURES):
            inner = inner + (gradient[h * FEATURES + f] + back * keys[f],)
        outer = outer + (gradient[WIDTH * FEATURES + h] + hidden[h] * delta,)
    return square + back_square * key_square, inner + outer
