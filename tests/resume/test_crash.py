"""A short version of `make crash-test`."""

from pathlib import Path

import crash


def test_killed_runs_resume_where_they_were_durable_and_end_bit_equal(tmp_path: Path) -> None:
    tally = crash.rounds(tmp_path, 4, seed=1)
    assert tally.kills == 4
    assert (tally.in_save, tally.of_all) == (2, 2)
    assert tally.resumed >= 2
    assert tally.finished >= 1
