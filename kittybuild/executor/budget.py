"""One memory budget for all workers: block sizes that fit caches and the budget, and admission of work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kittybuild.builders.base import BLOCK, Builder
from kittybuild.builders.selection import IN_MEMORY
from kittybuild.model.derivation import Derivation
from kittybuild.tensors import DType

BASELINE = 320_000_000
"""What Python and torch themselves take, in the build's process and in its workers; the budget for tensors is what
`--memory` leaves above it."""
LEAST = 32_000_000
IN_CACHE = 4_000_000
"""Bytes of a block with its temporaries: they stay near the core that works on them (docs/design, note 9)."""


def streamed(builder: Builder, drv: Derivation) -> int:
    """How many inputs of a derivation come in blocks."""
    return len(drv.inputs) if builder.streamed is None else builder.streamed


def block_bytes(builder: Builder, drv: Derivation, elements: int) -> int:
    """What a block of so many elements takes while it is worked on."""
    wide = 8 if any(given.spec.dtype is DType.F64 for given in drv.inputs) else 4
    count = streamed(builder, drv)
    stored = sum(given.spec.dtype.size for given in drv.inputs[:count])
    return elements * (stored + wide * (count + 1 + builder.scratch))


def block_elements(builder: Builder, drv: Derivation, share: int) -> int:
    """Elements of a block: as many leaves (or rows) as stay in cache and in a worker's share, at least one."""
    shape = drv.output.shape
    least = max(1, shape[-1] if len(shape) > 1 else drv.output.numel) if builder.rows else BLOCK
    return least * max(1, min(IN_CACHE, share) // max(1, block_bytes(builder, drv, least)))


def cost(builder: Builder, drv: Derivation, elements: int) -> int:
    """The bytes that realising a derivation takes at its peak."""
    count = streamed(builder, drv)
    whole = sum(given.spec.nbytes + given.spec.numel * builder.whole for given in drv.inputs[count:])
    selected = count * min(drv.output.numel, IN_MEMORY) * 8 if builder.measured else 0
    return block_bytes(builder, drv, min(elements, drv.output.numel)) + whole + selected


class Admission:
    """Admits work while the sum of its costs stays within `total`; a work larger than it is admitted alone."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._used = 0
        self._free = threading.Condition()

    @contextmanager
    def admit(self, nbytes: int) -> Iterator[None]:
        """Wait until `nbytes` more fit, hold them inside the with."""
        with self._free:
            self._free.wait_for(lambda: self._used == 0 or self._used + nbytes <= self.total)
            self._used += nbytes
        try:
            yield
        finally:
            with self._free:
                self._used -= nbytes
                self._free.notify_all()


class Budget(Admission):
    """Admits work while the sum of its costs stays within the memory budget."""

    def __init__(self, memory: int) -> None:
        super().__init__(max(LEAST, memory - BASELINE))
