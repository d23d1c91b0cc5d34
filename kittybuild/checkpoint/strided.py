"""Tensors whose elements lie in another order than their own, or with gaps, as torch saves views: `strides:1x4`.

Strides count elements, one for each side; none is negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kittybuild.checkpoint.source import Entry
from kittybuild.tensors import Shape

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kittybuild.checkpoint.decoding import Read

PREFIX = "strides:"

_PANEL = 32 << 20  # bytes gathered at a time: of a transposed matrix, the longer the runs the fewer the reads
_TILE = 128
_PIECE = 64 << 10  # so little is read in one piece, whatever gaps are in it


def contiguous(shape: Shape, stride: Sequence[int]) -> bool:
    """Whether elements lie in their own order without gaps; sides of 1 and tensors without elements always do."""
    expected = 1
    for side, step in zip(reversed(shape), reversed(stride), strict=True):
        if side > 1 and step != expected:
            return False
        expected *= side
    return True


def span(shape: Shape, stride: Sequence[int]) -> int:
    """How many elements lie from the first to the last; 0 for a tensor without elements."""
    return 1 + sum((side - 1) * step for side, step in zip(shape, stride, strict=True)) if 0 not in shape else 0


def encoding(stride: Sequence[int]) -> str:
    """The encoding of an entry with these strides."""
    return PREFIX + "x".join(map(str, stride))


def panel_rows(entry: Entry) -> int:
    """How many rows are best decoded at a time."""
    unit = _row_unit(entry.spec.shape)
    row = max(1, entry.spec.shape[-1]) * entry.spec.dtype.size
    return max(1, _PANEL // (row * unit)) * unit


def _row_unit(shape: Shape) -> int:
    """The rows that differ in their first index (of a side above 1) only: what is gathered is whole such units."""
    sides = [side for side in shape[:-1] if side != 1]
    return math.prod(sides[1:])


def decode_rows(entry: Entry, read: Read, start: int, stop: int) -> NDArray[Any]:
    """Rows [start, stop) of a tensor, all but its last side being rows, as unsigned integers of its element size."""
    shape, size = entry.spec.shape, entry.spec.dtype.size
    stride = tuple(map(int, entry.encoding.removeprefix(PREFIX).split("x")))
    unit = _row_unit(shape)
    first, last = start // unit, -(-stop // unit)
    axes = [[side, step] for side, step in zip(shape[:-1], stride, strict=False) if side != 1]
    offset = entry.offset
    if axes:
        axes[0][0] = last - first
        offset += first * axes[0][1] * size
    axes.append([shape[-1], stride[-1]])
    values = _gathered(axes, size, lambda at, count: read(entry.file, offset + at * size, count * size))
    rows = in_order(values).reshape(-1, shape[-1])
    return rows[start - first * unit : stop - first * unit]


def in_order(values: NDArray[Any]) -> NDArray[Any]:
    """A copy whose elements lie in their own order, made tile by tile: several times faster than numpy's own."""
    import numpy

    last = values.ndim - 1
    near = min(range(values.ndim), key=lambda axis: values.strides[axis] if values.shape[axis] > 1 else math.inf)
    if near == last or values.size == 0:
        return numpy.ascontiguousarray(values)
    found = numpy.empty(values.shape, values.dtype)
    tile = [slice(None)] * values.ndim
    for row in range(0, values.shape[near], _TILE):
        for column in range(0, values.shape[last], _TILE):
            tile[near], tile[last] = slice(row, row + _TILE), slice(column, column + _TILE)
            found[tuple(tile)] = values[tuple(tile)]
    return found


def _gathered(axes: Sequence[Sequence[int]], size: int, read: Callable[[int, int], Any]) -> NDArray[Any]:
    """The elements of a box of (side, stride) axes; `read(first, count)` gives elements as they are stored.

    What lies close together is read in one piece, the rest piece by piece.
    """
    import numpy

    order = sorted(range(len(axes)), key=lambda axis: -axes[axis][1])
    stored = [axes[axis] for axis in order]
    inner, reach, count = len(stored), 1, 1
    while inner:
        side, step = stored[inner - 1]
        grown = reach + (side - 1) * step
        if grown * size > max(2 * count * side * size, _PIECE):
            break
        inner, reach, count = inner - 1, grown, count * side
    found = numpy.empty([side for side, _ in stored], f"<u{size}")
    sides, steps = [side for side, _ in stored[inner:]], [step * size for _, step in stored[inner:]]
    for index in numpy.ndindex(*found.shape[:inner]):
        at = sum(number * step for number, (_, step) in zip(index, stored, strict=False))
        piece = numpy.frombuffer(read(at, reach), found.dtype)
        found[index] = numpy.lib.stride_tricks.as_strided(piece, sides, steps, writeable=False)
    gathered: NDArray[Any] = found.transpose(numpy.argsort(order))
    return gathered
