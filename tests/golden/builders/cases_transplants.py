"""Fixed inputs for tables of another tokenizer, by the methods whose bits are the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kittybuild.model.rows import RowMap, Sources
from tests.golden.builders.cases import BF16, F32, F64, Case
from tests.jobs import drawn

COUNT, WIDTH = 1500, 90
DRAWN = {"seed": 7, "tensor": "embed"}


def transplanted(builder: str, name: str, dtype: Any = BF16, **params: Any) -> Case:
    """A case: of 1600 rows every third is made, and some are of no token."""
    tables = drawn("model", COUNT, WIDTH, dtype=dtype), drawn("donor", 1600, WIDTH, dtype=dtype)
    rows: list[Sources] = [((1, n),) if n % 3 == 0 else ((0, n * 7 % COUNT),) for n in range(1590)]
    pairs: list[Sources] = [((0, row[0][1]), (1, n)) for n, row in enumerate(rows) if row[0][0] == 0]
    maps = {"rows": str(RowMap.of([*rows, *[()] * 10])), "anchors": str(RowMap.of(pairs))}
    given = tables if builder == "common_interpolation" or "unused" in params else tables[:1]
    return Case(f"transplant_{builder}", name, given, {**maps, **params}, shape=(1600, WIDTH))


def cases() -> Iterator[Case]:
    """All cases. Never change one: add another."""
    unused = [str(RowMap.of(((0, row),) for row in (3, 4, 9))), str(RowMap.of(((0, row),) for row in (5, 6, 700)))]
    pieces = [tuple((0, (n * n + step) % COUNT) for step in range(n % 4)) for n in range(1600)]
    yield transplanted("zero", "zeros")
    for dtype, name in ((BF16, "bfloat16"), (F32, "float32"), (F64, "float64")):
        yield transplanted("mean", name, dtype)
        yield transplanted("common_interpolation", name, dtype, k=8, cosine_similarity=False, **DISTANCES)
    yield transplanted("mean", "untrained tokens, noise and scale", unused=unused, noise=0.25, scale=0.5, **DRAWN)
    yield transplanted("randn", "normal", **DRAWN)
    yield transplanted("common_interpolation", "cosines", k=70, cosine_similarity=True, **DISTANCES)
    for way in ("mean", "sum", "first", "last", "rising", "falling"):
        yield transplanted("subword", way, subword_method=way, pieces=str(RowMap.of(pieces)))


DISTANCES = {"weight_scheme": "distance_proportional"}
