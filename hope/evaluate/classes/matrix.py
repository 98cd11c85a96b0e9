"""Accuracy of a model that learns tasks one after another: the matrix R[i, j], what is kept, and a table.

R[i, j] is the accuracy on task j's test examples after task i, with all classes of tasks 1 to i to choose from. Of a
later task nothing can be right: its classes are not among them. The measures are those of `hope.train.continual`, on
error rates 1 - R as its losses; the average is Lopez-Paz and Ranzato's (2017, Section 2) ACC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hope.evaluate.measures import mean
from hope.train.continual import Row, measures

MEASURES = ("seen", "average", "forgetting", "backward_transfer")
"""seen: accuracy on the test examples of all classes seen so far; average: the mean of the tasks' accuracies; the mean
of both others is over the tasks before the last one that was learned, and there is none after the first."""


def accuracies(counts: Sequence[Mapping[str, Sequence[int]]]) -> list[list[float]]:
    """R: a row after each task, of the tasks so far.

    Args:
        counts: after each task, "right" and "items" of every task so far.
    """
    return [[right / items for right, items in zip(row["right"], row["items"], strict=True)] for row in counts]


def summary(counts: Sequence[Mapping[str, Sequence[int]]], tasks: int) -> dict[str, Any]:
    """ "matrix", R; and each of `MEASURES`, a list with its value after each task, None where there is none.

    Args:
        counts: as in `accuracies`.
        tasks: how many there are, learned or not.
    """
    matrix = accuracies(counts)
    names = [str(number) for number in range(1, tasks + 1)]
    rows: list[Row | None] = [None, *(_errors(row, names) for row in matrix)]
    found: dict[str, Any] = {"matrix": matrix, **{name: [] for name in MEASURES}}
    for number, (row, count) in enumerate(zip(matrix, counts, strict=True), 1):
        kept = measures(names, rows[: number + 1], _errors(row, names), number - 1)
        found["seen"].append(sum(count["right"]) / sum(count["items"]))
        found["average"].append(sum(row) / len(row))
        for name in ("forgetting", "backward_transfer"):
            found[name].append(kept.get(f"continual.{name}"))
    return found


def _errors(row: Sequence[float], names: Sequence[str]) -> dict[str, float]:
    return {name: 1 - row[number] if number < len(row) else 1.0 for number, name in enumerate(names)}


def table(runs: Sequence[tuple[int, dict[str, Any]]], classes: Sequence[int]) -> str:
    """For people: of every seed a line after each task, and the mean over the seeds after the last.

    Args:
        runs: seed and summary.
        classes: seen after each task.
    """
    tasks = len(classes)
    lines = [("seed", "after", "classes", *MEASURES, *(f"task {number}" for number in range(1, tasks + 1)))]
    for seed, run in runs:
        for index, row in enumerate(run["matrix"]):
            cells = [run[name][index] for name in MEASURES] + row + [None] * (tasks - len(row))
            lines.append((str(seed), str(index + 1), str(classes[index]), *map(_cell, cells)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    shown = ["  ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*shown, *_means([run for _, run in runs], tasks)])


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _means(runs: Sequence[dict[str, Any]], tasks: int) -> list[str]:
    found = []
    for name in MEASURES:
        values = [run[name][tasks - 1] for run in runs]
        if values and None not in values:
            measure = mean(values)
            error = "" if measure.error is None else f", standard error over {len(values)} seeds {measure.error:.4f}"
            found.append(f"{name} after the last task: {measure.value:.4f}{error}")
    return found
