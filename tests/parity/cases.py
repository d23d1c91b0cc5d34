"""The merges that are compared: mergekit configurations over pico siblings, the same words for both programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.helpers import load_tensors, noise, pico_llama, write_model

LAYERS, WIDTH = 4, 64
GRADIENT = [0, 0.5, 0.3, 0.7, 1]
COARSE = ("task_arithmetic", "task_arithmetic, normalize", "ties, density 0.5", "ties, density 1.0")
Config = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A configuration over the models of a set.

    `exact`: bit for bit; `ties`: equals at a threshold may differ; `coarse`: mergekit rounds each step to bfloat16.
    """

    name: str
    config: Config
    exact: bool = False
    ties: bool = False
    coarse: bool = False


def write_models(folder: Path, dtype: str) -> None:
    """A base, siblings near it, one very near, a stranger; and two whose differences take few values."""
    plain: dict[str, Any] = {"layers": LAYERS, "width": WIDTH, "dtype": dtype}
    base = pico_llama(folder / "base", 1, **plain)
    pico_llama(folder / "stranger", 2, **plain)
    for seed, name in enumerate(("a", "b", "c"), start=10):
        pico_llama(folder / name, seed, base=base, spread=0.02)
    pico_llama(folder / "twin", 20, base=base, spread=0.0005)
    tensors, config = load_tensors(base), json.loads((base / "config.json").read_text(encoding="utf-8"))
    for seed, name in enumerate(("few", "fewer"), start=30):
        steps = {n: torch.round(noise(seed, n, tuple(t.shape))) / 4096 for n, t in tensors.items()}
        write_model(folder / name, {n: (t.float() + steps[n]).to(t.dtype) for n, t in tensors.items()}, config)


def cases(dtype: str) -> Iterator[Case]:
    """All cases for models of that dtype."""
    yield from _linear(dtype)
    yield from _slerp()
    yield from _passthrough()
    if dtype == "float32":
        yield from _differences({})
        return
    # mergekit computes differences in the dtype of the models; told to compute in float32, it does what we always do.
    for case in _differences({"dtype": "float32", "out_dtype": dtype}):
        yield replace(case, name=f"{case.name}, in float32")
    for case in _differences({}):
        if case.name in COARSE:
            yield replace(case, name=f"{case.name}, in bfloat16", coarse=True)


def models(**parameters: Any) -> list[Config]:
    """A list of models with their parameters: `a={"weight": 1}`."""
    return [{"model": name, "parameters": given} for name, given in parameters.items()]


def shared(**parameters: Any) -> Config:
    """Parameters of the whole merge; `lambda_` is lambda."""
    return {"parameters": {name.rstrip("_"): value for name, value in parameters.items()}}


def filtered(attention: Any, mlp: Any, rest: Any) -> list[Config]:
    """A setting by tensor name."""
    return [{"filter": "self_attn", "value": attention}, {"filter": "mlp", "value": mlp}, {"value": rest}]


def _linear(dtype: str) -> Iterator[Case]:
    linear: Config = {"merge_method": "linear"}
    three = models(a={"weight": 0.5}, b={"weight": 0.3}, c={"weight": 0.4})
    by_layer = models(
        a={"weight": filtered(GRADIENT, 0.25, 0.5)}, b={"weight": [1, 0.2]}, c={"weight": [0.1, 0.9, 0.3]}
    )
    yield Case("linear, 3 models", {**linear, "models": three})
    yield Case("linear, not normalized", {**linear, "models": three, **shared(normalize=False)})
    yield Case("linear, gradients and filters", {**linear, "models": by_layer})
    yield Case("linear, negative weight", {**linear, "models": models(base={"weight": 1.5}, a={"weight": -0.4})})
    yield Case("linear, base appended", {**linear, "base_model": "base", "models": three, **shared(weight=0.2)})
    if dtype == "float32":
        yield Case("linear, out_dtype bfloat16", {**linear, "models": three, "out_dtype": "bfloat16"})
        yield Case("linear, out_dtype float16", {**linear, "models": three, "out_dtype": "float16"})


def _slerp() -> Iterator[Case]:
    slerp: Config = {"merge_method": "slerp", "base_model": "base"}
    by_layer = shared(t=filtered(GRADIENT, GRADIENT[::-1], 0.5))
    for other in ("stranger", "a", "twin"):
        yield Case(f"slerp with {other}, t 0.3", {**slerp, "models": [{"model": other}], **shared(t=0.3)})
    yield Case("slerp, gradient and filters", {**slerp, "models": [{"model": "stranger"}], **by_layer})
    sources = [{"model": "base", "layer_range": [0, LAYERS]}, {"model": "stranger", "layer_range": [0, LAYERS]}]
    yield Case("slerp, slices, gradient and filters", {**slerp, "slices": [{"sources": sources}], **by_layer})
    yield Case("slerp, base second", {**slerp, "models": [{"model": "stranger"}, {"model": "base"}], **shared(t=0.8)})


def _passthrough() -> Iterator[Case]:
    def part(model: str, first: int, last: int, **parameters: Any) -> Config:
        source: Config = {"model": model, "layer_range": [first, last]}
        return {"sources": [{**source, "parameters": parameters} if parameters else source]}

    damped = {"scale": [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.3}, {"value": 1.0}]}
    stacked = {"merge_method": "passthrough", "slices": [part("a", 0, 3), part("stranger", 1, 4), part("a", 3, 4)]}
    yield Case("passthrough, frankenmerge", stacked, exact=True)
    upscaled = {**stacked, "slices": [part("a", 0, 3), part("a", 1, 3, **damped), part("a", 3, 4)]}
    yield Case("passthrough, scaled layers", upscaled)


def _differences(dtypes: Config) -> Iterator[Case]:
    task: Config = {"merge_method": "task_arithmetic", "base_model": "base", **dtypes}
    two = models(a={"weight": 0.6}, b={"weight": 0.7})
    signed = models(a={"weight": 0.6}, b={"weight": -0.3}, c={"weight": 0.2})
    yield Case("task_arithmetic", {**task, "models": two})
    yield Case("task_arithmetic, lambda, signed", {**task, "models": signed, **shared(lambda_=0.8)})
    yield Case("task_arithmetic, normalize", {**task, "models": two, **shared(normalize=True, lambda_=1.2)})

    ties: Config = {"merge_method": "ties", "base_model": "base", **dtypes}
    for density in (0.2, 0.5, 1.0):
        given = models(a={"weight": 0.6}, b={"weight": 0.7}, c={"weight": 0.5})
        yield Case(f"ties, density {density}", {**ties, "models": given, **shared(density=density)}, ties=True)
    yield Case("ties, negative weight", {**ties, "models": signed, **shared(density=0.5)}, ties=True)
    loose = shared(density=0.4, normalize=False, lambda_=0.9, int8_mask=True)
    yield Case("ties, not normalized", {**ties, "models": two, **loose}, ties=True)
    yield Case("ties, rescaled", {**ties, "models": two, **shared(density=0.3, rescale=True)}, ties=True)
    by_layer = models(
        a={"weight": 0.5, "density": filtered(GRADIENT, 0.3, 0.6)}, b={"weight": [0.2, 1], "density": 0.5}
    )
    yield Case("ties, gradients and filters", {**ties, "models": by_layer}, ties=True)
    few = models(few={"weight": 0.6}, fewer={"weight": 0.7})
    yield Case("ties, differences of few values", {**ties, "models": few, **shared(density=0.3)}, ties=True)
    one = {**ties, "models": few[:1], **shared(density=0.3)}
    yield Case("ties, one model of few values", one, ties=True)
