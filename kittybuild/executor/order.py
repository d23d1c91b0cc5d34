"""What a worker is to do and what came of it: values that need neither plan nor store, and travel between processes."""

from __future__ import annotations

from dataclasses import dataclass

from kittybuild.checkpoint.source import Entry
from kittybuild.model.derivation import Derivation
from kittybuild.store.store import Location
from kittybuild.tensors import TensorRef, TensorSpec


@dataclass(frozen=True, slots=True)
class Given:
    """One input of an order. Its bytes are those of an `entry` of a source, at a `location` in the store, or what
    another order makes in memory `first`. `ref` None: its content is unknown, and learned on the way.
    """

    spec: TensorSpec
    ref: TensorRef | None = None
    entry: Entry | None = None
    location: Location | None = None
    first: Order | None = None


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor's bytes are to be written: the file at `path`, from `offset` on."""

    path: str
    offset: int


@dataclass(frozen=True, slots=True)
class Order:
    """Run the builder of `drv` over `inputs`, into `slot` or (None) into memory.

    `name`: the tensor's, for messages. `share`: the bytes that its blocks may take.
    """

    name: str
    drv: Derivation
    inputs: tuple[Given, ...]
    share: int
    slot: Slot | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What came of an order: content, checksum, how many elements are not finite, and the contents of the inputs.

    `first`: for each input that was made first, the report of that.
    """

    ref: TensorRef
    xxh3: str
    nonfinite: int
    inputs: tuple[TensorRef, ...]
    first: tuple[Report | None, ...]


def needs_torch(drv: Derivation) -> bool:
    """Whether a derivation's arithmetic is torch's: its class then names torch's version and the machine."""
    return ";torch " in drv.numerics
