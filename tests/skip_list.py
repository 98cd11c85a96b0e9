"""A session fails if it skips a test that `skips.txt` does not name: a skip that nobody looks at is no test."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Allowed(NamedTuple):
    """Shell patterns, which must match the whole of a test's id and of the reason that it gives."""

    test: str
    reason: str

    def covers(self, test: str, reason: str) -> bool:
        return fnmatchcase(test, self.test) and fnmatchcase(reason, self.reason)


def read(path: Path) -> list[Allowed]:
    """Lines `id pattern | reason pattern`; empty lines and `#` at the beginning are for people.

    Raises:
        ValueError: a line of another form.
    """
    found = []
    for line in path.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            test, bar, reason = (part.strip() for part in line.partition("|"))
            if not (test and bar and reason):
                raise ValueError(f"{path}: expected `id pattern | reason pattern`, found {line!r}")
            found.append(Allowed(test, reason))
    return found


class SkipList:
    """A pytest plugin. An expected failure counts as a skip, with its reason."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.allowed = read(path)
        self.unlisted: list[tuple[str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._look(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Modules that skip themselves."""
        self._look(report)

    def _look(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped:
            reason = _reason(report)
            if not any(entry.covers(report.nodeid, reason) for entry in self.allowed):
                self.unlisted.append((report.nodeid, reason))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Of a worker of pytest-xdist, which tells the session about tests, but not about modules that skip
        themselves."""
        told = [tuple(found) for found in getattr(node, "workeroutput", {}).get("unlisted", [])]
        self.unlisted += [found for found in told if found not in self.unlisted]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):  # a worker: the session that started it has the last word
            session.config.workeroutput["unlisted"] = self.unlisted
        elif self.unlisted and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.unlisted:
            terminalreporter.section(f"skipped, but not in {self.path.name}", red=True)
            for test, reason in self.unlisted:
                terminalreporter.line(f"UNLISTED SKIP {test}: {reason}", red=True)


def _reason(report: Any) -> str:
    """`report.longrepr` of a skip is (path, line, "Skipped: reason")."""
    if hasattr(report, "wasxfail"):
        return f"xfail: {report.wasxfail}"
    where = report.longrepr
    text = where[2] if isinstance(where, tuple) else str(where)
    return text.removeprefix("Skipped: ")
