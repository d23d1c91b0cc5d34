"""Which decoder reads an entry whose stored bytes are not its own. An entry says all that a decoder needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from kittybuild.checkpoint.source import Entry

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Bytes of a file: path, offset, count.
Read = Callable[[str, int, int], Any]


@dataclass(frozen=True, slots=True)
class Decoder:
    """Decodes rows [start, stop) of a tensor, all but its last side being rows; how they are cut changes no bit.

    `panel`: so many rows, from a multiple of it on, cost hardly more than one of them.
    """

    rows: Callable[[int, int], NDArray[Any]]
    panel: int = 1


def decoder(entry: Entry, read: Read) -> Decoder:
    """The decoder of an entry that is not RAW. Raises ValueError for an encoding that no reader makes."""
    kind = entry.encoding.partition(":")[0]
    if kind == "gguf":
        from kittybuild.checkpoint import gguf

        return Decoder(partial(gguf.decode_rows, entry, read))
    if kind == "strides":
        from kittybuild.checkpoint import strided

        return Decoder(partial(strided.decode_rows, entry, read), strided.panel_rows(entry))
    if kind == "scaled":
        from kittybuild.checkpoint.scaled import ScaledRows

        return Decoder(ScaledRows(entry, read))
    if kind == "mxfp4":
        from kittybuild.checkpoint.mxfp4 import Mxfp4Rows

        return Decoder(Mxfp4Rows(entry, read), entry.spec.shape[-2])
    raise ValueError(f"the encoding {entry.encoding!r}")
