"""Every skip is printed with its reason, and one that is not on the committed list fails the run."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest

ALLOWED = Path(__file__).with_name("allowed_skips.txt")


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Returns the reason of a skipped report."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def unlisted(skips: list[tuple[str, str]], allowed: list[str]) -> list[tuple[str, str]]:
    """Returns the skips (test, reason) that no line of the list matches; a line is `test pattern | reason pattern`."""
    patterns = [tuple(part.strip() for part in line.split("|", 1)) for line in allowed]
    return [
        (test, reason)
        for test, reason in skips
        if not any(fnmatch.fnmatch(test, p[0]) and fnmatch.fnmatch(reason, p[1]) for p in patterns)
    ]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.stats.get("skipped", [])
    skips = [(report.nodeid, reason_of(report)) for report in reports]
    for test, reason in skips:
        terminalreporter.write_line(f"skipped {test}: {reason}")
    lines = ALLOWED.read_text().splitlines()
    bad = unlisted(skips, [line for line in lines if line.strip() and not line.startswith("#")])
    if bad:
        terminalreporter.section("skipped without being on tests/allowed_skips.txt")
        for test, reason in bad:
            terminalreporter.write_line(f"{test}: {reason}")
        terminalreporter._session.exitstatus = pytest.ExitCode.TESTS_FAILED
