"""Fixed inputs for the methods that work on angles and statistics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kittybuild.builders.base import BLOCK
from tests.golden.builders.cases import BF16, F16, F32, F64, SHAPE, Case, extremes, siblings
from tests.jobs import drawn


def apart(count: int, dtype: torch.dtype, *, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, ...]:
    """Models in all directions."""
    return tuple(drawn(f"apart {index}", *shape, dtype=dtype) for index in range(count))


def spoilt(count: int) -> tuple[Tensor, ...]:
    """Models of which the last has what is not finite in one row."""
    tensors = apart(count, F32, shape=(20, 30))
    tensors[-1][7, 3:6] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    return tensors


def cases() -> Iterator[Case]:
    """All cases. Never change one: add another."""
    yield from _arcs()
    yield from _means()
    yield from _differences()
    yield from _pairs()


def _arcs() -> Iterator[Case]:
    weights = {"weight": [0.4, 0.7], "base": False}
    based: dict[str, Any] = {**weights, "base": True}
    yield Case("slerp", "weights, bfloat16", apart(2, BF16), {"t": None, **weights})
    yield Case("slerp", "weights and a base, float32", siblings(3, F32), {"t": None, **based})
    yield Case("slerp", "weights, float64", apart(2, F64), {"t": None, **weights})
    modes = {"whole": (True, False), "rows": (False, False), "columns": (False, True)}
    for mode, (flat, columns) in modes.items():
        how = {"nuslerp_flatten": flat, "nuslerp_row_wise": columns}
        yield Case("nuslerp", f"{mode}, bfloat16", apart(2, BF16), {**weights, **how})
        yield Case("nuslerp", f"{mode} with a base, float32", siblings(3, F32), {**based, **how})
        yield Case("nuslerp", f"{mode}, float64", apart(2, F64), {**weights, **how, "weight": [-0.4, 1.7]})
        yield Case("nuslerp", f"{mode}, three dimensions", apart(2, F32, shape=(70, 11, 130)), {**weights, **how})
        yield Case("nuslerp", f"{mode}, extremes", extremes(2), {**weights, **how})
        yield Case("nuslerp", f"{mode}, not finite", spoilt(2), {**weights, **how})
    yield Case(
        "nuslerp", "rows of three", apart(2, F32, shape=(40_000, 3)), {**weights, **how, "nuslerp_row_wise": False}
    )


def _means() -> Iterator[Case]:
    plain = {"weight": [0.4, 0.7, 0.1], "normalize_weights": True, "eps": 1e-8, "base": False}
    yield Case("multislerp", "bfloat16", apart(3, BF16), plain)
    yield Case("multislerp", "float32 with a base", siblings(4, F32), {**plain, "base": True})
    yield Case("multislerp", "float64, signed", apart(3, F64), {**plain, "weight": [2.0, -0.3, 1.0]})
    yield Case("multislerp", "not normalized", apart(3, F16), {**plain, "normalize_weights": False})
    one = drawn("one", 5000)
    yield Case("multislerp", "opposites", (one, -one), {**plain, "weight": [0.5, 0.5]})
    yield Case("multislerp", "extremes", extremes(3), plain)
    yield Case("multislerp", "not finite", spoilt(3), plain)
    few, many = {"max_iter": 10, "tol": 1e-5}, {"max_iter": 100, "tol": 1e-12}
    yield Case("karcher", "bfloat16", apart(3, BF16), few)
    yield Case("karcher", "float32, near each other", siblings(5, F32), few)
    yield Case("karcher", "float64", apart(4, F64), many)
    yield Case("karcher", "many leaves", apart(3, F32, shape=(3 * BLOCK + 1,)), many)
    yield Case("karcher", "opposites and a zero", (one, -one, torch.zeros(5000)), few)
    yield Case("karcher", "extremes", extremes(3), few)
    yield Case("karcher", "not finite", spoilt(3), few)


def _differences() -> Iterator[Case]:
    both = {"whole": {"filter_wise": False}, "rows": {"filter_wise": True}}
    for mode, how in both.items():
        yield Case("model_stock", f"{mode}, bfloat16", siblings(3, BF16), how)
        yield Case("model_stock", f"{mode}, float32", siblings(4, F32), how)
        yield Case("model_stock", f"{mode}, float64", siblings(3, F64), how)
        yield Case("model_stock", f"{mode}, extremes", extremes(3), how)
        yield Case("model_stock", f"{mode}, not finite", spoilt(3), how)
    some, every = {"select_topk": 0.3}, {"select_topk": 1.0}
    yield Case("sce", "bfloat16", siblings(4, BF16), some)
    yield Case("sce", "bfloat16, everything", siblings(4, BF16), every)
    yield Case("sce", "float32", siblings(3, F32), some)
    yield Case("sce", "float64", siblings(3, F64), some)
    yield Case("sce", "few values", tuple((t * 4).round() for t in siblings(4, F32)), {"select_topk": 0.55})
    yield Case("sce", "extremes", extremes(3), every)
    yield Case("sce", "not finite", spoilt(4), some)
    plus = {"r": 0.1, "alpha": 0.2}
    for builder, more in (("ram", {}), ("ramplus_tl", plus)):
        yield Case(builder, "bfloat16", siblings(4, BF16), {"epsilon": 1e-3, **more})
        yield Case(builder, "float32", siblings(4, F32), {"epsilon": 4e-3, **more})
        yield Case(builder, "float64", siblings(3, F64), {"epsilon": 1e-5, **more})
        yield Case(builder, "extremes", extremes(3), {"epsilon": 0.0, **more})
        yield Case(builder, "not finite", spoilt(4), {"epsilon": 0.2, **more})


def _pairs() -> Iterator[Case]:
    yield Case("nearswap", "bfloat16", siblings(2, BF16), {"t": 0.002})
    yield Case("nearswap", "float32", siblings(2, F32), {"t": 0.001})
    yield Case("nearswap", "float64", siblings(2, F64), {"t": 1 / 3000})
    yield Case("nearswap", "extremes", extremes(2), {"t": 1e-7})
    yield Case("nearswap", "not finite", spoilt(2), {"t": 0.1})
    for dtype in (BF16, F32, F64):
        yield Case("arcee_fusion", str(dtype).removeprefix("torch."), siblings(2, dtype), {})
    yield Case("arcee_fusion", "apart", apart(2, F16), {})
    yield Case("arcee_fusion", "one row", siblings(2, F32, shape=(100_000,)), {})
    yield Case("arcee_fusion", "three dimensions", apart(2, F32, shape=(70, 11, 130)), {})
    yield Case("arcee_fusion", "few elements", siblings(2, F32, shape=(2, 2)), {})
    yield Case("arcee_fusion", "extremes", extremes(2), {})
    yield Case("arcee_fusion", "not finite", spoilt(2), {})
