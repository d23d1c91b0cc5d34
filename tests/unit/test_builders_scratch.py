"""A builder's `scratch` is an upper bound of what it holds beside its inputs, as torch's own allocator counts it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kittybuild.builders.base import BLOCK, Block, Combine
from kittybuild.builders.registry import BUILTIN
from kittybuild.tensors import DType, TensorSpec
from tests.jobs import drawn

ROWS, COLUMNS = 200, 1000  # three leaves and some
COUNT = ROWS * COLUMNS
PLAIN: dict[str, Any] = {"weight": [0.5, 0.25], "normalize": True, "lambda": 0.5}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "cast": (1, {}),
    "same": (2, {}),
    "linear": (3, {"weight": [0.5, 0.25, 0.3], "normalize": True}),
    "slerp": (2, {"t": 0.3}),
    "task_arithmetic": (3, PLAIN),
    "ties": (3, {**PLAIN, "density": [0.5, 0.2], "rescale": True}),
    "passthrough": (1, {"scale": [0.3]}),
    "lora": (1, {"scales": [0.5, 2.0], "transposed": False}),
}


class Held:
    """A job whose blocks are allocated before, with so many elements each."""

    def __init__(self, count: int, params: dict[str, Any], elements: int) -> None:
        self.params, self.double, self.elements = params, False, elements
        self.output = TensorSpec(DType.F32, (ROWS, COLUMNS))
        self.inputs = [drawn("same" if params == {} else f"held {index}", COUNT) for index in range(count)]
        self.buffers = [torch.empty(elements) for _ in self.inputs]
        self.factors = [drawn("A", 16, COLUMNS), drawn("B", ROWS, 16)] * 2

    def scan(self) -> Any:
        for start in range(0, COUNT, self.elements):
            parts = [tensor[start : start + self.elements] for tensor in self.inputs]
            yield Block(start, tuple(b[: len(p)].copy_(p) for b, p in zip(self.buffers, parts, strict=True)))

    def whole(self, index: int) -> Tensor:
        return self.factors[index - 1]


def most_held(work: Callable[[], object]) -> int:
    """The most bytes that were allocated at once while `work` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_the_measure_counts() -> None:
    assert most_held(lambda: [torch.ones(1000), torch.ones(1000)]) == 8000
    assert most_held(lambda: [torch.ones(1000).numel(), torch.ones(1000).numel()]) == 4000


@pytest.mark.parametrize("leaves", [1, 2])
@pytest.mark.parametrize("builder", CASES)
def test_scratch_is_an_upper_bound(builder: str, leaves: int) -> None:
    job = Held(*CASES[builder], leaves * BLOCK)
    known = BUILTIN[builder]
    combine: Combine = known.prepare(job)

    def run() -> None:
        for block in job.scan():
            combine(block)

    allowed = 4 * leaves * BLOCK * known.scratch
    small = 64 * 1024
    assert most_held(run) <= allowed + small
    if builder == "slerp":
        assert most_held(lambda: known.prepare(job)) <= allowed + small
