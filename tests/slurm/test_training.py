"""The real pretrain_hope.py on two virtual nodes with two tasks each, tensor 2 x data 2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import LAYOUT
from multirank import run_ranks
from tiny import config_file

import pretrain_hope
from launch.runs import records
from launch.status import row, status_table

pytestmark = pytest.mark.slurm


def losses(folder: Path) -> list[tuple]:
    return [(r["step"], r["loss"], r["grad_norm"], r.get("heldout_loss")) for r in records(folder)]


def run(path: str, *overrides: str) -> int:
    torch.set_num_threads(1)
    return pretrain_hope.main([path, *overrides])


def test_usr1_in_a_real_run_resumes_bit_equal(real, tmp_path):
    """Interrupted on SLURM, and not interrupted in four processes of this one: the same numbers to the last bit."""
    assert run_ranks(run, 4, config_file(tmp_path), *LAYOUT, timeout=120) == [0, 0, 0, 0]
    whole, job = losses(tmp_path / "runs" / "tiny"), real
    job.wait("COMPLETED", seconds=240)
    assert job.words() == ["requeue", "done"]
    assert job.verdicts()[0]["cause"] == "saved on signal USR1"
    happened = [
        (e["event"], e["step"] if "step" in e else e.get("agreed_step")) for e in records(job.run.root, "events.jsonl")
    ]
    step = job.verdicts()[0]["step"]
    assert ("SIGNAL", step) in happened
    assert ("RESUME", step) in happened
    codes = {e["code"] for e in job.exits(f"{job.job}.0")}
    assert codes == {85}
    assert len(whole) == 31
    assert losses(job.run.root) == whole
    cells = row(job.run)
    assert (cells["step"], cells["starts"], cells["verdict"]) == ("30/30", "2", "done: every rank finished")
    assert "real" in status_table([job.run])
