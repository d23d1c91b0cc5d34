"""Gathered tables, against the definition of a row: copies, averages, zeros, means; on every axis and block size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kittybuild.builders.base import BLOCK
from kittybuild.builders.vocab import LEAF
from kittybuild.errors import BuildError
from kittybuild.model.rows import RowMap, Sources
from tests.jobs import bits, drawn, halved, make, rounded

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
BEFORE, AFTER = ((), (2,), (3, 2)), ((), (5,), (2, 3))


def made(tables: list[Tensor], rows: RowMap, axis: int, dtype: torch.dtype | None = None, blocks: int = 4) -> Tensor:
    """What the builder makes of the tables."""
    shape = list(tables[0].shape)
    shape[axis] = rows.count
    params = {"axis": axis, "rows": str(rows)}
    return make("rows", tables, params, dtype=dtype, shape=shape, blocks=blocks).tensor


def defined(tables: list[Tensor], rows: RowMap, axis: int, dtype: torch.dtype) -> Tensor:
    """The same by definition, a row at a time."""
    wide = F64 if any(table.dtype is F64 for table in tables) else F32
    found: list[Tensor] = []
    for sources in rows.rows():
        parts = [tables[number].select(axis, row).to(wide) for number, row in sources]
        total = torch.zeros_like(tables[0].select(axis, 0), dtype=wide) if not parts else parts[0]
        for part in parts[1:]:
            total = total + part
        found.append(total / len(parts) if len(parts) > 1 else total)
    done = [row.double() for row in found]
    if rows.means:
        columns = torch.stack(done, -1).view(-1, len(done)).tolist()
        sums = []
        for column in columns:
            total = 0.0
            for start in range(0, len(column), LEAF):
                total += halved(column[start : start + LEAF])
            sums.append(total / len(column))
        done += [torch.tensor(sums, dtype=F64).view(done[0].shape)] * rows.means
    return rounded(torch.stack(done, axis), dtype)


@st.composite
def gathered(draw: st.DrawFn) -> tuple[list[Tensor], RowMap, int]:
    """Tables that differ in the length of one axis, and a map over them that uses each."""
    before, after = draw(st.sampled_from(BEFORE)), draw(st.sampled_from(AFTER))
    dtypes = draw(st.sampled_from([(F32,) * 3, (BF16,) * 3, (F16,) * 3, (BF16, F16, F32), (F64, F32, BF16)]))
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    tables = [
        drawn(f"table {number}", *before, length, *after, dtype=dtype)
        for number, (length, dtype) in enumerate(zip(lengths, dtypes, strict=False))
    ]
    place = st.one_of([st.tuples(st.just(n), st.integers(0, length - 1)) for n, length in enumerate(lengths)])
    rows: list[Sources] = draw(st.lists(st.lists(place, max_size=3).map(tuple), min_size=1, max_size=12))
    rows += [((number, 0),) for number in range(len(lengths))]
    return tables, RowMap.of(rows, draw(st.integers(0, 3))), len(before)


@given(gathered(), st.sampled_from([None, F32, BF16]))
def test_every_row_is_what_the_map_says(case: tuple[list[Tensor], RowMap, int], dtype: torch.dtype | None) -> None:
    tables, rows, axis = case
    found = made(tables, rows, axis, dtype)
    assert bits(found) == bits(defined(tables, rows, axis, found.dtype))


@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_of_any_size_make_the_same_table(axis: int) -> None:
    """Blocks end inside rows, inside runs, and inside the means."""
    shapes = [(700, 300), (900, 300)] if axis == 0 else [(150, 1400), (150, 1800)]
    tables = [drawn(f"large {number}", *shape, dtype=BF16) for number, shape in enumerate(shapes)]
    count = shapes[0][axis]
    rows = RowMap.of([*(((0, r),) for r in range(count)), *(((1, r * 7 % 640), (0, r)) for r in range(50)), ()], 13)
    whole = made(tables, rows, axis, blocks=100)
    assert whole.numel() > 2 * BLOCK
    assert bits(whole) == bits(made(tables, rows, axis, blocks=1)) == bits(defined(tables, rows, axis, BF16))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64, torch.bool])
def test_rows_of_any_dtype_are_copied_as_they_are(dtype: torch.dtype) -> None:
    table = (drawn("any", 40, 3) * 100).to(dtype)
    order = [7, 7, 0, 39, 38, 1]
    found = made([table], RowMap.of(((0, row),) for row in order), 0)
    assert bits(found) == bits(torch.stack([table[row] for row in order]))


def test_integers_are_not_averaged() -> None:
    tables = [torch.arange(6).view(3, 2), torch.arange(6).view(3, 2)]
    for rows in (RowMap.of([((0, 1), (1, 1))]), RowMap.of([((0, 1),), ((1, 1),)], 2)):
        with pytest.raises(BuildError) as caught:
            made(tables, rows, 0)
        assert caught.value.code == "KB503"


def test_every_input_is_read_once() -> None:
    tables = [drawn("once", 500, 300), drawn("twice", 500, 300)]
    rows = RowMap.of([((0, 1),), ((1, 3), (0, 2))] * 300, 7)
    done = make("rows", tables, {"axis": 0, "rows": str(rows)}, shape=(607, 300), blocks=1)
    assert done.read == [table.nbytes for table in tables]
