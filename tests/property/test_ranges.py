"""Ranges of a file: what is here, what is missing, and what a download that was cut leaves."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kittybuild.checkpoint.sources.ranges import Ranges, joined, size_of, without

RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=6)


def members(ranges: object) -> set[int]:
    return {number for start, stop in ranges for number in range(start, stop)}  # type: ignore[attr-defined]


@given(RANGES, RANGES)
def test_joined_and_without_are_those_of_sets(some: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    whole, rest = joined(some), without(some, other)
    assert members(whole) == members(some)
    assert members(rest) == members(some) - members(other)
    for found in (whole, rest):
        assert size_of(found) == len(members(found))
        assert list(found) == sorted(found)
    assert all(first[1] < second[0] for first, second in itertools.pairwise(whole))


@given(RANGES, st.integers(0, 10))
def test_only_small_holes_are_filled(some: list[tuple[int, int]], gap: int) -> None:
    extra = without(joined(some, gap), some)
    assert all(stop - start <= gap for start, stop in extra)


class TestFile:
    def test_what_was_written_is_here_after_an_error(self, tmp_path: Path) -> None:
        part = Ranges(str(tmp_path / "a/part"), 100)

        def cut() -> None:
            with part.writing() as writer:
                writer.write(10, b"x" * 20)
                writer.write(30, b"y" * 5)
                raise ConnectionError

        with pytest.raises(ConnectionError):
            cut()
        assert part.here() == ((10, 35),)
        with part.writing() as writer:
            assert writer.done == [(10, 35)]
            writer.write(0, b"z" * 10)
        assert part.here() == ((0, 35),)
        assert (tmp_path / "a/part").read_bytes() == b"z" * 10 + b"x" * 20 + b"y" * 5 + bytes(65)

    def test_a_list_without_its_file_counts_for_nothing(self, tmp_path: Path) -> None:
        part = Ranges(str(tmp_path / "part"), 100)
        with part.writing() as writer:
            writer.write(0, b"x" * 50)
        (tmp_path / "part").unlink()
        assert part.here() == ()
        with part.writing() as writer:
            assert writer.done == []
            writer.write(90, b"y" * 10)
        assert part.here() == ((90, 100),)

    @pytest.mark.parametrize("text", ["", "[[0, 101]]", "[[5, 5]]", "[[-1, 3]]", "{}x", "[1]", '[["a", 2]]'])
    def test_a_damaged_list_counts_for_nothing(self, tmp_path: Path, text: str) -> None:
        part = Ranges(str(tmp_path / "part"), 100)
        with part.writing() as writer:
            writer.write(0, b"x")
        (tmp_path / "part.json").write_text(text, encoding="utf-8")
        assert part.here() == ()

    def test_a_file_of_another_size_counts_for_nothing(self, tmp_path: Path) -> None:
        with Ranges(str(tmp_path / "part"), 100).writing() as writer:
            writer.write(0, b"x" * 10)
        assert json.loads((tmp_path / "part.json").read_text(encoding="utf-8")) == [[0, 10]]
        assert Ranges(str(tmp_path / "part"), 99).here() == ()
