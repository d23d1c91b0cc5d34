"""Whole processes side by side, A B A B ...: wall seconds and peak resident memory, as the system counts them.

Memory is that of a process with its descendants; what they share counts once (Linux; elsewhere: the largest process).
"""

from __future__ import annotations

import compileall
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import kittybuild

EVERY = 0.1
"""Seconds between two looks at the memory."""


@dataclass(frozen=True)
class Run:
    """One finished process with its descendants: wall seconds, CPU seconds, peak resident bytes."""

    wall: float
    cpu: float
    peak: int


def run(command: Sequence[str], env: Mapping[str, str] | None = None) -> Run:
    """Run a command to its end; raises RuntimeError with its output if it fails."""
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}
    )
    assert process.stdout is not None
    with _Watched(process.pid) as watched:
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{output.decode(errors='replace')[-4000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    peak = max(watched.peak, usage.ru_maxrss * unit)
    return Run(wall, usage.ru_utime + usage.ru_stime, peak)


class _Watched:
    """Looks at the memory of a process and its descendants now and then, while it is entered."""

    def __init__(self, pid: int) -> None:
        self.pid, self.peak = pid, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._over.wait(EVERY):
            family = [self.pid, *_descendants(self.pid)]
            if len(family) > 1:  # the system itself keeps the peak of one
                self.peak = max(self.peak, sum(map(_proportional, family)))

    def __enter__(self) -> _Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def _descendants(pid: int) -> list[int]:
    """The processes that descend from one, where the system tells."""
    found: list[int] = []
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError), open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as children:
                for child in map(int, children.read().split()):
                    found += [child, *_descendants(child)]
    return found


def _proportional(pid: int) -> int:
    """The resident bytes of a process, of what several share only its part."""
    with suppress(OSError), open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def warm(folders: Sequence[str]) -> None:
    """Read all files in these folders, so that the system has them in memory and no command pays for another's."""
    for folder in folders:
        for entry in os.scandir(folder):
            with open(entry, "rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


def compiled() -> None:
    """Compile kittybuild's modules, as pip does with those that it installs, but not with those of a checkout."""
    compileall.compile_dir(os.path.dirname(kittybuild.__file__), quiet=1)


def in_turn(commands: Mapping[str, Callable[[], Run]], rounds: int, models: Sequence[str]) -> dict[str, list[Run]]:
    """Each command once a round, in order, so that a drifting machine slows all alike; all read warm `models`."""
    compiled()
    results: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, command in commands.items():
            os.sync()  # nobody waits for what the one before left to be written
            warm(models)
            results[name].append(command())
            last = results[name][-1]
            print(f"round {number + 1}: {name}: {last.wall:.1f} s, {last.peak / 1e6:.0f} MB", file=sys.stderr)
    return results


def table(results: Mapping[str, Sequence[Run]], reference: str) -> str:
    """Medians as a Markdown table, with how many times faster each is than `reference`."""
    base = statistics.median(run.wall for run in results[reference])
    lines = ["| command | wall s | CPU s | peak MB | times faster |", "|---|---|---|---|---|"]
    for name, runs in results.items():
        wall = statistics.median(run.wall for run in runs)
        cpu, peak = statistics.median(run.cpu for run in runs), statistics.median(run.peak for run in runs)
        lines.append(f"| {name} | {wall:.2f} | {cpu:.2f} | {peak / 1e6:.0f} | {base / wall:.2f} |")
    return "\n".join(lines)
