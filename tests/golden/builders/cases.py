"""Fixed inputs for every builder. Run as a program, it prints the digests of all that the builders make of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kittybuild.builders.base import BLOCK
from tests.jobs import drawn, make

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SHAPE = (150, 700)  # two leaves, the second of them short
EXTREMES = (0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, 1e-40, 3e38, -3e38, 65504.0, 6e-8, 1.0, -1 / 3)


@dataclass(frozen=True)
class Case:
    """One builder on fixed inputs."""

    builder: str
    name: str
    inputs: tuple[Tensor, ...]
    params: dict[str, Any]
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] | None = None

    def digest(self) -> str:
        """The digest of what is made of them."""
        return make(self.builder, self.inputs, self.params, dtype=self.dtype, shape=self.shape, blocks=1).digest.hex


def siblings(count: int, dtype: torch.dtype, *, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, ...]:
    """A model's tensor and others near it; in a short dtype most of their differences are equal to many others."""
    base = drawn("base", *shape, dtype=F64)
    near = (base + drawn(f"sibling {i}", *shape, dtype=F64, scale=0.02) for i in range(1, count))
    return tuple(tensor.to(dtype) for tensor in (base, *near))


def extremes(count: int, dtype: torch.dtype = F32) -> tuple[Tensor, ...]:
    """The smallest, the largest, zeros of both signs, each against each."""
    every = torch.tensor(EXTREMES).repeat(len(EXTREMES))
    each = torch.tensor(EXTREMES).repeat_interleave(len(EXTREMES))
    return tuple(t.to(dtype) for t in (every / 4, each / 4, every.flip(0) / 8)[:count])


def cases() -> Iterator[Case]:
    """All cases. Never change one: add another."""
    yield from _linear()
    yield from _slerp()
    yield from _differences()
    yield from _copies()
    yield from _lora()


def _linear() -> Iterator[Case]:
    three = {"weight": [0.3, 0.6, 0.25], "normalize": True}
    yield Case("linear", "bfloat16", siblings(3, BF16), three)
    yield Case("linear", "float16 to float32", siblings(3, F16), three, F32)
    yield Case("linear", "float64, not normalized", siblings(2, F64), {"weight": [1.0, -1 / 3], "normalize": False})
    yield Case("linear", "mixed dtypes", (*siblings(2, BF16), siblings(3, F32)[2]), three)
    yield Case("linear", "extremes", extremes(3), {**three, "weight": [0.7, -0.2, 1.0]})
    bad = torch.tensor([float("nan"), -float("nan"), float("inf"), -float("inf"), 1.0]).repeat(33)
    for dtype in (F32, BF16, F16):  # NaN from the inputs, of both signs, and NaN that arises
        name = f"NaN to {str(dtype).removeprefix('torch.')}"
        yield Case("linear", name, (bad, bad.flip(0)), {"weight": [0.5, 0.25], "normalize": True}, dtype)


def _slerp() -> Iterator[Case]:
    apart = (drawn("one", *SHAPE, dtype=BF16), drawn("two", *SHAPE, dtype=BF16))
    yield Case("slerp", "bfloat16", apart, {"t": 0.3})
    yield Case("slerp", "bfloat16, almost parallel", siblings(2, BF16), {"t": 0.3})
    yield Case("slerp", "float32 to bfloat16", tuple(t.float() for t in apart), {"t": 0.9}, BF16)
    yield Case("slerp", "float64", (drawn("one", *SHAPE, dtype=F64), drawn("two", *SHAPE, dtype=F64)), {"t": 0.5})
    yield Case("slerp", "many leaves", (drawn("l", 3 * BLOCK + 1), drawn("m", 3 * BLOCK + 1)), {"t": 1 / 3})
    yield Case("slerp", "zeros", (torch.zeros(70), drawn("two", 70)), {"t": 0.25})


def _differences() -> Iterator[Case]:
    plain: dict[str, Any] = {"weight": [0.6, 0.45], "normalize": True, "lambda": 1.0}
    signed = {"weight": [0.6, -0.45], "normalize": False, "lambda": 0.8}
    yield Case("task_arithmetic", "bfloat16", siblings(3, BF16), plain)
    yield Case("task_arithmetic", "float32, signed", siblings(3, F32), signed)
    yield Case("task_arithmetic", "float64", siblings(3, F64), plain)
    yield Case("task_arithmetic", "extremes", extremes(3), signed)
    plain, signed = {**plain, "rescale": "none"}, {**signed, "rescale": "none"}
    trimmed = {**plain, "density": [0.2, 0.7]}
    yield Case("ties", "bfloat16", siblings(3, BF16), trimmed)
    yield Case("ties", "float16, whole", siblings(3, F16), {**trimmed, "density": [1.0, 1.0]})
    yield Case("ties", "float32, signed", siblings(3, F32), {**signed, "density": [0.5, 0.5]})
    yield Case("ties", "float64", siblings(3, F64), trimmed)
    yield Case("ties", "extremes", extremes(3), {**signed, "normalize": True, "density": [0.4, 0.0]})
    yield Case("ties", "bfloat16, rescaled", siblings(3, BF16), {**trimmed, "rescale": "l1"})
    one = {**plain, "weight": [0.9], "lambda": 0.5, "density": [0.31]}
    yield Case("ties", "one model of few values", tuple((t * 4).round() for t in siblings(2, F32)), one)


def _copies() -> Iterator[Case]:
    yield Case("passthrough", "bfloat16", siblings(1, BF16), {"scale": [0.3]})
    yield Case("passthrough", "extremes", extremes(1), {"scale": [-1 / 3]}, F16)
    for dtype in (BF16, F16, torch.float8_e4m3fn, torch.float8_e5m2):
        yield Case("cast", f"float32 to {str(dtype).removeprefix('torch.')}", siblings(1, F32), {}, dtype)
    yield Case("cast", "bfloat16 to float64", siblings(1, BF16), {}, F64)
    yield Case("cast", "float64 to bfloat16", siblings(1, F64), {}, BF16)
    yield Case("cast", "float64 to float16", siblings(1, F64), {}, F16)
    yield Case("cast", "extremes to bfloat16", extremes(1), {}, BF16)
    integers = (drawn("integers", 1000) * 1e9).long()
    yield Case("same", "int64", (integers, integers), {})


def _lora() -> Iterator[Case]:
    weight, other = siblings(2, BF16, shape=(300, 500))
    one = (drawn("A1", 16, 500), drawn("B1", 300, 16))
    two = (drawn("A2", 3, 500, dtype=BF16), drawn("B2", 300, 3, dtype=BF16))
    yield Case("lora", "bfloat16", (weight, *one), {"scales": [2.0], "transposed": False})
    yield Case("lora", "two adapters", (other, *one, *two), {"scales": [0.7, -1 / 3], "transposed": False})
    yield Case("lora", "transposed float32", (weight.T.float(), *one), {"scales": [2.0], "transposed": True})
    yield Case("lora", "float64", (weight.double(), *two), {"scales": [1.5], "transposed": False})
    steps = torch.tensor([2.0**e for e in range(-149, 128)], dtype=F64)
    wide = ((drawn("Aw", 2, 277) * steps).float(), (drawn("Bw", 277, 2) / steps.clamp(1e-38)[:, None]).float())
    yield Case(
        "lora", "factors of every magnitude", (torch.zeros(277, 277), *wide), {"scales": [1.0], "transposed": False}
    )


def digests() -> dict[str, dict[str, str]]:
    """The digest of each case, by builder and name."""
    from tests.golden.builders import (  # they import this
        cases_adapters,
        cases_differences,
        cases_geometry,
        cases_mixtures,
        cases_tables,
        cases_transplants,
    )

    found: dict[str, dict[str, str]] = {}
    more = (cases_differences, cases_geometry, cases_tables, cases_transplants, cases_adapters, cases_mixtures)
    for case in (*cases(), *(case for module in more for case in module.cases())):
        assert case.name not in found.setdefault(case.builder, {}), case
        found[case.builder][case.name] = case.digest()
    return found


if __name__ == "__main__":
    print(json.dumps(digests()))
