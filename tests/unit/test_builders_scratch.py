"""A builder's `scratch` is an upper bound of what it holds beside its inputs, as Python and numpy count it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kittybuild.builders.base import BLOCK, Block
from kittybuild.builders.registry import BUILTIN
from kittybuild.tensors import DType, TensorSpec
from kittybuild.testing.holding import most_held
from tests.jobs import drawn

Array = NDArray[Any]

ROWS, COLUMNS = 200, 1000  # three leaves and some
COUNT = ROWS * COLUMNS
PLAIN: dict[str, Any] = {"weight": [0.5, 0.25], "normalize": True, "lambda": 0.5}
SPARSE: dict[str, Any] = {**PLAIN, "density": [0.5, 0.2], "rescale": "none", "seed": 1, "tensor": "t"}
VOTING: dict[str, Any] = {**SPARSE, "lambda": [0.4, 0.5], "k": 1}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "cast": (1, {}),
    "same": (2, {}),
    "linear": (3, {"weight": [0.5, 0.25, 0.3], "normalize": True}),
    "slerp": (2, {"t": 0.3}),
    "task_arithmetic": (3, PLAIN),
    "ties": (3, {**SPARSE, "rescale": "l1"}),
    "dare_ties": (3, SPARSE),
    "dare_linear": (3, {**SPARSE, "rescale": "l2"}),
    "breadcrumbs": (3, {**SPARSE, "gamma": [0.1, 0.2], "rescale": "density"}),
    "breadcrumbs_ties": (3, {**SPARSE, "gamma": [0.1, 0.2], "rescale": "linf"}),
    "della": (3, {**SPARSE, "epsilon": [0.1, 0.15], "rescale": "probability"}),
    "della_linear": (3, {**SPARSE, "epsilon": [0.1, 0.15], "rescale": "l1"}),
    "consensus_ta": (4, {**VOTING, "weight": [0.5, 0.25, 0.3], "lambda": [0.4] * 3}),
    "consensus_ties": (3, {**VOTING, "rescale": "l1"}),
    "nuslerp": (3, {"weight": [0.5, 0.2], "base": True, "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "multislerp": (5, {"weight": [0.5, 0.2, 0.3, 0.4], "base": True, "normalize_weights": True, "eps": 1e-8}),
    "karcher": (5, {"max_iter": 10, "tol": 1e-5}),
    "model_stock": (5, {"filter_wise": True}),
    "sce": (4, {"select_topk": 0.4}),
    "ram": (3, {"epsilon": 0.1}),
    "ramplus_tl": (3, {"epsilon": 0.1, "r": 0.1, "alpha": 0.2}),
    "nearswap": (2, {"t": 0.1}),
    "arcee_fusion": (2, {}),
    "passthrough": (1, {"scale": [0.3]}),
    "lora": (1, {"scales": [0.5, 2.0], "transposed": False}),
}


SELECTING = ("ties", "breadcrumbs", "breadcrumbs_ties", "consensus_ties", "sce", "arcee_fusion")
"""These hold elements while they look for a threshold, which the budget counts apart."""
SMALL = 128 * 1024
"""Numbers of a row, a bit an element, and Python's own."""


class Held:
    """A job (builders.base.Job) whose blocks are allocated before, with so many elements each."""

    def __init__(self, builder: str, elements: int, *shape: int) -> None:
        count, self.params = CASES[builder]
        self.double, self.elements, self.output = False, elements, TensorSpec(DType.F32, shape)
        self.inputs = (self.output,) * count
        self.flat = [drawn("same" if self.params == {} else f"held {index}", COUNT).numpy() for index in range(count)]
        self.buffers = [np.empty(elements, np.float32) for _ in self.inputs]
        self.factors = [drawn("A", 16, COLUMNS).numpy(), drawn("B", ROWS, 16).numpy()] * 2

    def scan(self) -> Iterator[Block]:
        return (self.part(start, min(self.elements, COUNT - start)) for start in range(0, COUNT, self.elements))

    def part(self, start: int, count: int) -> Block:
        for buffer, flat in zip(self.buffers, self.flat, strict=True):
            buffer[:count] = flat[start : start + count]
        return Block(start, tuple(buffer[:count] for buffer in self.buffers), count)

    def whole(self, index: int) -> Array:
        return self.factors[index - 1]

    def stored(self, index: int) -> bytearray:
        raise AssertionError  # no builder here asks


def held(builder: str, elements: int, *shape: int) -> tuple[int, int]:
    """The most bytes that `prepare` takes, and `combine`; the second time, when all is imported."""
    job, known = Held(builder, elements, *shape), BUILTIN[builder]
    combine = known.prepare(job)

    def work() -> None:
        for block in job.scan():
            combine(block)

    work()
    return most_held(lambda: known.prepare(job)), most_held(work)


def test_the_measure_counts() -> None:
    def at_once(count: int) -> None:
        arrays = [np.ones(100_000) for _ in range(count)]
        assert len(arrays) == count

    assert 800_000 <= most_held(lambda: at_once(1)) < 810_000
    assert 2_400_000 <= most_held(lambda: at_once(3)) < 2_410_000


def assert_within(builder: str, elements: int, *shape: int) -> None:
    allowed = 4 * elements * BUILTIN[builder].scratch + SMALL
    preparing, combining = held(builder, elements, *shape)
    assert combining <= allowed
    if BUILTIN[builder].measured:
        assert preparing <= allowed + (8 * COUNT * CASES[builder][0] if builder in SELECTING else 0)


@pytest.mark.parametrize("leaves", [1, 2])
@pytest.mark.parametrize("builder", CASES)
def test_scratch_is_an_upper_bound(builder: str, leaves: int) -> None:
    elements = leaves * BLOCK // COLUMNS * COLUMNS if BUILTIN[builder].rows else leaves * BLOCK
    assert_within(builder, elements, ROWS, COLUMNS)


@pytest.mark.parametrize("builder", [name for name in CASES if BUILTIN[name].rows])
def test_scratch_is_an_upper_bound_where_a_tensor_is_one_row(builder: str) -> None:
    assert_within(builder, COUNT, COUNT)
