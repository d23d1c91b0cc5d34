"""Dot products of every two vectors, by leaf and by row, against their definition; and what is made of them."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray

from kittybuild.builders.base import BLOCK, Block
from kittybuild.builders.gram import gram, multiples, pairs_of, summed_multiples, vectors
from kittybuild.builders.numerics import dots, reals, row_dots
from kittybuild.tensors import DType, TensorSpec
from tests import jobs
from tests.jobs import halved

Array = NDArray[Any]


def drawn(seed: str, count: int) -> Array:
    """The numbers of tests.jobs as an array of float32."""
    return jobs.drawn(seed, count).numpy()


@dataclass
class Given:
    """A job over arrays in memory, in blocks of so many elements."""

    inputs: list[Array]
    elements: int = BLOCK
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def double(self) -> bool:
        return self.inputs[0].dtype == np.float64

    @property
    def output(self) -> TensorSpec:
        return TensorSpec(DType.F64 if self.double else DType.F32, tuple(self.inputs[0].shape))

    def scan(self) -> Iterator[Block]:
        for start in range(0, len(self.inputs[0]), self.elements):
            parts = tuple(array[start : start + self.elements].copy() for array in self.inputs)
            yield Block(start, parts, len(parts[0]))

    def part(self, start: int, count: int) -> Block:
        raise AssertionError("a Gram matrix is made of whole passes")

    def whole(self, index: int) -> Array:
        raise AssertionError("a Gram matrix is made of whole passes")

    def stored(self, index: int) -> bytearray:
        raise AssertionError("a Gram matrix is made of whole passes")


def in_order(values: list[float]) -> float:
    total = 0.0
    for value in values:
        total += value
    return total


def defined(a: Array, b: Array, width: int) -> list[float]:
    """The dot products of pieces of so many elements, each a tree."""
    products = (a.astype(float) * b.astype(float)).tolist()
    return [halved(products[start : start + width]) for start in range(0, len(products), width)]


def test_pairs_are_every_two_and_each_with_itself() -> None:
    assert pairs_of(3) == ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))
    assert pairs_of(0) == ()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_dots_of_many_pairs_are_their_definition(dtype: type, count: int) -> None:
    arrays = [drawn(f"dots {i}", BLOCK + 77).astype(dtype) for i in range(count)]
    found = list(dots(arrays, pairs_of(count)))
    wanted = [defined(arrays[i], arrays[j], BLOCK) for i, j in pairs_of(count)]
    assert [list(leaf) for leaf in zip(*wanted, strict=True)] == found


@pytest.mark.parametrize("width", [1, 3, 64, 1000, BLOCK + 1])
def test_dots_of_rows_are_their_definition_for_every_cut(width: int) -> None:
    rows = max(3, 2 * BLOCK // width // 3)
    arrays = [drawn(f"rows {i}", rows * width) for i in range(4)]
    found = row_dots(arrays, pairs_of(4), width)
    for row, (i, j) in zip(found.tolist(), pairs_of(4), strict=True):
        assert row == defined(arrays[i], arrays[j], width)
    middle = width * (rows // 2)
    parts = [
        row_dots([array[cut] for array in arrays], pairs_of(4), width) for cut in (slice(middle), slice(middle, None))
    ]
    assert np.concatenate(parts, axis=1).tobytes() == found.tobytes()


def test_a_gram_matrix_sums_leaves_in_order_for_every_block_size() -> None:
    inputs = [drawn(f"gram {i}", 3 * BLOCK + 5) for i in range(3)]
    for leaves in (1, 2, 9):
        found = gram(Given(inputs, leaves * BLOCK), based=False)
        assert found == [[in_order(defined(a, b, BLOCK)) for b in inputs] for a in inputs]


def test_a_gram_matrix_of_rows_sums_rows_in_order() -> None:
    inputs = [drawn(f"gram {i}", 700 * 100) for i in range(3)]
    for rows in (1, 13, 700):
        found = gram(Given(inputs, rows * 100), based=False, width=100)
        assert found == [[in_order(defined(a, b, 100)) for b in inputs] for a in inputs]


def test_with_a_base_the_vectors_are_differences_from_it() -> None:
    base, *others = (drawn(f"gram {i}", 1000) for i in range(3))
    deltas = [other - base for other in others]
    assert gram(Given([base, *others]), based=True) == gram(Given(deltas), based=False)
    block = Block(0, tuple(array.copy() for array in (base, *others)), 1000)
    assert all(map(np.array_equal, vectors(block, based=True), deltas))
    assert np.array_equal(block.inputs[0], base)


def test_there_is_nothing_in_empty_arrays() -> None:
    assert gram(Given([np.empty(0, np.float32)] * 2), based=False) == []
    assert (
        multiples(Given([np.empty(0, np.float32)] * 2), lambda real, found: [real.one] * len(found), based=False) == []
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_multiples_of_what_is_not_finite_are_not_numbers(bad: float) -> None:
    def never(real: Any, found: Any) -> list[Any]:
        raise AssertionError

    job = Given([np.array([bad, 1.0], np.float32), np.array([1.0, 1.0], np.float32)])
    assert all(math.isnan(factor) for factor in multiples(job, never, based=False))


def test_multiples_are_summed_in_single_steps_of_the_working_dtype() -> None:
    base, a, b = (drawn(f"sum {i}", 500) for i in range(3))
    third, back = np.float32(1 / 3), np.float32(-0.7)
    (block,) = Given([base, a, b]).scan()
    found = summed_multiples(Given([base, a, b]), [1 / 3, -0.7], based=True)(block)
    assert found.tobytes() == (base + ((a - base) * third + (b - base) * back)).tobytes()
    (block,) = Given([a, b]).scan()
    found = summed_multiples(Given([a, b]), [1 / 3, -0.7], based=False)(block)
    assert found.tobytes() == (a * third + b * back).tobytes()


def test_numbers_of_120_bits_are_those_of_each_thread_alone() -> None:
    with mpmath.workprec(120):
        wanted = [float(mpmath.acos(mpmath.mpf(n) / 100)) for n in range(100)]
    wrong: list[int] = []

    def work() -> None:
        for _ in range(3):
            with reals() as real:
                wrong.extend(n for n in range(100) if float(real.acos(real.mpf(n) / 100)) != wanted[n])

    threads = [threading.Thread(target=work) for _ in range(4)]
    with mpmath.workprec(20):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert mpmath.mp.prec == 20
    assert wrong == []
