"""Fixed inputs for tables that are gathered anew (copies, averages, zeros and means, on each axis), joined and cut."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from kittybuild.model.rows import RowMap, Sources
from tests.golden.builders.cases import BF16, F16, F32, F64, Case
from tests.jobs import drawn

WIDTH = 90


def gathered(name: str, tables: tuple[Tensor, ...], rows: list[Sources], axis: int = 0, means: int = 0) -> Case:
    """A case over these tables, in the dtype of the first."""
    made = RowMap.of(rows, means)
    shape = list(tables[0].shape)
    shape[axis] = made.count
    return Case("rows", name, tables, {"axis": axis, "rows": str(made)}, shape=tuple(shape))


def cases() -> Iterator[Case]:
    """All cases. Never change one: add another."""
    count = 1100  # more than a leaf of rows
    mixed: list[Sources] = [((0, row * 7 % count),) for row in range(count)]
    mixed += [((0, row), (1, row + 1), (2, 2 * row)) for row in range(60)] + [(), ((1, 3), (2, 4))]
    for dtype, name in ((BF16, "bfloat16"), (F16, "float16"), (F32, "float32"), (F64, "float64")):
        tables = tuple(drawn(f"table {number}", count, WIDTH, dtype=dtype) for number in range(3))
        yield gathered(f"{name}, with means", tables, mixed, means=5)
    turned = tuple(drawn(f"turned {number}", WIDTH, count, dtype=BF16) for number in range(3))
    yield gathered("the other axis", turned, mixed, axis=1, means=5)
    bias = tuple(drawn(f"bias {number}", count) for number in range(3))
    yield gathered("a bias", bias, mixed, means=5)
    differing = (drawn("wide", 40, 3, dtype=BF16), drawn("narrow", 30, 3))
    yield gathered("mixed dtypes", differing, [*(((0, row), (1, row)) for row in range(30)), ((0, 39),)])
    integers = ((drawn("ids", 50, 3) * 1e9).long(),)
    yield gathered("integers", integers, [((0, row),) for row in range(49, -1, -1)])
    pieces = tuple(drawn(f"piece {number}", 300, WIDTH + number, dtype=BF16) for number in range(3))
    whole = sum(piece.numel() for piece in pieces)
    yield Case("join", "three pieces", pieces, {}, shape=(whole,))
    yield Case("cut", "from the middle of a leaf", pieces[:1], {"start": 1000}, shape=(100, 200))
