"""Fixed inputs for the portable builders of adapters."""

from __future__ import annotations

from collections.abc import Iterator

from tests.golden.builders.cases import BF16, F32, F64, Case
from tests.jobs import drawn


def cases() -> Iterator[Case]:
    """All of them."""
    a, b = drawn("A1", 16, 500), drawn("B1", 300, 16)
    weight = drawn("base", 300, 500, dtype=BF16)
    magnitude = drawn("m", 300).abs() + 1
    plain = {"scales": [2.0], "weights": [0.7], "magnitudes": [True]}
    yield Case("dora", "bfloat16", (weight, a, b, magnitude), plain)
    both = {"scales": [2.0, 0.3], "weights": [1.0, -1 / 3], "magnitudes": [True, False]}
    others = drawn("A2", 3, 500, dtype=BF16), drawn("B2", 300, 3, dtype=BF16)
    yield Case("dora", "float32, beside a plain adapter", (weight.float(), a, b, magnitude, *others), both)
    kernel = drawn("kernel", 30, 20, 3, 3), drawn("Ak", 4, 20, 3, 3), drawn("Bk", 30, 4, 1, 1)
    yield Case("lora", "convolution", kernel, {"scales": [0.5], "transposed": False})
    scales = {"scales": [0.7, -1 / 3]}
    yield Case("lora_joined", "A", (a, others[0]), {"side": "A", **scales}, F32, (19, 500))
    yield Case("lora_joined", "B", (b, others[1]), {"side": "B", **scales}, BF16, (300, 19))
    rows = drawn("rows", 6, 30 + 50 + 2).abs()
    for share in ("none", "root", "whole"):
        given = {"rank": 4, "out": 30, "share": share}
        yield Case("lora_side", f"A, {share}", (rows,), {"side": "A", **given}, F32, (4, 50))
        yield Case("lora_side", f"B, {share}", (rows.double(),), {"side": "B", **given}, BF16, (30, 4))
    yield Case("spectrum", "float32", (rows,), {}, F64, (6, 2))
