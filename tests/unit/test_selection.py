"""Selection keeps exactly as many of the largest magnitudes as asked, among equals the first, on every path."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kittybuild.builders.base import BLOCK
from kittybuild.builders.selection import largest
from kittybuild.builders.threshold import EVERYTHING, NOTHING, Threshold, kept
from tests.jobs import bits, drawn

# In memory at once; some elements at a time; never more than one, so that every digit is counted.
PATHS = (1 << 22, 40, 1)
SPECIAL = (0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3e38, float("inf"), -float("inf"), float("nan"), -float("nan"))


class Counted:
    """Scans that reuse one buffer, as the executor's blocks do, and are counted, as is what is looked up."""

    def __init__(self, deltas: list[Tensor], size: int) -> None:
        self.deltas, self.size, self.passes, self.looked_up = deltas, size, 0, 0

    def __call__(self, which: Collection[int]) -> Iterator[tuple[int, dict[int, np.ndarray]]]:
        self.passes += 1
        buffers = {i: torch.empty(self.size, dtype=self.deltas[i].dtype).numpy() for i in which}
        for start in range(0, len(self.deltas[0]), self.size):
            parts = {i: self.deltas[i][start : start + self.size].numpy() for i in which}
            yield start, {i: np.abs(part, out=buffers[i][: len(part)]) for i, part in parts.items()}

    def part(self, which: Collection[int], start: int, count: int) -> dict[int, np.ndarray]:
        assert start >= 0
        assert 0 < count <= min(BLOCK, len(self.deltas[0]) - start)
        self.looked_up += count * len(which)
        return {i: abs(self.deltas[i][start : start + count].numpy()) for i in which}


def by_sorting(delta: Tensor, count: int) -> Tensor:
    """The largest magnitudes by a stable sort of all; the others zero."""
    width = np.int64 if delta.dtype == torch.float64 else np.int32
    magnitudes = delta.abs().numpy().view(width)
    keep = np.sort(np.argsort(-magnitudes, kind="stable")[:count])
    result = torch.zeros_like(delta)
    result[keep] = delta[keep]
    return result


def trimmed(delta: Tensor, threshold: Threshold, size: int) -> Tensor:
    parts = [threshold.trim(part.clone().numpy(), i * size) for i, part in enumerate(delta.split(size))]
    return torch.from_numpy(np.concatenate(parts))


def assert_selects(
    deltas: list[Tensor],
    counts: list[int],
    *,
    size: int = 7,
    in_memory: int = 1 << 22,
    of: list[int] | None = None,
    parts: bool = False,
) -> int:
    """Selection equals the reference for each count; the number of passes it took. `parts`: it may look elements up."""
    scan, double = Counted(deltas, size), deltas[0].dtype == torch.float64
    part = scan.part if parts else None
    thresholds = largest(scan, len(deltas[0]), counts, of=of, part=part, double=double, in_memory=in_memory)
    for index, count, threshold in zip(of or range(len(counts)), counts, thresholds, strict=True):
        delta = deltas[index]
        expected = by_sorting(delta, count)
        for cut in (size, len(delta) or 1):
            assert bits(trimmed(delta, threshold, cut)) == bits(expected), (delta, count, threshold)
    assert scan.looked_up <= len(counts) * (len(deltas[0]) // 8 + 128 + 2 * size)  # of each, a sample and one block
    return scan.passes


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("in_memory", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 2, 199, 500, 998, 999, 1000])
def test_selection_equals_a_stable_sort(dtype: torch.dtype, count: int, in_memory: int, parts: bool) -> None:
    assert_selects([drawn("normal", 1000, dtype=dtype)], [count], size=192, in_memory=in_memory, parts=parts)


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("in_memory", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("values", [1, 2, 3, 7])
def test_among_equals_the_lowest_index_is_kept(dtype: torch.dtype, values: int, in_memory: int, parts: bool) -> None:
    few = torch.arange(1000).mul(7919).remainder(values).to(dtype) * torch.tensor([1, -1]).repeat(500)
    for count in (1, 142, 143, 333, 334, 999):
        assert_selects([few], [count], size=192, in_memory=in_memory, parts=parts)


@pytest.mark.parametrize("in_memory", PATHS)
@pytest.mark.parametrize("value", SPECIAL)
def test_a_tensor_of_one_value_keeps_its_first_elements(value: float, in_memory: int) -> None:
    for dtype, parts in itertools.product((torch.float32, torch.float64), (False, True)):
        assert_selects([torch.full((100,), value, dtype=dtype)], [37], in_memory=in_memory, parts=parts)


ELEMENTS = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32), st.integers(-3, 3).map(float))


@settings(max_examples=80)
@given(
    st.lists(st.lists(ELEMENTS, min_size=12, max_size=12), min_size=1, max_size=3),
    st.lists(st.integers(0, 12), min_size=3, max_size=3),
    st.booleans(),
    st.sampled_from([5, 12]),
    st.sampled_from([1, 3, 12]),
    st.booleans(),
    st.lists(st.integers(0, 2), min_size=3, max_size=3),
)
@example([[0.0] * 12], [5, 0, 0], False, 4, 1, True, [0, 1, 2])
@example([[float("nan")] * 12, [1.0] * 12], [5, 3, 0], True, 4, 3, True, [0, 1, 2])
@example([[1.0, 2.0, 3.0] * 4], [2, 6, 9], False, 4, 1, False, [0, 0, 0])
def test_every_path_equals_the_sort(
    rows: list[list[float]],
    counts: list[int],
    double: bool,
    size: int,
    in_memory: int,
    parts: bool,
    of: list[int],
) -> None:
    deltas = [torch.tensor(row, dtype=torch.float64 if double else torch.float32) for row in rows]
    of = [index % len(deltas) for index in of]
    assert_selects(deltas, counts, size=size, in_memory=in_memory, of=of, parts=parts)


def test_float64_is_told_apart_below_float32() -> None:
    close = 1.0 + torch.arange(100, dtype=torch.float64).mul(37).remainder(100) * 2.0**-50
    for in_memory in PATHS:
        assert_selects([close], [10], in_memory=in_memory)


def test_small_tensors_take_one_pass_and_large_ones_mostly_two() -> None:
    spread, equal = drawn("passes", 1000), torch.ones(1000)
    assert assert_selects([spread], [100], size=64) == 1
    assert assert_selects([spread], [100], size=64, in_memory=500) == 2
    assert assert_selects([equal], [100], size=64, in_memory=500) == 3
    assert assert_selects([spread, equal], [100, 200], size=64, in_memory=500) == 3
    assert assert_selects([spread, equal], [0, 1000], size=64, in_memory=1) == 0


LONG, ROOM = 40_000, 8_000


def likenesses() -> dict[str, Tensor]:
    """What differences look like: smooth, by rows of other size, and of short dtypes, where a tenth is one value."""
    smooth = drawn("smooth", LONG)
    rows = smooth * torch.arange(1, 41).repeat_interleave(LONG // 40)
    short = ((drawn("base", LONG) + smooth * 0.01).bfloat16() - drawn("base", LONG).bfloat16()).float()
    return {"smooth": smooth, "rows": rows[torch.arange(LONG).mul(7919) % LONG], "short": short}


@pytest.mark.parametrize("likeness", likenesses())
@pytest.mark.parametrize("density", [1e-4, 0.01, 0.3, 0.5, 0.7, 0.99, 0.9999])
def test_a_bracket_takes_one_pass(likeness: str, density: float) -> None:
    delta = likenesses()[likeness]
    count = int(density * LONG)
    assert assert_selects([delta], [count], size=6_000, in_memory=ROOM, parts=True) == 1
    several = [count, count, LONG - count, 0]
    more = [delta, delta.flip(0)]
    assert assert_selects(more, several, size=6_000, in_memory=2 * ROOM, of=[0, 1, 0, 1], parts=True) == 1


def test_equals_at_the_threshold_are_told_apart_in_whatever_block_they_end() -> None:
    delta = (drawn("few", LONG) * 3).round()  # 0, 1, 2 and 3: a bracket's ends
    values, numbers = delta.abs().unique(return_counts=True)
    assert len(values) == 4
    more = int(numbers[2:].sum())
    for count in (
        more + 1,
        more + 2999,
        more + int(numbers[1]) - 1,
        more + int(numbers[1]),
        more + int(numbers[1]) + 1,
    ):
        assert assert_selects([delta], [count], size=3_000, in_memory=ROOM, parts=True) == 1


class Misled(Counted):
    """Who looks elements up before the first pass finds one value."""

    def __init__(self, deltas: list[Tensor], size: int, value: float) -> None:
        super().__init__(deltas, size)
        self.value = value

    def part(self, which: Collection[int], start: int, count: int) -> dict[int, np.ndarray]:
        if self.passes:
            return super().part(which, start, count)
        return {i: np.full(count, self.value, np.float32) for i in which}


@pytest.mark.parametrize("value", [0.0, 1e-3, 1.0, 5.0, float("inf")])
@pytest.mark.parametrize("delta", [drawn("misled", LONG), torch.arange(LONG).remainder(8).clamp(4, 6) - 4.0])
def test_a_sample_that_misleads_costs_passes_and_changes_nothing(value: float, delta: Tensor) -> None:
    misled, plain = Misled([delta], 6_000, value), Counted([delta], 6_000)
    assert largest(misled, LONG, [16_000], part=misled.part, in_memory=ROOM) == largest(plain, LONG, [16_000])
    assert misled.passes > 1 or value in delta.tolist()  # the one value may be the threshold


def test_a_bracket_that_holds_too_many_costs_passes_and_changes_nothing() -> None:
    delta = drawn("crowded", LONG)
    assert assert_selects([delta], [9_000], size=6_000, in_memory=40, parts=True) > 2
    assert assert_selects([delta], [9_000], size=6_000, in_memory=ROOM, parts=True) == 1


def test_what_keeps_all_or_nothing_needs_no_look_and_drops_nan_with_the_rest() -> None:
    delta = torch.tensor(SPECIAL)
    assert largest(Counted([delta, delta], 4), len(delta), [0, len(delta)]) == [NOTHING, EVERYTHING]
    for dtype in (torch.float32, torch.float64):
        assert NOTHING.trim(delta.to(dtype).numpy(), 0).tobytes() == bits(torch.zeros(len(delta), dtype=dtype))
        assert EVERYTHING.trim(delta.to(dtype).numpy(), 10).tobytes() == bits(delta.to(dtype))


def test_infinity_that_is_dropped_is_zero() -> None:
    infinite = torch.full((5,), float("-inf"))
    assert trimmed(infinite, *largest(Counted([infinite], 2), 5, [2]), size=2).tolist() == [-np.inf, -np.inf, 0, 0, 0]


def test_kept_is_mergekits_count() -> None:
    assert kept(10, 0.0) == kept(10, -1.0) == kept(0, 1.0) == 0
    assert kept(10, 0.01) == kept(1, 0.5) == 1
    assert kept(10, 0.29) == 2
    assert kept(10, 1.0) == kept(10, 2.0) == 10
    assert kept(3, 0.9999999999999999) == 2
