"""After the fuzz tests: how many inputs were tried, and how they were answered."""

from collections import Counter
from collections.abc import Iterator

import pytest

from tests.fuzz.answers import counts

KINDS = ("answered", "one line")


@pytest.fixture(autouse=True)
def counted(record_property) -> Iterator[None]:
    """Hand a test's counts to whoever runs it, which may be another process."""
    counts.clear()
    yield
    for kind, number in counts.items():
        record_property(kind, number)


def pytest_terminal_summary(terminalreporter) -> None:
    by_file: dict[str, Counter[str]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "teardown":
                numbers = {kind: number for kind, number in report.user_properties if kind in KINDS}
                by_file.setdefault(report.location[0], Counter()).update(numbers)
    terminalreporter.section("inputs tried")
    for file, numbers in sorted(by_file.items()):
        if total := numbers.total():
            told = ", ".join(f"{numbers[kind]} {kind}" for kind in KINDS)
            terminalreporter.write_line(f"{file}: {total} inputs, {told}")
