"""Cells, tables and pictures of sweeps; estimates; preflight's judgement. No cluster."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from full_disk import no_file_beyond
from tiny import config_file

from configs.errors import ConfigError
from configs.schema import load, validate_without_data
from hope.pipe import piped
from hope.stored.manifest import Manifest
from hope.train.stragglers import BusyTimer
from launch import against, collect, estimate, plot, preflight, profile, scaling, speeds, sweep
from launch import grid as grids
from launch.__main__ import main
from launch.folder import write_json
from launch.status import find_runs, status_table
from parallel.start.interconnect import partners

SWEEPS = sorted((Path(sweep.__file__).parent / "sweeps").glob("*.yaml"))


def grid_file(folder: Path, **more) -> str:
    facts = {"name": "grid", "config": config_file(folder), "where": "local", "nodes": [1, 2], **more}
    path = folder / "grid.yaml"
    path.write_text(json.dumps(facts))
    return str(path)


def test_cells_of_a_weak_scaling_over_layouts(tmp_path):
    grid = grids.load(grid_file(tmp_path, scaling="weak", layouts=[{}, {"tensor": 2}], grid={"optim.lr": [1e-3, 3e-3]}))
    cells = grids.cells(grid)
    fitting = ("n1_dp", "n2_dp", "n2_tp2")  # a tensor degree of 2 has no room on one process
    assert [c.name for c in cells] == [f"{name}_lr-{lr}" for name in fitting for lr in ("0.001", "0.003")]
    assert "train.global_batch=8" in cells[0].overrides
    assert "train.global_batch=16" in cells[-1].overrides
    assert "parallel.tensor=2" in cells[-1].overrides
    assert len({str(sweep.run_folder(grid, c).root) for c in cells}) == 6


def test_weak_and_strong_scaling_of_several_models(tmp_path):
    """The smallest cells are of both kinds, and a variant has the layouts and nodes that it names."""
    variants = [
        {"name": "one"},
        {"name": "two", "overrides": ["train.global_batch=4"], "layouts": ["dp"], "nodes": [4]},
    ]
    layouts = [{}, {"tensor": 2, "sequence": True, "train.micro_batch": 4}]
    grid = grids.load(grid_file(tmp_path, nodes=[1, 4], scaling="both", layouts=layouts, variants=variants))
    cells = {cell.name: cell for cell in grids.cells(grid)}
    assert list(cells) == ["n1_dp_one", "n4_dp_one", "n4_dp_one_strong", "n4_tp2-sp_one", "n4_tp2-sp_one_strong",
                           "n4_dp_two", "n4_dp_two_strong"]  # fmt: skip
    assert [cell.scaling for cell in cells.values()] == ["weak", *3 * ["weak", "strong"]]
    batches = {name: grids.cell_config(grid, cell).train.global_batch for name, cell in cells.items()}
    assert list(batches.values()) == [8, 32, 8, 32, 8, 16, 4]
    divided = grids.cell_config(grid, cells["n4_tp2-sp_one"])
    assert (divided.parallel.tensor, divided.parallel.sequence, divided.train.micro_batch) == (2, True, 4)
    assert [cell.name for cell in grids.cells(grid, devices=2)] == ["n1_dp_one"]


def test_cells_that_need_more_devices_are_left_out_with_a_word(tmp_path, capsys):
    path = grid_file(tmp_path, nodes=[1, 2, 4], layouts=[{}, {"tensor": 2}])
    assert main(["sweep", path, "--dry-run", "--devices", "2"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "sweep grid: left out, too few devices for the layout: n1_tp2" in said
    assert "sweep grid: left out, more than the 2 devices here: n4_dp, n4_tp2" in said
    assert [line.split()[0] for line in said if "to do" in line] == ["n1_dp", "n2_dp", "n2_tp2"]


def fewest(cells: list[grids.Cell]) -> list[grids.Cell]:
    """Of every model and layout the cell with the fewest devices, which share its states."""
    return list({cell.series: cell for cell in reversed(cells) if cell.scaling == cells[0].scaling}.values())


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_the_cells_of_the_committed_sweeps_can_run(path, monkeypatch):
    """Of every model and layout the last: the batch that the most devices divide, fewer can, and a larger one is its
    multiple."""
    monkeypatch.chdir(Path(sweep.__file__).parent.parent)
    grid = grids.load(str(path))
    cells = grids.cells(grid)
    assert len({cell.name for cell in cells}) == len(cells) >= 4
    for cell in {cell.series: cell for cell in cells}.values():
        validate_without_data(grids.cell_config(grid, cell), cell.devices, cell.name)


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_every_cell_of_the_committed_sweeps_can_run_and_fits(path, monkeypatch):
    """Into an H100, of which a prediction may take 92 %."""
    monkeypatch.chdir(Path(sweep.__file__).parent.parent)
    grid = grids.load(str(path))
    cells, site = grids.cells(grid), profile.load("h100", [])
    for cell in cells:
        validate_without_data(grids.cell_config(grid, cell), cell.devices, cell.name)
    for cell in fewest(cells):
        config = grids.cell_config(grid, cell)
        memory = estimate.worst_rank(config, config.parallel, cell.devices)
        assert estimate.fits(memory, site), f"{cell.name}: {estimate.excess(memory, site)}"


def test_cells_that_cannot_run_are_refused_together(tmp_path):
    grid = grids.load(
        grid_file(tmp_path, layouts=[{"tensor": 2}, {}], overrides=["train.global_batch=2"], nodes=[1, 2])
    )
    with pytest.raises(ConfigError) as caught:
        sweep.run(grid)
    assert [p for p, _, _ in caught.value.problems] == ["n2_dp: train.global_batch"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("more", "path"),
    [
        ({"nodes": []}, "nodes"),
        ({"nodes": [2, 3], "scaling": "weak"}, "nodes"),
        ({"layouts": [{"tensr": 2}]}, "layouts[0].tensr"),
        ({"layouts": [{"tensor": "2"}]}, "layouts[0].tensor"),
        ({"layouts": [{"tensor": 2}, {"tensor": 2, "train.micro_batch": 4}]}, "layouts"),
        ({"variants": [{"name": "a", "layouts": ["tp2"]}]}, "variants[0].layouts"),
        ({"variants": [{"name": "a", "nodes": [8]}]}, "variants[0].nodes"),
        ({"variants": [{"name": "a"}, {"name": "a"}]}, "variants[1].name"),
        ({"grid": {"optim.lr": 1e-3}}, "grid.optim.lr"),
        ({"throttle": 0}, "throttle"),
        ({"name": "a/b"}, "name"),
        ({"nodse": [1]}, "nodse"),
    ],
)
def test_bad_grids(tmp_path, more, path):
    with pytest.raises(ConfigError) as caught:
        grids.load(grid_file(tmp_path, **more))
    assert path in [p for p, _, _ in caught.value.problems]


@pytest.mark.parametrize("name", sorted(p.stem for p in profile.FOLDER.glob("*.yaml")))
def test_the_committed_profiles_are_whole(name):
    assert profile.load(name, []).ranks_per_node >= 1


def measured(folder: Path, name: str, speed: float, devices: int) -> None:
    run = folder / "runs" / "grid" / name
    run.mkdir(parents=True)
    lines = [{"step": s, "loss": 4.0 - s / 10, "tokens_per_s": speed * (s > 2) + 1.0, "step_time_s": 0.1,
              "tokens_per_s_per_device": (speed * (s > 2) + 1.0) / devices} for s in range(1, 13)]  # fmt: skip
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 13, "lo')
    write_json(run / "control" / "verdict.json", {"verdict": "done"})


def test_collect_makes_a_table_and_a_picture(tmp_path, capsys):
    grid = grids.load(grid_file(tmp_path, nodes=[1, 2, 4]))
    for nodes, speed in ((1, 999.0), (2, 1799.0)):
        measured(tmp_path, f"n{nodes}_dp", speed, nodes)
    assert collect.collect(grid, str(tmp_path / "out")) == 1  # one cell never ran
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out/results.csv").read_text())))
    assert [(r["cell"], r["devices"], r["verdict"], r["tokens_per_s"]) for r in rows] == [
        ("n1_dp", "1", "done", "1000"), ("n2_dp", "2", "done", "1800"), ("n4_dp", "", "none", "")]  # fmt: skip
    assert [r["efficiency"] for r in rows] == ["1", "0.9", ""]
    picture = (tmp_path / "out/scaling.svg").read_text()
    ElementTree.fromstring(picture)  # well-formed
    assert ">90%<" in picture
    assert "dp (dashed: ideal)" in picture
    assert "results.csv" in capsys.readouterr().out


def test_rows_of_json_are_added_and_compared_with_one_gpu(tmp_path, capsys):
    grid_path, file = grid_file(tmp_path, nodes=[1, 2, 4], layouts=[{}, {"pipeline": 2}]), tmp_path / "scale.json"
    for name, speed, nodes in (("n1_dp", 999.0, 1), ("n2_dp", 1799.0, 2), ("n2_pp2", 1199.0, 2)):
        measured(tmp_path, name, speed, nodes)
        (tmp_path / "runs" / "grid" / name / "env.txt").write_text("torch 2\ndevice Abacus\n")
    for _ in range(2):  # the second time replaces what is there
        collect.collect(grids.load(grid_path), str(tmp_path / "out"), file)
    rows = scaling.read(file)
    assert [(r["layout"], r["gpus"], r["scaling"], r["tokens_per_s_per_gpu"], r["efficiency"]) for r in rows] == [
        ("dp", 1, "strong", 1000, 1), ("dp", 2, "strong", 900, 0.9), ("pp2", 2, "strong", 600, 0.6)]  # fmt: skip
    one = estimate.parameters(load(config_file(tmp_path), []))
    assert {(r["model"], r["gpu"], r["parameters"], r["global_batch"]) for r in rows} == {("hope", "Abacus", one, 8)}
    capsys.readouterr()
    assert main(["compare", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    # 8 x 16 tokens; ideal 0.064 s. Measured 0.0711, and in the pipeline with a bubble of (2 - 1) / 4: 0.080 and 0.1067
    assert "| dp | 2 | strong | 0.064 | 0.071 | -10.0% | one GPU |" in lines[2]
    assert "| pp2 | 2 | strong | 0.080 | 0.107 | -25.0% | one GPU |" in lines[3]
    assert lines[-1] == "2 steps, 1 of them more than 15% off"


@pytest.mark.parametrize("more", [{"parameters": 2}, {"cuda_graphs": True}])
def test_a_row_replaces_none_of_another_model_or_choice(tmp_path, more):
    """Defaults change, so the same overrides may be something else; rows of before keep the one GPU they rest on."""
    file = tmp_path / "scale.json"
    row = {"model": "hope", "parameters": 1, "layout": "dp", "gpus": 1, "scaling": "weak", "seq": 16, "gpu": "Abacus",
           "tokens_per_s": 100.0, "config": "c.yaml", "overrides": []}  # fmt: skip
    scaling.write(file, [row, {**row, "gpus": 2, "tokens_per_s": 180.0}])
    scaling.write(file, [{**row, **more, "tokens_per_s": 50.0}])
    assert [(r["gpus"], r["efficiency"]) for r in scaling.read(file)] == [(1, 1), (2, 0.9), (1, 1)]
    scaling.write(file, [{**row, "tokens_per_s": 60.0}])
    assert [(r["gpus"], r["efficiency"]) for r in scaling.read(file)] == [(2, 1.5), (1, 1), (1, 1)]


def test_an_estimate_may_rest_on_rows_of_ones_own(tmp_path):
    path = config_file(tmp_path)
    row = {"model": "hope", "parameters": 20_000, "layout": "dp", "gpus": 1, "tokens_per_s": 5e5, "seq": 16,
           "gpu": "NVIDIA H200", "config": path, "overrides": [], "efficiency": 1.0}  # fmt: skip
    [speed] = against.speeds_of([row, {**row, "gpus": 2}, {**row, "gpu": "Abacus"}], "mine.json")
    config = load(path, [])
    assert estimate.measured(config, [speed]) is speed
    seconds = estimate.useful_seconds(config, 1, "NVIDIA H200", speed.mfu)
    assert config.train.tokens_per_step / seconds == pytest.approx(5e5)
    page = estimate.describe(config, 1, profile.load("h100", []), 1e6, None, known=[speed])
    assert "500,000 tokens/s" in page
    attention = load("configs/hope_340m.yaml", ["model.pattern=[attention]"], check=False)
    assert estimate.measured(attention, [speed]).mixer == "attention"  # of which the file says nothing


SPEED = """[{"model": "hope", "parameters": 5, "layout": "dp", "gpus": 1, "scaling": "weak", "seq": 8, "gpu": "cpu",
    "config": "a.yaml", "overrides": [], "tokens_per_s": %s}]"""


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (None, "(file)   No such file"),
        ("[{", "(file)   is no JSON"),
        ("{}", "(file)   is no list of rows but a dict"),
        ("[3, null]", "row 2    lacks model, parameters, layout"),
        ('[{"model": "hope"}]', "row 1   lacks parameters, layout"),
        (SPEED % 0, "row 1   tokens_per_s is 0, not a finite number above 0"),
        (SPEED % "[1]", "row 1   tokens_per_s is [1], not a finite number above 0"),
        (SPEED % '1, "overrides": [3]', "row 1   overrides.0 is 3, not a text"),
    ],
)
def test_rows_that_cannot_be_read_are_an_error_in_words(tmp_path, capsys, text, where):
    file = tmp_path / "scale.json"
    if text is not None:
        file.write_text(text)
    assert main(["compare", str(file)]) == 2
    said = capsys.readouterr().err
    assert str(file) in said
    assert re.search(r"\s+".join(map(re.escape, where.split())), said), said


def test_a_table_that_cannot_be_written_is_refused_and_the_old_one_stays(tmp_path, capsys, monkeypatch):
    path = grid_file(tmp_path, nodes=[1])
    measured(tmp_path, "n1_dp", 999.0, 1)
    (tmp_path / "file").write_text("")
    assert piped(lambda: main(["collect", path, "--out", str(tmp_path / "file" / "out")])) == 2
    assert f"error: {tmp_path}/file/out: Not a directory" in capsys.readouterr().err
    assert main(["collect", path, "--out", str(tmp_path)]) == 0
    before = (tmp_path / "results.csv").read_text()
    measured(tmp_path, "more", 9.0, 1)
    with no_file_beyond(20):
        assert piped(lambda: main(["collect", path, "--out", str(tmp_path)])) == 2
    assert f"error: {tmp_path}/results.csv: File too large" in capsys.readouterr().err
    assert (tmp_path / "results.csv").read_text() == before
    assert not list(tmp_path.glob(".results.csv*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.cms.periods=[]"], "model.cms.periods"),  # divided by their number before
        (["--mfu", "nan"], "--mfu   nan is no share of the peak"),
        (["--mfu", "30"], "--mfu   30 is no share of the peak"),
        (["--tokens", "-1"], "--tokens   -1 is no number of tokens"),
        (["--tokens", "inf"], "--tokens   inf is no number of tokens"),
    ],
)
def test_an_estimate_of_what_cannot_run_is_refused(tmp_path, capsys, words, said):
    assert main(["estimate", config_file(tmp_path), "--profile", "h100", *words]) == 2
    assert said in capsys.readouterr().err


def test_every_ideal_line_stays_in_the_picture():
    """Also that of a series which begins fast, and of one that begins at more devices."""
    points = {"slow": {1: 10.0, 8: 70.0}, "fast": {1: 9000.0, 8: 9500.0}, "late": {4: 20000.0, 8: 21000.0}}
    rows = [
        {"series": name, "devices": devices, "tokens_per_s": speed, "efficiency": 1.0}
        for name, speeds_of in points.items()
        for devices, speed in speeds_of.items()
    ]
    dashed = re.findall(r'points="(\S+),(\S+) (\S+),(\S+)"[^>]*dasharray', plot.scaling(rows, "title"))
    assert len(dashed) == 3
    for x, y, x_end, y_end in (map(float, line) for line in dashed):
        assert plot.LEFT <= x < x_end <= plot.WIDTH - plot.RIGHT
        assert plot.TOP <= y_end < y <= plot.HEIGHT - plot.BOTTOM


def test_estimate_counts_what_the_shapes_say(tmp_path):
    config = load(config_file(tmp_path), [])
    site = profile.load("h100", [])
    whole = estimate.worst_rank(config, config.parallel, 1)
    half = estimate.worst_rank(config, config.parallel, 2)
    assert half.weights == whole.weights
    assert half.optimizer == pytest.approx(whole.optimizer / 2, abs=8)
    rows = sorted(estimate.layouts(config, 2, site), key=lambda row: (row.bubble, row.layout.tensor))
    assert {str(r) for r in rows} == {
        "tensor 1 pipeline 1 (data 2)", "tensor 2 pipeline 1 (data 1)", "tensor 1 pipeline 2 (data 1)"}  # fmt: skip
    assert all(r.fits for r in rows)
    assert [r.bubble for r in rows] == [0, 0, 0.25]  # (2 - 1) / 4 micro-batches
    useful = estimate.useful_seconds(config, 2, site.gpu)
    assert [r.step_s for r in rows] == pytest.approx([
        useful + rows[0].collectives, useful + rows[1].collectives, 1.25 * useful])  # fmt: skip
    assert rows[2].collectives == 0 < rows[1].collectives
    config.parallel.pipeline = 2
    page = estimate.describe(config, 2, site, 1e6, 0.4)
    assert "40.0% of it, as --mfu says" in page
    assert re.search(r"^ +1 +2 +1 .* \*$", page, re.MULTILINE)


def test_estimate_knows_no_speed_of_an_unknown_gpu(tmp_path):
    config = load(config_file(tmp_path), [])
    page = estimate.describe(config, 1, profile.load("h100", ["gpu=Abacus"]), 1e6, 0.4)
    assert "no peak is known for 'Abacus'" in page


NODE = {"node": "n0", "skew_s": 0.0, "versions": "torch 2", "code": "abc", "run_gb": 99, "local_gb": 9, "local": "/tmp"}
WANTED = {"skew_s": 2, "free_gb": 10, "local_gb": 1, "bandwidth_gb_s": 20, "gpus": 8, "gpu_memory_gb": 79.1}


def links(node: int, **more) -> dict:
    ring = [("n0", "n1"), ("n1", "n2"), ("n2", "n3"), ("n3", "n0")]
    pairs = [{"nodes": list(pair), "gb_s": 30.0, "wrong": False} for pair in ring]
    mine = [p for p in pairs if f"n{node}" in p["nodes"]]
    inside = {"wrong": False, "gb_s": 200.0}
    facts = {"rank": node, "node": f"n{node}", "devices": 8, "memory_gb": 79.1, "inside": inside, "pairs": mine}
    return facts | more


def judged(change_node: dict | None = None, change_link: dict | None = None, slow: tuple[str, ...] = ()) -> dict:
    nodes = [NODE | {"node": f"n{n}"} for n in range(4)]
    found = [links(n) for n in range(4)]
    nodes[2] |= change_node or {}
    found[2] |= change_link or {}
    for each in found:
        for pair in each["pairs"]:
            pair["gb_s"] = 5.0 if set(pair["nodes"]) & set(slow) else pair["gb_s"]
    return preflight.judge(nodes, found, 4, 4, WANTED)


def test_a_sound_cluster_has_no_bad_nodes():
    assert judged() == {}


@pytest.mark.parametrize(
    ("node", "link", "why"),
    [
        ({"versions": "torch 1"}, None, "other versions than most: torch 1, not torch 2"),
        ({"code": "xyz"}, None, "other code than most"),
        ({"skew_s": -7.25}, None, "its clock is -7.2 s off"),
        ({"skew_s": None}, None, "could not reach the first node"),
        ({"local_gb": 0.5}, None, "0.50 GB free in /tmp, less than 1"),
        (None, {"devices": 7}, "shows 7 GPUs, not 8"),
        (None, {"memory_gb": 40.0}, "a GPU with 40.0 GiB, not 79.1"),
        (None, {"inside": {"wrong": True, "gb_s": 200.0}}, "an all-reduce inside the node gave a wrong sum"),
        (None, {"inside": {"wrong": False, "gb_s": 3.0}}, "3.0 GB/s inside the node, less than 20"),
    ],
)
def test_a_bad_node_is_named_with_its_reason(node, link, why):
    found = judged(node, link)
    assert list(found) == ["n2"]
    assert why in found["n2"]


def test_a_slow_node_is_told_from_its_partners():
    found = judged(slow=("n3",))
    assert list(found) == ["n3"]
    assert "5.0 GB/s between n2 and n3" in found["n3"]


def test_every_node_meets_two_others():
    for nodes in (3, 4, 5, 8):
        rounds = partners(nodes)
        met = [n for pairs in rounds for pair in pairs for n in pair]
        assert all(len(set(sum(pairs, ()))) == 2 * len(pairs) for pairs in rounds)
        assert set(met) == set(range(nodes))
        assert min(met.count(n) for n in range(nodes)) >= (2 if nodes % 2 == 0 else 1)
    assert partners(2) == [[(0, 1)]]
    assert partners(1) == [[]]


def test_slow_ranks_are_found_and_removed_from_the_record():
    record = {"loss": 1.0, **{f"busy {rank} n{rank}": 0.1 for rank in range(4)}, "busy 4 n4": 0.131}
    timer = BusyTimer(0, torch.device("cpu"))
    assert timer.take_slow(dict(record), 1.2) == []  # once is chance
    assert timer.take_slow(dict(record), 1.2) == [
        {"rank": 4, "node": "n4", "times_median": pytest.approx(1.31), "busy_s": 0.131}]  # fmt: skip
    assert timer.take_slow(dict(record), 1.4) == []
    assert timer.take_slow(dict(record), 1.2) == []  # not twice in a row
    assert timer.take_slow(record, 0) == []
    assert record == {"loss": 1.0}


def test_a_busy_timer_reports_the_median_of_its_spans_once():
    timer = BusyTimer(3, torch.device("cpu"))
    assert timer.entry() == {}
    for seconds in (0.01, 0.05, 0.01):
        timer.begin()
        time.sleep(seconds)
        timer.end()
    [(key, median)] = timer.entry().items()
    assert key.startswith("busy 3 ")
    assert 0.01 <= median < 0.05
    assert timer.entry() == {}


def test_status_reads_a_run_that_never_started(tmp_path):
    run = tmp_path / "runs" / "a"
    write_json(run / "launch" / "job.json", {})
    shown = status_table(find_runs([str(tmp_path / "runs")])).splitlines()
    assert shown[0].split()[:3] == ["run", "job", "state"]
    assert shown[1].split()[:2] == ["a", "local"]


def test_runs_that_launch_did_not_start_are_shown_too(tmp_path, capsys):
    """`make train` leaves numbers but no launch folder; of a run under `local` the folder is there before a number."""
    run = tmp_path / "runs" / "quickstart"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(Path(config_file(tmp_path)).read_text())
    lines = [{"step": step, "loss": 4.0 - step, "tokens_per_s": 99.0} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["status", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:5] == ["quickstart", "-", "-", "3/8", "99.0"]
    assert main(["logs", str(run), "--lines", "2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "no log: this run printed to its terminal" in shown[0]
    assert [line.split()[:2] for line in shown[1:]] == [["step", "2/8"], ["step", "3/8"]]


def test_no_run_is_an_error_not_an_empty_table(tmp_path, capsys):
    assert main(["status", str(tmp_path / "rusn")]) == 2
    assert "no run in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "row"),
    [
        (["train.seq_len=4096"], "hope matrix, 345M parameters, sequence 4096, one H100: 42,313 tokens/s, 9.2%"),
        (["model.pattern=[attention]"], "attention, 334M parameters, sequence 4096, one H100: 90,746 tokens/s, 23.9%"),
        (["train.cuda_graphs=true"], "hope matrix, 345M parameters, sequence 4096, one H100: 93,697 tokens/s, 20.4%"),
        (["model.mixers.hope.memory=mlp"], "hope mlp, 332M"),  # none was measured without graphs
        (
            ["train.cuda_graphs=true", "model.mixers.hope.memory=mlp"],
            "hope mlp, 332M parameters, sequence 4096, one H100: 41,757 tokens/s, 10.4%",
        ),
        (["model.pattern=[hope, attention]"], "hope matrix, 345M"),  # the slow one decides
    ],
)
def test_an_estimate_rests_on_the_nearest_measurement(overrides, row):
    config = load("configs/hope_340m.yaml", overrides, check=False)
    assert str(speeds.nearest(config, 340_000_000)).startswith(row)


def test_measured_utilisations_are_what_tokens_and_flops_say():
    before = ["model.mixers.hope.static=learned", "model.mixers.hope.output_gate=silu"]  # defaults when it was measured
    config = load("configs/hope_340m.yaml", before, check=False)
    row = estimate.measured(config)
    seconds = estimate.useful_seconds(config, 1, "NVIDIA H100 80GB HBM3", row.mfu)
    assert config.train.tokens_per_step / seconds == pytest.approx(row.tokens_per_s, rel=0.01)


def test_estimate_says_what_it_does_and_what_it_rests_on(tmp_path, capsys):
    words = [config_file(tmp_path), "--profile", "h100", "site.gpus_per_node=2"]
    assert main(["estimate", *words]) == 0
    printed = capsys.readouterr()
    assert "memory of layout 1 of" in printed.err
    assert "as measured: hope matrix, 17M parameters" in printed.out
    assert main(["estimate", *words, "--mfu", "0.5"]) == 0
    assert "50.0% of it, as --mfu says" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["launch", "parallel.checkpoint"])
def test_a_reader_that_stops_is_no_error(module, tmp_path):
    """`... | head -1`: the pipe is closed before anything is written."""
    saved = tmp_path / "runs" / "a" / "checkpoints" / "step_00000004"
    saved.mkdir(parents=True)
    Manifest(4, {}, {}, {"config": {}}, {}, {}).write(saved)
    write_json(tmp_path / "runs" / "a" / "launch" / "job.json", {})
    does = ["status", str(tmp_path / "runs")] if module == "launch" else ["verify", str(saved)]
    reads, writes = os.pipe()
    os.close(reads)
    words = [sys.executable, "-m", module, *does]
    done = subprocess.run(words, stdout=writes, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")
