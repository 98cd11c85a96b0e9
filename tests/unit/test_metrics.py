import json
import math
import mmap

import pytest
import torch

from hope.train.console import console_line, duration, event_line, short
from hope.train.metrics import MetricsLog, NoLog, open_log
from hope.train.throughput import GIB, Devices, StepTimer, memory_gb, mfu, peak_flops

GPUS = Devices(count=8, kind="gpu", memory_gb=139.8, peak_flops=989e12)
RECORD = {
    "step": 1200,
    "tokens": 1_258_291_200,
    "loss": 2.81412,
    "grad_norm": 0.4098,
    "lr": 3e-4,
    "step_time_s": 2.54,
    "data_time_s": 0.0076,
    "tokens_per_s": 412_300.0,
    "tokens_per_s_per_device": 51_537.5,
    "mfu": 0.382,
    "memory_gb": 61.2,
    "eta_s": 39_720,
}
LINE = (
    "step   1200/60000  2.0%  loss 2.8141  gnorm 0.41  lr 3.0e-04  412.3k tok/s  51.5k/gpu  mfu 38.2%  "
    "mem 61.2G(44%)  data 0.3%  eta 11h02"
)


def test_console_line_is_the_one_promised():
    assert console_line(RECORD, steps=60_000, devices=GPUS) == LINE


def test_heldout_loss_is_appended():
    assert console_line({**RECORD, "heldout_loss": 2.9}, steps=60_000, devices=GPUS) == LINE + "  heldout 2.9000"


def test_console_line_on_cpu():
    record = {**RECORD, "step": 7, "mfu": None, "memory_gb": 1.23, "grad_norm": math.nan, "loss": math.inf}
    line = console_line(record, steps=240, devices=Devices(count=2, kind="cpu"))
    assert line == (
        "step      7/240  2.9%  loss inf  gnorm nan  lr 3.0e-04  412.3k tok/s  51.5k/cpu  mfu n/a  mem 1.2G  "
        "data 0.3%  eta 11h02"
    )


def test_an_evaluation_alone_prints_what_it_has():
    line = console_line({"step": 0, "heldout_loss": 9.01}, steps=240, devices=GPUS)
    assert line.startswith("step      0/240  0.0%  loss n/a  gnorm n/a  lr n/a  n/a tok/s")
    assert line.endswith("eta n/a  heldout 9.0100")


@pytest.mark.parametrize(
    ("value", "text"), [(812.4, "812.4"), (999_949, "999.9k"), (999_960, "1.0M"), (1.234e9, "1.2G"), (0, "0.0")]
)
def test_short_numbers(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(45, "45s"), (59.7, "1m00"), (750, "12m30"), (3599.6, "1h00"), (86_400 * 3 + 4 * 3600, "3d04h"), (None, "n/a")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_event_lines():
    line = event_line("SAVE", step=1200, blocking_s=0.6, total_s=21.04, bytes=int(31.4 * GIB))
    assert line == "SAVE step=1200 blocking=0.6s total=21.0s bytes=31.4G"
    line = event_line("SKIP", step=1207, reason="nonfinite_grad", rank=13, norm=math.nan, note="two words")
    assert line == "SKIP step=1207 reason=nonfinite_grad rank=13 norm=nan note='two words'"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def timed_step(timer, clock, data, rest):
    timer.begin()
    clock.now += data
    timer.got_data()
    clock.now += rest
    timer.end()


def test_step_timer_reports_means_since_the_last_report():
    clock = Clock()
    timer = StepTimer(1000, Devices(count=4), window=2, clock=clock)
    assert timer.eta_s(10) is None
    timed_step(timer, clock, 1.0, 3.0)
    clock.now += 500  # an evaluation
    timed_step(timer, clock, 0.0, 1.0)
    assert timer.report() == pytest.approx(
        {"step_time_s": 2.5, "data_time_s": 0.5, "tokens_per_s": 400.0, "tokens_per_s_per_device": 100.0}
    )
    timed_step(timer, clock, 0.5, 0.5)
    assert timer.report()["step_time_s"] == 1.0
    assert timer.eta_s(10) == 10.0, "the 4 s step has left the window of 2"


def test_step_timer_misuse_is_an_error():
    timer = StepTimer(1000, GPUS)
    with pytest.raises(RuntimeError, match="begin"):
        timer.end()
    with pytest.raises(RuntimeError, match="no step"):
        timer.report()


def test_mfu_is_a_share_of_all_devices():
    assert mfu(1e6, 989e6, Devices(count=8, peak_flops=989e12)) == pytest.approx(0.125)
    assert mfu(1e6, 989e6, Devices(count=8)) is None


def test_peak_flops_is_known_by_name_or_not_at_all():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") is None, "a slower card than the SXM one"
    assert peak_flops("NVIDIA H200 NVL") is None, "slower too, and its name contains the other"


def test_resident_memory_grows_with_an_allocation():
    """Pages straight from the kernel: a tensor may lie in pages that the allocator kept, and then nothing grows."""
    before = memory_gb(torch.device("cpu"))
    with mmap.mmap(-1, 64 * 2**20) as block:
        block[:: mmap.PAGESIZE] = b"\1" * (len(block) // mmap.PAGESIZE)
        grown = memory_gb(torch.device("cpu")) - before
    assert 0.9 * 64 / 1024 < grown < 2 * 64 / 1024


def make_log(folder, said, **options):
    return MetricsLog(folder, steps=100, devices=GPUS, say=said.append, **{"tensorboard": False, **options})


def steps_in(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_record_is_on_disk_at_once_and_valid_json(tmp_path):
    said = []
    with make_log(tmp_path, said) as log:
        log.scalars({"step": 1, "loss": torch.tensor(2.5), "grad_norm": math.nan, "levels": [1.0, math.inf]})
        text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": 2.5,
        "grad_norm": None,
        "levels": [1.0, None],
    }
    assert "loss 2.5000  gnorm nan" in said[0]


def test_resume_keeps_every_step_once(tmp_path):
    with make_log(tmp_path, []) as log:
        for step in (0, 10, 20, 30):
            log.scalars({"step": step, "loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "lo')  # the process died here
    with make_log(tmp_path, [], resume_step=20) as log:
        assert steps_in(tmp_path) == [0, 10, 20]
        log.scalars({"step": 30, "loss": 0.9})
    assert steps_in(tmp_path) == [0, 10, 20, 30]
    assert [entry.name for entry in tmp_path.iterdir() if "tmp" in entry.name] == []


def test_a_last_line_without_its_end_does_not_swallow_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}')
    with make_log(tmp_path, [], resume_step=20) as log:
        log.scalars({"step": 20})
    assert steps_in(tmp_path) == [10, 20]


def test_a_step_cannot_be_written_twice(tmp_path):
    with make_log(tmp_path, []) as log:
        log.scalars({"step": 10})
        with pytest.raises(ValueError, match="step 10 after step 10"):
            log.scalars({"step": 10})
    with make_log(tmp_path, [], resume_step=10) as log, pytest.raises(ValueError, match="step 10 after step 10"):
        log.scalars({"step": 10})


def test_a_new_run_in_an_old_folder_loses_nothing(tmp_path):
    for loss in (1.0, 2.0, 3.0):
        with make_log(tmp_path, []) as log:
            log.scalars({"step": 0, "loss": loss})
    names = ("metrics.jsonl.1", "metrics.jsonl.2", "metrics.jsonl")
    assert [json.loads((tmp_path / name).read_text())["loss"] for name in names] == [1.0, 2.0, 3.0]


def test_events_are_history_over_restarts(tmp_path):
    said = []
    with make_log(tmp_path, said) as log:
        log.event("SAVE", step=10, bytes=2048, norm=math.inf)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": 1')
    with make_log(tmp_path, said, resume_step=5) as log:
        log.event("RESUME", step=5)
        log.say("a banner")
    entries = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(entry["event"], entry["step"]) for entry in entries] == [("SAVE", 10), ("RESUME", 5)]
    assert entries[0]["bytes"] == 2048
    assert entries[0]["norm"] is None
    assert entries[0]["time"] > 1e9
    assert said == ["SAVE step=10 bytes=2.0K norm=inf", "RESUME step=5", "a banner"]


def test_tensorboard_shows_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with make_log(tmp_path, [], tensorboard=True) as log:
        log.scalars({"step": 10, "loss": 2.5, "mfu": None, "grad_norm": math.nan})
        log.histogram("eta", torch.tensor([0.1, 0.2, math.nan]), 10)
        log.histogram("nothing", torch.tensor([math.nan]), 10)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(10, 2.5)]
    assert board.Tags()["histograms"] == ["eta"]
    assert board.Histograms("eta")[0].histogram_value.num == 2


def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed, steps, loss in ((None, (10, 20, 30), 1.0), (20, (30,), 2.0)):
        with make_log(tmp_path, [], tensorboard=True, resume_step=resumed) as log:
            for step in steps:
                log.scalars({"step": step, "loss": loss})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(10, 1.0), (20, 1.0), (30, 2.0)]


def test_processes_that_keep_no_log_write_nothing(tmp_path, capsys):
    with open_log(False, tmp_path / "run", steps=100, devices=GPUS) as log:
        log.scalars({"step": 1})
        log.histogram("eta", torch.ones(2), 1)
        log.event("SAVE", step=1)
        log.say("hello")
    assert type(log) is NoLog
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""
    with open_log(True, tmp_path / "run", steps=100, devices=GPUS, tensorboard=False) as log:
        log.say("hello")
    assert capsys.readouterr().out == "hello\n"
