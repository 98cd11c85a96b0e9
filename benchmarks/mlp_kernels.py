"""The kernels of `mlp` memories on a GPU: whether they are right, stage by stage, and how long a layer takes.

    python benchmarks/mlp_kernels.py --json mlp.json                check, then time
    python benchmarks/mlp_kernels.py check | time
    compute-sanitizer python benchmarks/mlp_kernels.py one check '{"L": 128, "B": 1, "H": 2, "stages": 0}'

`check` compares with float64: what every stage made of every chunk with formulas on what the stage was given
(benchmarks/mlp_stages.py), then outputs, end states and all gradients of the loop with the plain loop, then two runs
with each other. A wrong stage is named with its tensor and its first wrong chunk. Every case has a process and a time
limit of its own, since a wrong kernel may hang or crash. `one` runs a case in this process. `time` gives a whole layer,
d 1024, 8 x 4096, as it is launched and as a CUDA graph, and the share of every kernel in the graph.

Keys of `one`: K, kind (bf16, ieee), L, B, H, chunk, group (chunks between states that are kept), documents, static,
alpha (logit of the retention), device, stages (0: end to end only), options (of all kernels, as triton has them), plain
(1: time the plain loop too).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from cases import Case, child, report
from kept import keep
from mlp_stages import Formulas
from torch import Tensor

from hope.arguments import result_file, whole
from hope.documents import ChunkLayout, Documents, plain_layout
from hope.layers import unit
from hope.memory.config import MemoryConfig
from hope.memory.delta import DeltaState
from hope.memory.kernels import ScanChoice
from hope.memory.mlp import MlpBank
from hope.memory.scan import GATE_SCALE, Given, Memories, Scanned, States, scan
from hope.memory.two_layer import ops
from hope.memory.two_layer.loop import Rule, Table
from hope.memory.two_layer.stages import Kernels
from hope.mixers import Trunk, self_modifying
from hope.mixers.self_modifying import SelfModifyingTitans
from hope.parameters import initialise
from hope.pipe import piped

BOXES = ("k", "v", "eta", "alpha", "main")
# (outputs, gradients and stages) by kind, relative in norm, as in benchmarks/memory_kernels.py
BOUNDS = {"bf16": (1e-2, 2e-2), "ieee": (1e-5, 3e-5)}
TYPES = {"bf16": torch.bfloat16, "ieee": torch.float32}
ADDED = ("s1", "s2", "ds1", "ds2", "dw1", "dw2", "dread_out")
"""What stages change in place: the change is compared."""
DEFAULTS: Case = {"K": 64, "kind": "bf16", "L": 1024, "B": 2, "H": 3, "chunk": 64, "group": ops.GROUP, "documents": 0,
                  "alpha": 4.0, "static": "learned", "device": "cuda", "width": 1024, "repeat": 10}  # fmt: skip
CHECKS: list[Case] = [
    {"L": 512},
    {"L": 1024, "documents": 1},
    {"L": 4096, "alpha": 8.0},
    {"L": 1024, "static": "projected", "documents": 1},
    {"L": 4096, "B": 4, "H": 8, "stages": 0},  # more programs than a GPU holds at once
]
TIMES: list[Case] = [
    {"B": 8, "L": 4096},
    {"B": 8, "L": 4096, "group": 16},
    {"B": 8, "L": 4096, "documents": 1},
    {"B": 8, "L": 4096, "plain": 1},
]


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|; 0 where both are zero."""
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


class Checked:
    """`Kernels`, each of whose stages is compared with the formulas. errors: the worst by (stage, tensor), with the
    first chunk where it was above the bound."""

    def __init__(self, bound: float) -> None:
        self.bound = bound
        self.errors: dict[tuple[str, str], tuple[float, int | None]] = {}

    def __getattr__(self, stage: str) -> Callable[[Table, Rule, int, int], None]:
        def run(table: Table, rule: Rule, n: int, place: int) -> None:
            before = {name: t.to(torch.float64 if t.is_floating_point() else t.dtype) for name, t in table.items()}
            before = {name: t.nan_to_num().clone() if t.is_floating_point() else t for name, t in before.items()}
            expected = {name: t.clone() for name, t in before.items()}
            getattr(Formulas(), stage)(expected, rule, n, place)
            self._launch(stage, table, rule, n, place)
            for name, t in table.items():
                if t.is_floating_point():
                    self._compare(stage, name, n, before[name], expected[name], t.double())

        return run

    def _launch(self, stage: str, table: Table, rule: Rule, n: int, place: int) -> None:
        """Of one that hangs or crashes the last line that was printed has the name."""
        if stage not in {of for of, _ in self.errors}:
            print(f"  {stage} begins", flush=True)
        try:
            getattr(Kernels(), stage)(table, rule, n, place)
            if table["x"].is_cuda:
                torch.cuda.synchronize()
        except Exception:
            print(f"  {stage} failed in chunk {n}", flush=True)
            raise

    def _compare(self, stage: str, name: str, n: int, before: Tensor, expected: Tensor, found: Tensor) -> None:
        changed = expected != before
        # a number that comes out as it was, such as a zero, may be written again with a rounding error
        apart = (found.nan_to_num() - before).abs() > self.bound * expected.abs().max()
        stray = (apart & ~changed).sum().item()
        if stray and name not in ADDED:
            self._note(stage, f"{name} (where nothing belongs)", float(stray), n)
        if changed.any():
            start = before if name in ADDED else torch.zeros_like(before)
            part = lambda t: (t - start)[changed]
            self._note(stage, name, relative(part(found), part(expected)), n)

    def _note(self, stage: str, name: str, error: float, n: int) -> None:
        worst, first = self.errors.get((stage, name), (0.0, None))
        wrong = not error <= self.bound
        self.errors[stage, name] = (
            error if error != error else max(worst, error),
            n if wrong and first is None else first,
        )


def tensors(case: Case, length: int) -> dict[str, Tensor]:
    """Leaves in float64, drawn: what a mixer brings, its memories and a carried state."""
    B, H, K = case["B"], case["H"], case["K"]
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    token, square = lambda: unit(draw(B, H, length, K)), lambda: draw(H, K, K) * K**-0.5
    path = token if case["static"] == "projected" else square
    found = {"x": token(), "q": token(), "static_k": path(), "static_v": path()}
    found |= {"eta_weight": 0.3 * draw(H, K), "alpha_weight": 0.3 * draw(H, K)}
    found |= {"eta_bias": 0.3 * draw(H), "alpha_bias": case["alpha"] + 0.3 * draw(H)}
    found |= {f"{layer}_{box}": square() for box in BOXES for layer in ("w1", "w2")}
    found |= {"s1": 0.3 * draw(B, H, 5, K, K) * K**-0.5, "s2": 0.3 * draw(B, H, 5 * K, K) * K**-0.5}
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


def end_to_end(case: Case, loop: Callable[..., Scanned], dtype: torch.dtype) -> dict[str, Tensor]:
    """y, the end states and the gradient of every leaf."""
    length, layout = layout_of(case)
    leaves = {name: t.to(dtype).requires_grad_() for name, t in tensors(case, length).items()}
    size = {"projection_chunk": case["chunk"], "main_chunk": case["chunk"]}
    config = MemoryConfig(memory="mlp", static=case["static"], **size)
    outer = torch.stack([leaves[f"w1_{box}"] for box in BOXES], 1)
    bank = MlpBank(outer, torch.cat([leaves[f"w2_{box}"] for box in BOXES], 1), True, config)
    static, none = [leaves["static_k"], leaves["static_v"]], [None, None]
    learned, projected = (static, none) if case["static"] == "learned" else (none, map(layout.spread, static))
    biases = leaves["eta_bias"], leaves["alpha_bias"]
    given = Given(layout.spread(leaves["x"]), layout.spread(leaves["q"]), *learned, *biases, *projected)
    state = tuple(DeltaState(leaves[name]) for name in ("s1", "s2"))
    memories = Memories(bank, bank, leaves["eta_weight"], leaves["alpha_weight"])
    found = loop(config, memories, given, layout, States(state, state))
    y, ends = layout.collect(found.y), [layer.weight for layer in found.states.main]
    weights = lambda t, seed: torch.randn(t.shape, generator=torch.Generator().manual_seed(seed)).to(t)
    sum((t * weights(t, seed)).sum() for seed, t in enumerate((y, *ends))).backward()  # type: ignore[union-attr]
    gradients = {f"d{name}": t.grad for name, t in leaves.items()}
    assert all(g is not None for g in gradients.values())
    return {"y": y.detach(), "s1": ends[0].detach(), "s2": ends[1].detach(), **gradients}  # type: ignore[dict-item]


def check(case: Case) -> Case:
    """Print a line per stage, and the verdict. Returns the errors."""
    case = {**DEFAULTS, **case}
    torch.backends.cuda.matmul.allow_tf32 = False  # dense products outside of the kernels
    of_outputs, of_gradients = BOUNDS[case["kind"]]
    ops.GROUP = case["group"]
    precision = "tf32" if case["kind"] == "bf16" else "ieee"
    loop = partial(ops.two_layer_scan, operands=TYPES[case["kind"]], precision=precision)
    own, checked = ops._stages, Checked(of_gradients)
    bad: list[str] = []
    if case.get("stages", 1):
        ops._stages = lambda: checked  # type: ignore[assignment, return-value]
        try:
            end_to_end(case, loop, torch.float32)
        finally:
            ops._stages = own
        bad += _say_stages(checked)
    expected = end_to_end(case, scan, torch.float64)
    ops._stages = Kernels  # type: ignore[assignment]
    try:
        found, again = (end_to_end(case, loop, torch.float32) for _ in range(2))
    finally:
        ops._stages = own
    errors = {name: relative(found[name], expected[name]) for name in expected}
    for gate in (
        "eta",
        "alpha",
    ):  # a sum over all tokens that may cancel: compared with its terms, as the weight has them
        bias, weight = expected[f"d{gate}_bias"], expected[f"d{gate}_weight"]
        scale = torch.maximum(bias.norm(), weight.norm() / GATE_SCALE)
        errors[f"d{gate}_bias"] = ((found[f"d{gate}_bias"].double() - bias).norm() / scale).item()
    wrong = [n for n, e in errors.items() if not e <= (of_outputs if n in ("y", "s1", "s2") else of_gradients)]
    bad += [f"end to end {name}" for name in wrong]
    words = (f"{name} {error:.1e}{' BAD' if name in wrong else ''}" for name, error in errors.items())
    print("  end to end", *words, flush=True)
    different = [name for name in found if not torch.equal(found[name], again[name])]
    print("  two runs are bit-equal:", not different, flush=True)
    bad += [f"two runs differ {name}" for name in different]
    return {
        "bad": bad,
        "errors": errors,
        "stages": {" ".join(key): error for key, (error, _) in checked.errors.items()},
    }


def _say_stages(checked: Checked) -> list[str]:
    """What is wrong, the first stage that was run first."""
    bad = []
    for stage in dict.fromkeys(stage for stage, _ in checked.errors):
        words = []
        for (of, name), (error, first) in checked.errors.items():
            if of == stage:
                words.append(f"{name} {error:.1e}" + ("" if first is None else f" BAD from chunk {first}"))
                bad += [] if first is None else [f"{stage} {name} from chunk {first}"]
        print(f"  {stage:20s}", *words, flush=True)
    return bad


def build_layer(case: Case, loop: Callable[..., Scanned] | None) -> Callable[[], None]:
    """Forward and backward of one whole mixer in bf16; loop None: the plain one."""
    width, device = case["width"], torch.device(case["device"])
    mixer = SelfModifyingTitans(Trunk(width, width // case["K"], 1), MemoryConfig(memory="mlp", static=case["static"]))
    initialise(mixer, 0)
    mixer = mixer.to(device, torch.bfloat16)
    choice = ScanChoice(scan, "") if loop is None else ScanChoice(loop, "", operands=torch.bfloat16)
    self_modifying.scan_for = lambda *_: choice  # type: ignore[assignment]
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda: torch.randn(case["L"], case["B"], width, generator=generator, device=device).bfloat16()
    x, dy = draw().requires_grad_(), draw()
    starts = torch.rand(case["L"], case["B"], generator=generator, device=device) < 1e-3
    documents = Documents(starts) if case["documents"] else None
    if documents is not None:
        documents.layout(64)  # made once: it waits for the GPU

    def step() -> None:
        x.grad = None
        mixer.zero_grad()
        y, _ = mixer(x, None, documents)
        y.backward(dy)

    return step


def median_ms(step: Callable[[], None], repeat: int) -> float:
    """Two unmeasured rounds first."""
    times = []
    for _ in range(repeat + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return round(statistics.median(times[2:]), 3)


def graphed(step: Callable[[], None]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def shares(step: Callable[[], None]) -> dict[str, float]:
    """ms of every one of our kernels in one step, and of all else."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    own = ("_project", "_write", "_read", "_reads", "_systems", "_errors", "_keys", "_gates")
    found = dict.fromkeys((*own, "all else"), 0.0)
    for row in profiler.key_averages():
        found[row.key if row.key in own else "all else"] += row.self_device_time_total / 1000
    return {name: round(ms, 3) for name, ms in found.items()}


def measure(case: Case) -> Case:
    """A whole layer, fused and maybe plain, and the kernels alone."""
    from hope.memory.two_layer.forward import fused

    case, ops.GROUP = {**DEFAULTS, **case}, case.get("group", ops.GROUP)
    fused.OPTIONS.update(case.get("options", {}))
    loop = partial(ops.two_layer_scan, operands=torch.bfloat16, precision="tf32")
    step = build_layer(case, loop)
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    found: Case = {"bad": [], "card": torch.cuda.get_device_name(), "eager ms": median_ms(step, case["repeat"])}
    found["GiB"] = round((torch.cuda.max_memory_allocated() - base) / 2**30, 2)
    replay = graphed(step)
    found["graph ms"] = median_ms(replay, case["repeat"])
    print("  whole layer:", {name: found[name] for name in ("eager ms", "graph ms", "GiB")}, flush=True)
    found["kernels ms"] = shares(replay)
    found["loop ms"] = round(sum(ms for name, ms in found["kernels ms"].items() if name != "all else"), 3)
    print("  kernels:", found["kernels ms"], "together", found["loop ms"], flush=True)
    if case.get("plain"):
        del step, replay
        found["plain ms"] = median_ms(build_layer(case, None), 2)
        print("  plain ms", found["plain ms"], flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", nargs="?", choices=["all", "check", "time", "one"], default="all")
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--json", type=result_file)
    parser.add_argument("--limit", type=whole(), default=240, help="seconds per case")
    args = parser.parse_args(argv)
    if args.mode == "one":
        report((check if args.rest[0] == "check" else measure)(json.loads(args.rest[1])))
        return 0
    rows = []
    for mode, cases in (("check", CHECKS), ("time", TIMES)):
        for case in cases if args.mode in ("all", mode) else []:
            rows.append(child(__file__, mode, args.limit, case))
            if args.json:
                keep(args.json, rows)
    wrong = [row for row in rows if row["verdict"] != "ok"]
    print(f"{len(rows) - len(wrong)} of {len(rows)} cases ok", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(piped(main))
