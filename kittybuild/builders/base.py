"""What a builder is: a name, a version, and `prepare`, which may look at all blocks and returns a function of one.

`prepare(job)` is the measuring pass; the function that it returns must give the same bits for every way of cutting the
tensor into blocks. A block starts at a multiple of BLOCK elements and is a multiple of BLOCK long, but for the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from kittybuild.model.method import Method
from kittybuild.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 65_536
"""Elements of the smallest block, and of one leaf of a reduction (design, part 7)."""


@dataclass(frozen=True, slots=True)
class Block:
    """The same elements of each streamed input: 1-D tensors in the working dtype, from element `start` on.

    The tensors are the builder's to overwrite, and hold until the next block is asked for.
    """

    start: int
    inputs: tuple[Tensor, ...]


class Job(Protocol):
    """One derivation to realise, as its builder sees it."""

    @property
    def params(self) -> Mapping[str, Any]:
        """The derivation's parameters."""

    @property
    def output(self) -> TensorSpec:
        """What is to be made."""

    @property
    def double(self) -> bool:
        """Whether the working dtype is float64 instead of float32."""

    def scan(self) -> Iterator[Block]:
        """All blocks of the streamed inputs, in order; may be asked for again."""

    def whole(self, index: int) -> Tensor:
        """The whole input `index` in its own dtype and shape (for inputs that are not streamed)."""


Combine = Callable[[Block], "Tensor"]


@dataclass(frozen=True, slots=True)
class Builder:
    """One builder. `version` is bumped by hand whenever its bits change (golden vectors in the tests guard this).

    `streamed`: how many of the inputs come in blocks, None for all. `scratch`: temporaries of a block that `combine`
    holds beside its inputs, in working-dtype blocks (for the memory budget). `measured`: `prepare` scans the inputs.
    """

    name: str
    version: int
    prepare: Callable[[Job], Combine]
    streamed: int | None = None
    scratch: int = 2
    measured: bool = False
    method: Method | None = None


@dataclass(frozen=True)
class Builders:
    """Builders by name; an immutable value that plug-ins extend with `plus`."""

    by_name: Mapping[str, Builder]

    @classmethod
    def of(cls, *builders: Builder) -> Builders:
        """A registry of these; raises ValueError where two have one name."""
        by_name = {builder.name: builder for builder in builders}
        if len(by_name) != len(builders):
            raise ValueError("two builders have one name")
        return cls(MappingProxyType(by_name))

    def plus(self, *builders: Builder) -> Builders:
        """This registry with more builders."""
        return Builders.of(*self.by_name.values(), *builders)

    def __getitem__(self, name: str) -> Builder:
        return self.by_name[name]

    def methods(self) -> tuple[Method, ...]:
        """The merge methods among them, in the order of declaration."""
        return tuple(builder.method for builder in self.by_name.values() if builder.method)
