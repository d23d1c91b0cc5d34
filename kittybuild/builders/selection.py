"""Exact selection of the largest magnitudes over blocks: in memory, by a bracket from a sample, or digit by digit."""

from __future__ import annotations

from collections.abc import Sequence

from kittybuild.builders.bracket import bracketed
from kittybuild.builders.digits import by_digits
from kittybuild.builders.threshold import EVERYTHING, NOTHING, Part, Scan, Threshold

IN_MEMORY = 1 << 22


def largest(
    scan: Scan,
    numel: int,
    counts: Sequence[int],
    *,
    of: Sequence[int] | None = None,
    part: Part | None = None,
    double: bool = False,
    in_memory: int = IN_MEMORY,
) -> list[Threshold]:
    """For each count, the threshold that keeps exactly so many of the largest magnitudes of an input.

    `of`: the input of each count, else each is of the next input. `part`: with it one pass is mostly enough. `double`:
    magnitudes are float64 instead of float32. `in_memory`: elements of one input that may be held at once.
    """
    of = range(len(counts)) if of is None else of
    wanted = {n: (of[n], count) for n, count in enumerate(counts) if 0 < count < numel}
    found = bracketed(scan, part, numel, wanted, in_memory) if part and numel > in_memory // 2 else {}
    found |= by_digits(scan, numel, {n: wanted[n] for n in wanted if n not in found}, double, in_memory)
    return [found.get(n, EVERYTHING if count else NOTHING) for n, count in enumerate(counts)]
