"""What a builder is: a name, a version, and `prepare`, which may look at all blocks and returns a function of one.

`prepare(job)` is the measuring pass; the function that it returns must give the same bits for every way of cutting the
tensor into blocks. A block starts at a multiple of BLOCK elements and is a multiple of BLOCK long, but for the last;
for a builder of rows, it is some whole rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from kittybuild.model.derivation import KITTY_1, Derivation
from kittybuild.model.method import Catalogue, Method
from kittybuild.tensors import TensorSpec

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

BLOCK = 65_536
"""Elements of the smallest block, and of one leaf of a reduction (design, part 7)."""


@dataclass(frozen=True, slots=True)
class Block:
    """The same `count` elements of each streamed input: 1-D arrays of the working dtype, from element `start` on.

    (float32, or float64 where an input is; integers as they are.) The arrays are the builder's to overwrite, and hold
    until the next block is asked for.
    """

    start: int
    inputs: tuple[Array, ...]
    count: int


class Job(Protocol):
    """One derivation to realise, as its builder sees it."""

    @property
    def params(self) -> Mapping[str, Any]:
        """The derivation's parameters."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The specs of the inputs, in order."""

    @property
    def output(self) -> TensorSpec:
        """What is to be made."""

    @property
    def double(self) -> bool:
        """Whether the working dtype is float64 instead of float32."""

    def scan(self) -> Iterator[Block]:
        """All blocks of the streamed inputs, in order; may be asked for again."""

    def part(self, start: int, count: int) -> Block:
        """These elements of the streamed inputs, at most a leaf of them, out of turn: it ends a scan."""

    def whole(self, index: int) -> Array:
        """The whole input `index` in its own dtype and shape (for inputs that are not streamed)."""

    def stored(self, index: int) -> bytearray:
        """The bytes of the whole input `index`."""


Combine = Callable[[Block], "Array"]
"""Makes one block of the result: a 1-D array of the working dtype or of the output's."""


@dataclass(frozen=True, slots=True)
class Builder:
    """One builder. `version` is bumped by hand whenever its bits change (golden vectors in the tests guard this).

    A plug-in's may be 0: then the digest of its source file counts.

    `streamed`: how many of the inputs come in blocks, None for all. `scratch`: temporaries of a block that `combine`
    holds beside its inputs, in working-dtype blocks (for the memory budget). `whole`: bytes that an element of an
    input that is not streamed takes beside its own (in float64, in two slices). `measured`: `prepare` scans the inputs.
    `rows`: blocks are whole rows (of the last dimension) instead of whole leaves. `seeded`: the plan adds the recipe's
    `seed` and the output's name (`tensor`) to the parameters. `numerics`: the class of arithmetic; in each class a
    name stands for one builder. `machine`: bits depend on numpy and the CPU, which the plan adds to the class.
    """

    name: str
    version: int | str
    prepare: Callable[[Job], Combine]
    streamed: int | None = None
    scratch: int = 2
    whole: int = 24
    measured: bool = False
    rows: bool = False
    seeded: bool = False
    numerics: str = KITTY_1
    machine: bool = False
    method: Method | None = None


@dataclass(frozen=True)
class Builders:
    """Builders by class of arithmetic and name; an immutable value that plug-ins extend with `plus`.

    `files`: what `plugins.load` takes in another process to load the same; None: they were put together by hand.
    """

    by_class: Mapping[tuple[str, str], Builder]
    files: tuple[str, ...] | None = None

    @classmethod
    def of(cls, *builders: Builder) -> Builders:
        """A registry of these; raises ValueError where two of a class have one name."""
        by_class = {(builder.numerics, builder.name): builder for builder in builders}
        if len(by_class) != len(builders):
            raise ValueError("two builders have one name")
        return cls(MappingProxyType(by_class))

    def plus(self, *builders: Builder) -> Builders:
        """This registry with more builders."""
        return Builders.of(*self.by_class.values(), *builders)

    def __getitem__(self, name: str) -> Builder:
        return self.by_class[KITTY_1, name]

    def get(self, name: str, numerics: str) -> Builder | None:
        """The builder of that name in a class of arithmetic."""
        return self.by_class.get((numerics, name))

    def behind(self, drv: Derivation) -> Builder:
        """The builder that realises a derivation."""
        return self.by_class[drv.numerics.partition(";")[0], drv.builder]

    def classes(self) -> tuple[str, ...]:
        """The classes of arithmetic, in the order of declaration."""
        return tuple(dict.fromkeys(numerics for numerics, _ in self.by_class))

    def methods(self, numerics: str = KITTY_1) -> tuple[Method, ...]:
        """The merge methods of a class, in the order of declaration."""
        return tuple(b.method for b in self.by_class.values() if b.method and b.numerics == numerics)

    def catalogue(self) -> Catalogue:
        """The merge methods of all classes."""
        return {numerics: self.methods(numerics) for numerics in self.classes()}
