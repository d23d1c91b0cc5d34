"""Maps of rows: one text for one map, whichever way it was made; and what a table of them is, row by row."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kittybuild.model.rows import RowMap, Run, Sources

PLACES = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=3).map(tuple)
ROWS = st.lists(PLACES, max_size=12)


@given(ROWS, st.integers(0, 3))
def test_the_text_says_all(rows: list[Sources], means: int) -> None:
    made = RowMap.of(rows, means)
    assert RowMap.parse(str(made)) == made
    assert list(made.rows()) == rows
    assert made.count == len(rows) + means
    assert made.inputs() == tuple(sorted({number for sources in rows for number, _ in sources}))


@given(ROWS)
def test_runs_are_as_long_as_they_can_be(rows: list[Sources]) -> None:
    runs = RowMap.of(rows).runs
    for run, other in pairwise(runs):
        assert other.sources != tuple((number, row + run.count) for number, row in run.sources)


@given(ROWS)
def test_inputs_can_be_called_by_other_numbers(rows: list[Sources]) -> None:
    made = RowMap.of(rows)
    inputs = made.inputs()
    named = made.renumbered(inputs)
    assert named.inputs() == tuple(range(len(inputs)))
    assert [tuple((inputs[number], row) for number, row in sources) for sources in named.rows()] == rows


def test_the_text_is_for_people_too() -> None:
    rows: list[Sources] = [*(((0, row),) for row in range(32000)), ((1, 32000),), ((0, 5), (1, 7)), (), ()]
    assert str(RowMap.of(rows, 8)) == "32000:0.0 1:1.32000 1:0.5+1.7 2:zero 8:mean"


def test_a_table_that_is_taken_whole() -> None:
    assert RowMap((Run(7, ((1, 0),)),)).is_whole(1, 7)
    assert RowMap(()).is_whole(0, 0)
    for other in (RowMap((Run(7, ((1, 0),)),), 1), RowMap((Run(6, ((1, 0),)),)), RowMap((Run(7, ((0, 0),)),))):
        assert not other.is_whole(1, 7)


def test_rows_in_no_order_at_all_make_a_text_of_sane_size() -> None:
    """A vocabulary of another family: no two rows follow each other."""
    count = 150_000
    made = RowMap.of(((0, row * 7919 % count),) for row in range(count))
    assert len(made.runs) == count
    assert len(json.dumps(str(made))) < 20 * count


@pytest.mark.parametrize("text", ["3", "0:0.1", "3:0", "3:0.1+", "1:mean 1:zero", "1:zero  1:mean", "x:zero", "1:-1.0"])
def test_anything_else_is_no_map(text: str) -> None:
    with pytest.raises(ValueError, match="not a map of rows"):
        RowMap.parse(text)
