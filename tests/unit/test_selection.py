"""Selection keeps exactly as many of the largest magnitudes as asked, among equals the first, on every path."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kittybuild.builders.selection import EVERYTHING, NOTHING, Threshold, kept, largest
from tests.jobs import bits, drawn

# In memory at once; some elements at a time; never more than one, so that every digit is counted.
PATHS = (1 << 22, 40, 1)
SPECIAL = (0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3e38, float("inf"), -float("inf"), float("nan"), -float("nan"))


class Counted:
    """Scans that reuse one buffer, as the executor's blocks do, and are counted."""

    def __init__(self, deltas: list[Tensor], size: int) -> None:
        self.deltas, self.size, self.passes = deltas, size, 0

    def __call__(self, which: Collection[int]) -> Iterator[tuple[int, dict[int, Tensor]]]:
        self.passes += 1
        buffers = {i: torch.empty(self.size, dtype=self.deltas[i].dtype) for i in which}
        for start in range(0, len(self.deltas[0]), self.size):
            parts = {i: self.deltas[i][start : start + self.size] for i in which}
            yield start, {i: buffers[i][: len(part)].copy_(part).abs_() for i, part in parts.items()}


def by_sorting(delta: Tensor, count: int) -> Tensor:
    """The largest magnitudes by a stable sort of all; the others zero."""
    width = np.int64 if delta.dtype == torch.float64 else np.int32
    magnitudes = delta.abs().numpy().view(width)
    keep = np.sort(np.argsort(-magnitudes, kind="stable")[:count])
    result = torch.zeros_like(delta)
    result[keep] = delta[keep]
    return result


def trimmed(delta: Tensor, threshold: Threshold, size: int) -> Tensor:
    parts = [threshold.trim(part.clone(), i * size) for i, part in enumerate(delta.split(size))]
    return torch.cat(parts)


def assert_selects(deltas: list[Tensor], counts: list[int], *, size: int = 7, in_memory: int = 1 << 22) -> int:
    """Selection equals the reference for each input; the number of passes it took."""
    scan, double = Counted(deltas, size), deltas[0].dtype == torch.float64
    thresholds = largest(scan, len(deltas[0]), counts, double=double, in_memory=in_memory)
    for delta, count, threshold in zip(deltas, counts, thresholds, strict=True):
        expected = by_sorting(delta, count)
        for cut in (size, len(delta) or 1):
            assert bits(trimmed(delta, threshold, cut)) == bits(expected), (delta, count, threshold)
    return scan.passes


@pytest.mark.parametrize("in_memory", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 2, 199, 500, 998, 999, 1000])
def test_selection_equals_a_stable_sort(dtype: torch.dtype, count: int, in_memory: int) -> None:
    assert_selects([drawn("normal", 1000, dtype=dtype)], [count], size=192, in_memory=in_memory)


@pytest.mark.parametrize("in_memory", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("values", [1, 2, 3, 7])
def test_among_equals_the_lowest_index_is_kept(dtype: torch.dtype, values: int, in_memory: int) -> None:
    few = torch.arange(1000).mul(7919).remainder(values).to(dtype) * torch.tensor([1, -1]).repeat(500)
    for count in (1, 142, 143, 333, 334, 999):
        assert_selects([few], [count], size=192, in_memory=in_memory)


@pytest.mark.parametrize("in_memory", PATHS)
@pytest.mark.parametrize("value", SPECIAL)
def test_a_tensor_of_one_value_keeps_its_first_elements(value: float, in_memory: int) -> None:
    for dtype in (torch.float32, torch.float64):
        assert_selects([torch.full((100,), value, dtype=dtype)], [37], in_memory=in_memory)


ELEMENTS = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32), st.integers(-3, 3).map(float))


@settings(max_examples=80)
@given(
    st.lists(st.lists(ELEMENTS, min_size=12, max_size=12), min_size=1, max_size=3),
    st.lists(st.integers(0, 12), min_size=3, max_size=3),
    st.booleans(),
    st.sampled_from([5, 12]),
    st.sampled_from([1, 3, 12]),
)
@example([[0.0] * 12], [5, 0, 0], False, 4, 1)
@example([[float("nan")] * 12, [1.0] * 12], [5, 3, 0], True, 4, 3)
def test_every_path_equals_the_sort(
    rows: list[list[float]], counts: list[int], double: bool, size: int, in_memory: int
) -> None:
    deltas = [torch.tensor(row, dtype=torch.float64 if double else torch.float32) for row in rows]
    assert_selects(deltas, counts[: len(deltas)], size=size, in_memory=in_memory)


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


def test_what_keeps_all_or_nothing_needs_no_look_and_drops_nan_with_the_rest() -> None:
    delta = torch.tensor(SPECIAL)
    assert largest(Counted([delta, delta], 4), len(delta), [0, len(delta)]) == [NOTHING, EVERYTHING]
    for dtype in (torch.float32, torch.float64):
        assert bits(NOTHING.trim(delta.to(dtype), 0)) == bits(torch.zeros(len(delta), dtype=dtype))
        assert bits(EVERYTHING.trim(delta.to(dtype), 10)) == bits(delta.to(dtype))


def test_infinity_that_is_dropped_is_zero() -> None:
    infinite = torch.full((5,), float("-inf"))
    assert trimmed(infinite, *largest(Counted([infinite], 2), 5, [2]), size=2).tolist() == [-np.inf, -np.inf, 0, 0, 0]


def test_kept_is_mergekits_count() -> None:
    assert kept(10, 0.0) == kept(10, -1.0) == kept(0, 1.0) == 0
    assert kept(10, 0.01) == kept(1, 0.5) == 1
    assert kept(10, 0.29) == 2
    assert kept(10, 1.0) == kept(10, 2.0) == 10
    assert kept(3, 0.9999999999999999) == 2
