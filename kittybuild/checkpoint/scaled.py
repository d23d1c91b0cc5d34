"""FP8 weights with scales of their own, for the whole tensor, each row, or blocks: `scaled:F8_E4M3:128x128`.

An element's value is its FP8 value times the scale of its block, in float32, then rounded to the entry's dtype once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kittybuild.checkpoint.source import RAW, Entry
from kittybuild.errors import SourceError
from kittybuild.tensors import DType, Shape, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kittybuild.checkpoint.decoding import Read

PREFIX = "scaled:"
STORED = (DType.F8_E4M3, DType.F8_E5M2)
SUFFIXES = ("_scale_inv", "_scale")
USUAL_BLOCKS = (128, 128)

_SCALES = (DType.F32, DType.BF16, DType.F16)


def with_scale(where: str, entry: Entry, scale: Entry, blocks: tuple[int, ...], dtype: DType) -> Entry:
    """The weight that `entry` and `scale` stand for, as `dtype`. Raises SourceError KB225 where they do not fit.

    `blocks`: the sizes that the config says blocks have, for the last sides; a grid of any other is refused.
    """
    spec = TensorSpec(dtype, entry.spec.shape)
    if spec.numel == 0:
        return Entry(entry.name, spec, entry.file, entry.offset, 0)
    sides = _blocks(entry.spec.shape, scale.spec.shape, blocks)
    if sides is None or scale.spec.dtype not in _SCALES or (entry.encoding, scale.encoding) != (RAW, RAW):
        message = f"{entry.name!r} ({entry.spec}) and its scales {scale.name!r} ({scale.spec}) do not fit each other"
        raise SourceError("KB225", message, at=where, hint="use the checkpoint before quantisation")
    encoding = f"{PREFIX}{entry.spec.dtype.value}:{'x'.join(map(str, sides))}"
    return Entry(entry.name, spec, entry.file, entry.offset, entry.nbytes, encoding, parts=(scale,))


def _blocks(shape: Shape, scales: Shape, told: tuple[int, ...]) -> tuple[int, ...] | None:
    """How many elements of each side share a scale; None where the scales are no grid over the weight."""
    if all(side == 1 for side in scales):
        return shape
    if len(scales) == 1:  # one for each row, or each expert
        scales += (1,) * (len(shape) - 1)
    if len(scales) != len(shape):
        return None
    told = (1,) * (len(shape) - len(told)) + told[-len(shape) :]
    found = []
    for side, count, block in zip(shape, scales, told, strict=True):
        fitting = [size for size in (side, 1, block) if -(-side // size) == count]
        if not fitting:
            return None
        found.append(fitting[0])
    return tuple(found)


class ScaledRows:
    """Decodes rows of a `scaled` entry. The scales are read whole, at first use: they are few."""

    def __init__(self, entry: Entry, read: Read) -> None:
        self.entry, self._read = entry, read
        _, stored, blocks = entry.encoding.split(":")
        self._stored, self._blocks = DType(stored), tuple(map(int, blocks.split("x"))) if blocks else ()
        self._values: NDArray[Any] | None = None
        self._scales: NDArray[Any] | None = None

    def __call__(self, start: int, stop: int) -> NDArray[Any]:
        """See Decoder."""
        import numpy

        columns = self.entry.spec.shape[-1] if self.entry.spec.shape else 1
        if self._values is None or self._scales is None:
            self._values, self._scales = values_of(self._stored), self._grid()
        data = self._read(self.entry.file, self.entry.offset + start * columns, (stop - start) * columns)
        # "clip" never matters to bytes, and spares take a check of each.
        values = numpy.take(self._values, numpy.frombuffer(data, numpy.uint8), mode="clip").reshape(-1, columns)
        scales = self._scales[self._scale_rows(numpy.arange(start, stop))]
        block = self._blocks[-1] if self._blocks else 1
        with numpy.errstate(all="ignore"):  # a scale may be infinite or NaN: then so are the values
            if columns % block == 0:
                blocks = values.reshape(len(values), -1, block)
                blocks *= scales[:, :, None]
            else:
                values *= numpy.repeat(scales, block, axis=1)[:, :columns]
            return narrowed(values, self.entry.spec.dtype)

    def _grid(self) -> NDArray[Any]:
        """The scales in float32, with a row for each row of blocks."""
        (part,) = self.entry.parts
        data = self._read(part.file, part.offset, part.nbytes)
        columns = -(-self.entry.spec.shape[-1] // self._blocks[-1]) if self._blocks else 1
        return widened(data, part.spec.dtype).reshape(-1, columns)

    def _scale_rows(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Which row of scales each row of the tensor has."""
        import numpy

        found, stride = numpy.zeros_like(rows), 1
        for side, block in zip(self.entry.spec.shape[-2::-1], self._blocks[-2::-1], strict=True):
            found += rows % side // block * stride
            stride *= -(-side // block)
            rows = rows // side
        return found


def values_of(dtype: DType) -> NDArray[Any]:
    """The float32 value of each byte of an FP8 dtype (OFP8: E4M3 has no infinity, its S.1111.111 is NaN)."""
    import numpy

    code = numpy.arange(256, dtype=numpy.int64)
    bits, bias = (3, 7) if dtype is DType.F8_E4M3 else (2, 15)
    exponent, mantissa = (code & 0x7F) >> bits, code & (1 << bits) - 1
    fraction = mantissa / (1 << bits) + (exponent > 0)
    values = numpy.ldexp(fraction, numpy.maximum(exponent, 1) - bias)
    if dtype is DType.F8_E4M3:
        values[code & 0x7F == 0x7F] = numpy.nan
    else:
        values[exponent == 31] = numpy.where(mantissa[exponent == 31] == 0, numpy.inf, numpy.nan)
    signed: NDArray[Any] = numpy.where(code < 128, values, -values).astype(numpy.float32)
    return signed


def widened(data: Any, dtype: DType) -> NDArray[Any]:
    """The float32 values of F32, F16 or BF16 bytes."""
    import numpy

    if dtype is DType.BF16:
        bits = numpy.frombuffer(data, "<u2").astype(numpy.uint32) << 16
        return bits.view(numpy.float32)
    return numpy.frombuffer(data, "<f4" if dtype is DType.F32 else "<f2").astype(numpy.float32)


def narrowed(values: NDArray[Any], dtype: DType) -> NDArray[Any]:
    """float32 values rounded to the nearest (ties to even) F32, F16 or BF16; BF16 comes as its bits in uint16.

    `values` may be overwritten. Every NaN of a BF16 becomes the same one.
    """
    import numpy

    if dtype is not DType.BF16:
        return values.astype("<f4" if dtype is DType.F32 else "<f2", copy=False)
    bits = values.view(numpy.uint32)
    bits[numpy.isnan(values)] = 0x7FC00000  # so that rounding cannot carry into the sign
    bits += (bits >> 16 & 1) + numpy.uint32(0x7FFF)
    rounded: NDArray[Any] = (bits >> 16).astype("<u2")
    return rounded
