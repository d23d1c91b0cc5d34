"""Whole processes side by side, A B A B ...: wall seconds and peak resident memory, as the system counts them."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """One finished process: wall seconds, CPU seconds, peak resident bytes."""

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
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{output.decode(errors='replace')[-4000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def in_turn(commands: Mapping[str, Callable[[], Run]], rounds: int) -> dict[str, list[Run]]:
    """Each command once a round, in order, so that a drifting machine slows all alike."""
    results: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, command in commands.items():
            os.sync()  # nobody waits for what the one before left to be written
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
