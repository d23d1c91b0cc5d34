"""Fixed inputs for what routers and changed experts are made of."""

from __future__ import annotations

from collections.abc import Iterator

from tests.golden.builders.cases import BF16, F16, F32, F64, Case
from tests.jobs import drawn


def cases() -> Iterator[Case]:
    """All cases. Never change one: add another."""
    sides = {"experts": [[[0, 1, 7], [7, 1, 3]], [[10, 1, 5], None]]}
    for dtype, name in ((BF16, "bfloat16"), (F32, "float32"), (F64, "float64")):
        yield Case("router_embeddings", name, (drawn("tokens", 15, 90, dtype=dtype),), sides, dtype, (2, 90))
    for normal in (True, False):
        name = "normal" if normal else "uniform"
        params = {"normal": normal, "seed": 7, "tensor": "router"}
        yield Case("router_random", f"{name} float32", (), params, F32, (3, 30_000))
        yield Case("router_random", f"{name} bfloat16", (), params, BF16, (3, 30_000))
    for dtype, name in ((BF16, "bfloat16"), (F16, "float16"), (F32, "float32"), (F64, "float64")):
        weight = (drawn("expert", 300, 400, dtype=dtype),)
        noisy = {"noise": 0.01, "factor": 1.0, "seed": 7, "tensor": "0.1.down"}
        yield Case("expert", f"noise on {name}", weight, noisy)
        yield Case("expert", f"noise and a factor on {name}", weight, {**noisy, "factor": 0.7})
        yield Case("expert", f"a factor on {name}", weight, {"noise": 0.0, "factor": 1 / 3})
    yield Case("zeros", "bfloat16", (), {}, BF16, (100,))
