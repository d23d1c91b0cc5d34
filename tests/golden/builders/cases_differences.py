"""Fixed inputs for the methods that make differences from the base sparse. Never change one: add another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.golden.builders.cases import BF16, F16, F32, F64, SHAPE, Case, extremes, siblings
from tests.jobs import drawn

PLAIN: dict[str, Any] = {
    "weight": [0.6, 0.45],
    "density": [0.2, 0.7],
    "normalize": True,
    "lambda": 1.0,
    "rescale": "none",
}
SIGNED: dict[str, Any] = {**PLAIN, "weight": [0.6, -0.45], "normalize": False, "lambda": 0.8}
SEED: dict[str, Any] = {"seed": 7, "tensor": "model.layers.0.mlp.up_proj.weight"}
LARGE = (1100, 2000)
"""More elements than are selected in memory."""


def cases() -> Iterator[Case]:
    """All cases."""
    yield from _trimmed()
    yield from _dare()
    yield from _della()
    yield from _voted()


def _trimmed() -> Iterator[Case]:
    for form in ("l2", "linf", "density"):
        yield Case("ties", f"float32, rescaled by {form}", siblings(3, F32), {**PLAIN, "rescale": form})
    yield Case("ties", "bfloat16, large", siblings(3, BF16, shape=LARGE), PLAIN)
    yield Case("ties", "float64, large", siblings(2, F64, shape=LARGE), {**PLAIN, "weight": [1.0], "density": [0.4]})
    for method in ("breadcrumbs", "breadcrumbs_ties"):
        banded = {**PLAIN, "gamma": [0.01, 0.1]}
        yield Case(method, "bfloat16", siblings(3, BF16), banded)
        yield Case(method, "float32, signed", siblings(3, F32), {**SIGNED, "gamma": [0.0, 0.3], "rescale": "l1"})
        yield Case(method, "float64", siblings(3, F64), {**banded, "rescale": "linf"})
        yield Case(method, "extremes", extremes(3), {**banded, "density": [0.4, 0.9]})
        yield Case(method, "float16, large", siblings(3, F16, shape=LARGE), banded)


def _dare() -> Iterator[Case]:
    for method in ("dare_ties", "dare_linear"):
        yield Case(method, "bfloat16", siblings(3, BF16), {**PLAIN, **SEED, "rescale": "l1"})
        yield Case(method, "float32, signed", siblings(3, F32), {**SIGNED, **SEED, "rescale": "l2"})
        yield Case(method, "float64", siblings(3, F64), {**PLAIN, **SEED, "rescale": "probability"})
        yield Case(method, "extremes", extremes(3), {**PLAIN, **SEED, "rescale": "density"})
        yield Case(method, "another seed", siblings(3, F16), {**PLAIN, **SEED, "seed": 2**63})
        yield Case(method, "another tensor", siblings(3, F16), {**PLAIN, **SEED, "tensor": "модель.weight"})
        yield Case(method, "whole", siblings(3, F32), {**PLAIN, **SEED, "density": [1.0, 0.0], "rescale": "l1"})


def _della() -> Iterator[Case]:
    ranked: dict[str, Any] = {**PLAIN, **SEED, "density": [0.3, 0.7], "epsilon": [0.15, 0.2]}
    for method in ("della", "della_linear"):
        yield Case(method, "bfloat16", siblings(3, BF16), {**ranked, "rescale": "l1"})
        yield Case(method, "float32, signed", siblings(3, F32), {**SIGNED, **SEED, "epsilon": [0.1, 0.0]})
        yield Case(method, "float64", siblings(3, F64), {**ranked, "rescale": "probability"})
        yield Case(method, "float32, by probability", siblings(3, F32), {**ranked, "rescale": "probability"})
        yield Case(method, "extremes", extremes(3), {**ranked, "rescale": "l2"})
        yield Case(method, "rows of one", siblings(3, F32, shape=(700, 1)), {**ranked, "rescale": "l1"})
        yield Case(method, "one row", siblings(3, BF16, shape=(70_001,)), {**ranked, "rescale": "l1"})
        yield Case(method, "rows of rows", siblings(3, BF16, shape=(3, 50, 70)), {**ranked, "rescale": "linf"})


def _voted() -> Iterator[Case]:
    near = drawn("apart", *SHAPE, dtype=F64) * 0.01
    alike = (*siblings(2, F64), siblings(2, F64)[1] + near)
    for method in ("consensus_ta", "consensus_ties"):
        voted = {**PLAIN, "lambda": [0.4, 0.9], "k": 1}
        yield Case(method, "bfloat16", siblings(3, BF16), voted)
        yield Case(
            method, "float32, signed", tuple(t.to(F32) for t in alike), {**voted, **SIGNED, "lambda": [0.2, 0.3]}
        )
        yield Case(method, "float64, both", alike, {**voted, "k": 2})
        yield Case(method, "extremes", extremes(3), voted)
    yield Case(
        "consensus_ties",
        "bfloat16, rescaled",
        siblings(3, BF16),
        {**PLAIN, "lambda": [0.4, 0.9], "k": 1, "rescale": "l1"},
    )
