"""MXFP4 experts (gpt-oss): blocks of 32 four-bit floats with a power of two each, behind a plain 3-D weight.

`X_blocks` U8[experts, out, in / 32, 16] and `X_scales` U8[experts, out, in / 32] are X [experts, in, out]. An element
is its E2M1 value (the low half of a byte comes first) times 2 ** (scale - 127), which bfloat16 holds exactly; the scale
255 is NaN (OCP Microscaling Formats 1.0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kittybuild.checkpoint.scaled import narrowed
from kittybuild.checkpoint.source import RAW, Entry
from kittybuild.checkpoint.strided import in_order
from kittybuild.errors import SourceError
from kittybuild.tensors import DType, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kittybuild.checkpoint.decoding import Read

ENCODING = "mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"

_BYTES = 16  # of a block
_PIECE = 2048  # blocks decoded at a time: the temporaries stay in cache
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def is_packed(blocks: Entry) -> bool:
    """Whether a tensor looks like blocks of MXFP4."""
    shape = blocks.spec.shape
    return blocks.name.endswith(BLOCKS) and blocks.spec.dtype is DType.U8 and shape[3:] == (_BYTES,)


def with_scales(where: str, blocks: Entry, scales: Entry, dtype: DType) -> Entry:
    """The weight that blocks and scales stand for, as `dtype`. Raises SourceError KB225 where they do not fit."""
    if scales.spec != TensorSpec(DType.U8, blocks.spec.shape[:-1]) or (blocks.encoding, scales.encoding) != (RAW, RAW):
        message = f"{blocks.name!r} ({blocks.spec}) and {scales.name!r} ({scales.spec}) do not fit each other"
        raise SourceError("KB225", message, at=where, hint="download or copy it again")
    experts, rows, count, _ = blocks.spec.shape
    spec = TensorSpec(dtype, (experts, count * 2 * _BYTES, rows))
    name = blocks.name.removesuffix(BLOCKS)
    return Entry(name, spec, blocks.file, blocks.offset, blocks.nbytes, ENCODING, parts=(scales,))


class Mxfp4Rows:
    """Decodes rows of an `mxfp4` entry, whole experts at a time: each row takes a bit of all their bytes."""

    def __init__(self, entry: Entry, read: Read) -> None:
        self.entry, self._read = entry, read
        self._pairs: NDArray[Any] | None = None

    def __call__(self, start: int, stop: int) -> NDArray[Any]:
        """See Decoder."""
        import numpy

        _, inner, _ = self.entry.spec.shape
        experts = [self._expert(number) for number in range(start // inner, -(-stop // inner))]
        rows = numpy.concatenate(experts) if len(experts) > 1 else experts[0]
        first = start // inner * inner
        return rows[start - first : stop - first]

    def _expert(self, number: int) -> NDArray[Any]:
        import numpy

        if self._pairs is None:
            self._pairs = _pairs(self.entry.spec.dtype)
        _, inner, outer = self.entry.spec.shape
        (part,) = self.entry.parts
        groups = outer * inner // (2 * _BYTES)
        data = self._read(self.entry.file, self.entry.offset + number * groups * _BYTES, groups * _BYTES)
        blocks = numpy.frombuffer(data, numpy.uint8).reshape(-1, _BYTES)
        scales = numpy.frombuffer(self._read(part.file, part.offset + number * groups, groups), numpy.uint8)
        values = numpy.empty(blocks.shape, self._pairs.dtype)
        for at in range(0, groups, _PIECE):
            piece = slice(at, at + _PIECE)
            index = scales[piece].astype(numpy.intp)[:, None] << 8 | blocks[piece]
            numpy.take(self._pairs, index, out=values[piece], mode="clip")  # which never matters, and is faster
        return in_order(values.view(f"<u{self.entry.spec.dtype.size}").reshape(outer, inner).T)


def _pairs(dtype: DType) -> NDArray[Any]:
    """The two values of each byte under each scale, as one number at `scale * 256 + byte`."""
    import numpy

    value = numpy.array([*_E2M1, *(-value for value in _E2M1)])
    with numpy.errstate(all="ignore"):
        scaled = numpy.ldexp(value, numpy.arange(256)[:, None] - 127)
        scaled[255] = numpy.nan
        narrow = narrowed(scaled.astype(numpy.float32), dtype)
    byte = numpy.arange(256)
    pairs = numpy.stack([narrow[:, byte & 15], narrow[:, byte >> 4]], axis=-1)
    return pairs.view(f"<u{2 * dtype.size}").reshape(-1)
