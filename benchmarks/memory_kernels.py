"""The kernels of the memory loop on a GPU: whether they are right, stage by stage, and how long a layer takes.

    python benchmarks/memory_kernels.py check --json check.json     every width, type and length, with documents too
    python benchmarks/memory_kernels.py check --chunk 128           only those of chunks of 128, which no run takes yet
    python benchmarks/memory_kernels.py time --json time.json       fused against plain, d 1536, 8 x 4096
    python benchmarks/memory_kernels.py one check '{"K": 64}'       one of them in this process: for compute-sanitizer

`check` compares with float64: each kernel's tensors with formulas on what the kernels stored, then outputs, end state
and all gradients with the plain loop, then two runs with each other. Every configuration has a process and a time limit
of its own, since a wrong kernel may hang or crash. The benchmark calls the kernels themselves: chunks that
`hope.memory.kernels` does not open are checked too. Keys of `one`: K, kind (bf16, tf32, tf32x3, ieee), chunk, L, B, H,
documents, static (learned or projected), alpha (logit of the retention), same (how alike tokens are), stages (0: end
to end only), device, compile (1: dense parts of the timed layer as `train.compile=dense` has them).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from cases import Case, child, report
from kept import keep
from memory_stages import Run, check_chunk, not_finite, relative
from torch import Tensor

from hope.arguments import count, result_file, whole
from hope.dense import Compiled, set_form
from hope.documents import ChunkLayout, Documents, plain_layout
from hope.layers import unit
from hope.memory import fused_scan as fused_form
from hope.memory.config import MemoryConfig
from hope.memory.delta import DeltaState
from hope.memory.kernels import ScanChoice
from hope.memory.matrix import MatrixBank
from hope.memory.scan import Given, Memories, Scanned, States, scan
from hope.mixers import Trunk, self_modifying
from hope.mixers.self_modifying import SelfModifyingTitans
from hope.parameters import initialise
from hope.pipe import piped

# (outputs, gradients and stages) by kind, relative in norm. Triton cuts fp32 operands off to TF32 instead of rounding
# them: 2e-3 was seen in gradients on an H100. bf16: 5e-3.
BOUNDS = {"bf16": (1e-2, 2e-2), "tf32": (4e-3, 4e-3), "tf32x3": (1e-4, 1e-4), "ieee": (1e-5, 3e-5)}
DEFAULTS: Case = {"K": 64, "kind": "bf16", "chunk": 64, "L": 1024, "B": 2, "H": 3, "documents": 0, "alpha": 4.0,
                  "same": 0.0, "static": "learned", "stages": 1, "device": "cuda"}  # fmt: skip
CHECKS: list[Case] = (
    [
        {"K": K, "kind": kind, "chunk": chunk, "L": L, "documents": documents}
        for chunk in (64, 128)
        for K, kind in ((64, "bf16"), (128, "bf16"), (64, "tf32"))
        for L in (1024, 4096)
        for documents in (0, 1)
    ]
    + [{"K": K, "static": "projected", "documents": 1} for K in (64, 128)]
    + [{"K": K, "chunk": chunk, "alpha": 1.0, "same": 0.7} for chunk in (64, 128) for K in (64, 128)]
    + [{"K": 64, "chunk": chunk, "kind": "tf32x3"} for chunk in (64, 128)]
)
TIMES: list[Case] = [
    {"K": 64, "B": 8, "L": 4096},
    {"K": 128, "B": 8, "L": 4096},
    {"K": 64, "B": 4, "L": 4096},
    {"K": 64, "B": 8, "L": 4096, "documents": 1},
    {"K": 64, "B": 8, "L": 4096, "compile": 1},
    {"K": 64, "B": 8, "L": 4096, "static": "projected"},
    {"K": 64, "B": 8, "L": 4096, "chunk": 128},
    {"K": 128, "B": 8, "L": 4096, "chunk": 128},
]


def tensors(case: Case, length: int) -> dict[str, Tensor]:
    """Leaves in float64, drawn: what a mixer brings, its memories and a carried state."""
    B, H, K = case["B"], case["H"], case["K"]
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    token = lambda: unit(draw(B, H, length, K) + case["same"] * K**0.5 * unit(draw(1, H, 1, K)))
    square = lambda: draw(H, K, K) * K**-0.5
    path = token if case["static"] == "projected" else square
    found = {"x": token(), "q": token(), "static_k": path(), "static_v": path()}
    found |= {"eta_weight": 0.3 * draw(H, K), "alpha_weight": 0.3 * draw(H, K)}
    found |= {"eta_bias": 0.3 * draw(H), "alpha_bias": case["alpha"] + 0.3 * draw(H)}
    found |= {f"M_{box}": square() for box in ("k", "v", "eta", "alpha", "main")}
    found["R0"] = 0.3 * draw(B, H, K, K) * K**-0.5
    return {name: t.to(case["device"]) for name, t in found.items()}


def layout_of(case: Case) -> tuple[int, ChunkLayout]:
    """(tokens, their chunks): whole ones, or documents of 100 tokens on average, the last of them longer, that end
    inside a chunk."""
    if not case["documents"]:
        return case["L"], plain_layout(case["B"], case["L"], case["chunk"], torch.device(case["device"]))
    length = case["L"] - 37
    starts = torch.rand(length, case["B"], generator=torch.Generator().manual_seed(5)) < 0.01
    starts[length // 2 :] = False  # so that the end state has something in it
    return length, Documents(starts.to(case["device"])).layout(case["chunk"])


def config_of(case: Case) -> MemoryConfig:
    return MemoryConfig(static=case["static"], projection_chunk=case["chunk"], main_chunk=case["chunk"])


def bound(leaves: dict[str, Tensor], layout: ChunkLayout, config: MemoryConfig) -> tuple[Memories, Given, States]:
    reads = torch.cat([leaves[f"M_{box}"] for box in ("k", "v", "eta", "alpha")], 1)
    bank = MatrixBank(reads, leaves["M_main"], leaves["M_k"].shape, config)
    memories = Memories(bank, bank, leaves["eta_weight"], leaves["alpha_weight"])
    x, q = layout.spread(leaves["x"]), layout.spread(leaves["q"])
    biases = leaves["eta_bias"], leaves["alpha_bias"]
    state = (DeltaState(leaves["R0"]),)
    static, none = [leaves["static_k"], leaves["static_v"]], [None, None]
    learned, projected = (static, none) if config.static == "learned" else (none, map(layout.spread, static))
    return memories, Given(x, q, *learned, *biases, *projected), States(state, state)


def end_to_end(case: Case, loop: Callable[..., Scanned], dtype: torch.dtype) -> dict[str, Tensor]:
    """y, the end state and the gradient of every leaf."""
    length, layout = layout_of(case)
    leaves = {name: t.to(dtype).requires_grad_() for name, t in tensors(case, length).items()}
    config = config_of(case)
    found = loop(config, *(parts := bound(leaves, layout, config))[:2], layout, parts[2])
    y, end = layout.collect(found.y), found.states.main[0].weight
    weights = lambda t, seed: torch.randn(t.shape, generator=torch.Generator().manual_seed(seed)).to(t)
    ((y * weights(y, 1)).sum() + (end * weights(end, 2)).sum()).backward()
    gradients = {f"d{name}": t.grad for name, t in leaves.items()}
    assert all(g is not None for g in gradients.values())
    return {"y": y.detach(), "R": end.detach(), **gradients}  # type: ignore[dict-item]


def stages(case: Case, operands: torch.dtype, precision: str) -> Run:
    """One pass through the kernels themselves, forward and backward."""
    from hope.memory import fused

    config, (length, layout) = config_of(case), layout_of(case)
    leaves = {name: t.float() for name, t in tensors(case, length).items()}
    memories, given, state = bound(leaves, layout, config)
    x, q = (t.to(operands).contiguous() for t in (given.x, given.q))
    names = ("a_k", "a_v", "g_eta", "g_alpha", "b_k", "b_v", "e_eta", "e_alpha")
    table = dict(zip(names, fused_form._before_the_loop(config, memories, given, x), strict=True))
    table = {"x": x, "q": q, **table, "b_k": table["b_k"].to(operands), "b_v": table["b_v"].to(operands)}
    marks = [
        None if layout.valid is None else layout.valid.float().contiguous(),
        None if layout.resets is None else layout.resets.int().contiguous(),
        fused_form.unfinished_chunks(layout, case["B"], x.device),
    ]
    start = state.main[0].weight.mT.contiguous()
    chunk, block = case["chunk"], min(case["chunk"], fused_form.BLOCK)
    made = fused.forward(*table.values(), start, *marks, chunk, block, config.eta_bound, precision)
    draw = lambda like, seed: torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)
    df, dend = draw(made["f"], 3), draw(made["end"], 4)
    rest = [table[name] for name in ("b_k", "b_v", "e_eta", "e_alpha")]
    adjoint = fused.backward(df, dend, x, q, *rest, *marks[1:], made, chunk, config.eta_bound, precision, trace=True)
    return Run(table, made, adjoint, df, dend, *marks, chunk, block, config.eta_bound)


def check(case: Case) -> Case:
    """Print a line per stage, and the verdict. Returns the errors."""
    torch.backends.cuda.matmul.allow_tf32 = False  # dense products outside of the kernels
    operands = torch.bfloat16 if case["kind"] == "bf16" else torch.float32
    precision = "tf32" if case["kind"] == "bf16" else case["kind"]
    of_outputs, of_gradients = BOUNDS[case["kind"]]
    bad: list[str] = []

    def say(stage: str, **errors: float) -> None:
        limit = lambda name: of_outputs if name in ("y", "R") else of_gradients
        wrong = [name for name, error in errors.items() if not error <= limit(name)]
        bad.extend(f"{stage}: {name}" for name in wrong)
        words = (f"{name} {error:.1e}{' BAD' if name in wrong else ''}" for name, error in errors.items())
        print(f"  {stage:30s}", *words, flush=True)

    if case["stages"]:
        run = stages(case, operands, precision)
        bad.extend(f"not finite: {name}" for name in not_finite(run))
        chunks = run.df.shape[2] // run.chunk
        for n in sorted({0, 1, chunks // 2, chunks - 1}):
            check_chunk(run, n, say)
        del run
    expected = end_to_end(case, scan, torch.float64)
    loop = partial(fused_form.fused_scan, operands=operands, precision=precision)
    found, again = (end_to_end(case, loop, torch.float32) for _ in range(2))
    errors = {name: relative(found[name], expected[name]) for name in expected}
    say("end to end", **errors)
    different = [name for name in found if not torch.equal(found[name], again[name])]
    print("  two runs are bit-equal:", not different, flush=True)
    bad.extend(f"two runs differ: {name}" for name in different)
    return {"bad": bad, "errors": errors}


class Timed:
    """A kernel that notes how long its launches take."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.events = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **choices: Any) -> None:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self.kernel[grid](*args, **choices)
            end.record()
            self.events.append((begin, end))

        return launch

    def median(self) -> float:
        return round(statistics.median(begin.elapsed_time(end) for begin, end in self.events), 3)


def timed(step: Callable[[], list[torch.cuda.Event]], repeat: int) -> list[float]:
    """Medians, in ms, of the times between the events that a step records; two unmeasured rounds first."""
    rounds = []
    for _ in range(repeat + 2):
        events = step()
        torch.cuda.synchronize()
        rounds.append([a.elapsed_time(b) for a, b in itertools.pairwise(events)])
    return [round(statistics.median(column), 3) for column in zip(*rounds[2:], strict=True)]


def layer(case: Case, loop: Callable[..., Scanned] | None, repeat: int) -> Case:
    """ms forward and backward of one whole mixer in bf16, and GiB beyond its weights; loop None: the plain one."""
    width, device = case["width"], torch.device(case["device"])
    mixer = SelfModifyingTitans(Trunk(width, width // case["K"], 1), config_of(case))
    initialise(mixer, 0)
    mixer = mixer.to(device, torch.bfloat16)
    choice = ScanChoice(scan, "") if loop is None else ScanChoice(loop, "", operands=torch.bfloat16)
    if case.get("compile"):
        set_form(mixer, Compiled())
    self_modifying.scan_for = lambda *_: choice  # type: ignore[assignment]
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda: torch.randn(case["L"], case["B"], width, generator=generator, device=device).bfloat16()
    x, dy = draw().requires_grad_(), draw()
    starts = torch.rand(case["L"], case["B"], generator=generator, device=device) < 1e-3
    documents = Documents(starts) if case.get("documents") else None

    def step() -> list[torch.cuda.Event]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        events[0].record()
        y, _ = mixer(x, None, documents)
        events[1].record()
        y.backward(dy)
        events[2].record()
        x.grad = None
        mixer.zero_grad()
        return events

    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    forward, backward = timed(step, repeat)
    peak = (torch.cuda.max_memory_allocated() - base) / 2**30
    return {"forward": forward, "backward": backward, "both": round(forward + backward, 3), "GiB": round(peak, 2)}


def measure(case: Case) -> Case:
    """Whole layers, fused and plain, and the kernels alone."""
    from hope.memory import fused

    names = ("_sequential", "_outputs", "_outputs_backward", "_sequential_backward")
    for name in names:
        setattr(fused, name, Timed(getattr(fused, name)))
    loop = partial(fused_form.fused_scan, operands=torch.bfloat16, precision="tf32")
    found: Case = {"fused": layer(case, loop, case["repeat"])}
    found["kernels"] = {name: getattr(fused, name).median() for name in names}
    found["kernels"]["together"] = round(sum(found["kernels"].values()), 3)
    print("  fused", found["fused"], "\n  kernels", found["kernels"], flush=True)
    try:
        found["plain"] = layer(case, None, 3)
        print("  plain", found["plain"], flush=True)
        found["times faster"] = round(found["plain"]["both"] / found["fused"]["both"], 1)
    except torch.cuda.OutOfMemoryError:
        found["plain"] = "out of memory"
    return {"bad": [], "card": torch.cuda.get_device_name(), **found}


def one(mode: str, case: Case) -> None:
    report((check if mode == "check" else measure)({**DEFAULTS, "width": 1536, "repeat": 10, **case}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["check", "time", "one"])
    parser.add_argument("rest", nargs="*", help="of one: check or time, and its keys as JSON")
    parser.add_argument("--chunk", type=whole(), help="only cases of this chunk")
    parser.add_argument("--json", type=result_file, help="where to write all numbers")
    parser.add_argument("--limit", type=whole(), default=170, help="seconds per configuration")
    parser.add_argument("--jobs", type=count, default=4, help="checks side by side; times are taken alone")
    args = parser.parse_args()
    if args.mode == "one":
        one(args.rest[0], json.loads(args.rest[1]) if len(args.rest) > 1 else {})
        return 0
    cases, jobs = (CHECKS, args.jobs) if args.mode == "check" else (TIMES, 1)
    cases = [case for case in cases if args.chunk in (None, case.get("chunk", DEFAULTS["chunk"]))]
    if not cases:
        parser.error(f"no case has chunks of {args.chunk}")
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(partial(child, __file__, args.mode, args.limit), cases))
    print("\nSUMMARY")
    for result in results:
        print(result["mode"], json.dumps(result["case"]), result["verdict"])
    if args.json:
        keep(args.json, results)
    return int(any(result["verdict"] != "ok" for result in results))


if __name__ == "__main__":
    sys.exit(piped(main))
