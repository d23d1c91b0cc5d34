"""The merges that each class of a peer's arithmetic must give bit for bit, over pico siblings and over real ones.

A configuration is the same words for the peer and for kittybuild. Models are folders, named `name-dtype`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kittybuild.builders.registry import BUILTIN
from tests.helpers import load_tensors, noise, pico_llama, write_model, write_tokenizer

DTYPES = ("bfloat16", "float16", "float32", "float64")
CASTS = DTYPES[:3]
"""What all peers know as a `dtype`."""
PEERS = ("mergekit-0.1.5", "mergekit-0.1.4", "mergekitty-0.3")
LAYERS, WIDTH = 3, 32
OUT_OF_REACH = {
    "dare_ties, dare_linear, della and della_linear with a density below 1": (
        "they draw random numbers from one stream, in the order of the peer's work: their distribution is reproduced"
    ),
    "arcee_fusion of tensors above 1,000,000 elements": "its quantiles are those of a random sample",
    "a peer on several threads": (
        "torch cuts a sum over more than 32,768 elements by their number, and rounds otherwise; kittybuild makes what"
        " the peer makes on one"
    ),
    "an order of models other than the text's": (
        "that of a Python set, which the peer's hash seed decides (multislerp and sce of mergekit 0.1.4, vocabularies"
        " of mergekitty)"
    ),
    "vocabularies of models of several dtypes in mergekitty": "their dtype is that of one of them, by the same order",
    "sce of mergekit 0.1.4 where nothing varies": (
        "it writes the base's numbers with one dimension more, a tensor that no model can load"
    ),
    "integer tensors in mergekit 0.1.4 and mergekitty": (
        "they compute with them; kittybuild takes them over where they are the same, and refuses them where not"
    ),
    "the sign of NaN": "kittybuild writes one NaN",
}
"""What no class of a peer's arithmetic promises, and why."""
GRADIENT = [0.1, 0.5, 0.3, 0.7, 1.0]
Config = dict[str, Any]
Models = Mapping[str, Mapping[str, Any]]
"""Parameters by name of a model."""


@dataclass(frozen=True)
class Case:
    """A configuration. `dtype` tells cases of one name apart. Tensors with one of `without` in their name are not
    compared: see OUT_OF_REACH.
    """

    name: str
    dtype: str
    config: Config
    without: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Tells it from all others of its peer."""
        return f"{self.name}, {self.dtype}"

    @property
    def method(self) -> str:
        """The merge method."""
        return str(self.config["merge_method"])


def write_pico(folder: Path) -> None:
    """Of each dtype a base, siblings, one far away, one that is the base, two whose differences take few values; and
    one with more tokens, and one whose layers are of another shape.
    """
    base = pico_llama(folder / "base-float32", 1, layers=LAYERS, width=WIDTH, dtype="float32", tokenizer=True)
    for seed, name in enumerate(("a", "b", "c"), start=10):
        pico_llama(folder / f"{name}-float32", seed, base=base, spread=0.02, tokenizer=True)
    pico_llama(folder / "far-float32", 2, layers=LAYERS, width=WIDTH, dtype="float32", tokenizer=True)
    tensors, config = load_tensors(base), json.loads((base / "config.json").read_text(encoding="utf-8"))
    write_model(folder / "same-float32", tensors, config)
    for seed, name in enumerate(("few", "fewer"), start=30):
        steps = {
            n: torch.round(noise(seed, n, tuple(t.shape))) / (1024 if t.dim() > 1 else 64) for n, t in tensors.items()
        }
        write_model(
            folder / f"{name}-float32", {n: t.bfloat16().float() + steps[n] for n, t in tensors.items()}, config
        )
    pico_llama(folder / "wide-float32", 14, layers=LAYERS, width=WIDTH, vocab=80, dtype="float32")
    inner = config["intermediate_size"] * 3 // 4
    thin = {n: t[:inner] if "gate" in n or "up_proj" in n else t for n, t in load_tensors(folder / "a-float32").items()}
    thin = {n: t[:, :inner].contiguous() if "down_proj" in n else t for n, t in thin.items()}
    write_model(folder / "thin-float32", thin, {**config, "intermediate_size": inner})
    for model in sorted(folder.glob("*-float32")):
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        write_tokenizer(model, config["vocab_size"])
        for dtype in DTYPES:
            narrow = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_tensors(model).items()}
            other = folder / model.name.replace("float32", dtype)
            write_model(other, narrow, {**config, "torch_dtype": dtype})
            write_tokenizer(other, config["vocab_size"])


def cases(numerics: str) -> tuple[Case, ...]:
    """All cases on pico models for a class."""
    found = [case for dtype in DTYPES for case in _of(numerics, dtype)]
    return (*found, *_mixed(numerics))


def _of(numerics: str, dtype: str) -> Iterator[Case]:
    known = {method.name: method for method in BUILTIN.methods(numerics)}
    for family in (_sums, _arcs, _differences, _sparse, _consensus, _selective, _slices, _shapes, _casts):
        for name, config in family(numerics):
            method = known.get(config["merge_method"])
            shared = config.get("parameters", {})
            if method and all(method.param(parameter) for parameter in shared):
                yield Case(name, dtype, _with_dtype(config, dtype))


def _with_dtype(value: Any, dtype: str) -> Any:
    """A configuration whose models are of that dtype."""
    if isinstance(value, dict):
        folders = ("model", "base_model")
        return {k: f"{v}-{dtype}" if k in folders and "-" not in v else _with_dtype(v, dtype) for k, v in value.items()}
    return [_with_dtype(item, dtype) for item in value] if isinstance(value, list) else value


def merge(method: str, models: Models | str, base: str | None = None, **shared: Any) -> Config:
    """A merge of whole models; `lambda_` is lambda. Names that are no parameters go to the top level."""
    given = {name: {} for name in models.split()} if isinstance(models, str) else models
    listed = [{"model": name, **({"parameters": dict(own)} if own else {})} for name, own in given.items()]
    top = {name: shared.pop(name) for name in ("dtype", "out_dtype") if name in shared}
    parameters = {name.rstrip("_"): value for name, value in shared.items()}
    config: Config = {"merge_method": method, "models": listed, **top}
    if parameters:
        config["parameters"] = parameters
    return {**config, "base_model": base} if base else config


def weights(**given: float | list[Any]) -> dict[str, dict[str, Any]]:
    """Models with their weights."""
    return {name: {"weight": value} for name, value in given.items()}


def filtered(attention: Any, mlp: Any, rest: Any) -> list[Config]:
    """A setting by tensor name."""
    return [{"filter": "self_attn", "value": attention}, {"filter": "mlp", "value": mlp}, {"value": rest}]


Named = Iterator[tuple[str, Config]]
TWO = weights(a=0.6, b=0.7)
THREE = weights(a=0.5, b=0.3, c=0.4)
SIGNED = weights(a=0.6, b=-0.3, c=0.2)
BY_LAYER = weights(a=filtered(GRADIENT, 0.25, 0.5), b=[1, 0.2], c=[0.1, 0.9, 0.3])


def _sums(numerics: str) -> Named:
    yield "linear", merge("linear", THREE)
    yield "linear, not normalized", merge("linear", THREE, normalize=False)
    yield "linear, gradients and filters", merge("linear", BY_LAYER)
    yield "linear, negative and zero weights", merge("linear", weights(base=1.5, a=-0.4, b=0))
    yield "linear, base appended", merge("linear", weights(a=0.5, b=0.3), "base", weight=0.2)
    yield "linear, one model", merge("linear", weights(a=0.3))
    yield "passthrough, scaled", merge("passthrough", {"a": {"scale": filtered(GRADIENT, 0.3, 1.0)}})
    for t in (0.0005, 0.01, 0.9):
        yield f"nearswap, t {t}", merge("nearswap", "a", "base", t=t)
    yield "nearswap, gradient", merge("nearswap", "a", "base", t=[0.001, 0.02])
    yield "nearswap, no difference", merge("nearswap", "same", "base", t=0.01)
    for models in ("a b", "a b c", "far a"):
        yield f"model_stock, {models}", merge("model_stock", models, "base")
        yield f"model_stock, {models}, by rows", merge("model_stock", models, "base", filter_wise=True)
    yield "model_stock, no difference", merge("model_stock", "same a", "base")


def _arcs(numerics: str) -> Named:
    listed = "base far" if numerics.startswith("mergekitty") else "far"
    for models in (listed, listed.replace("far", "a"), listed.replace("far", "same")):
        yield f"slerp, {models}", merge("slerp", models, "base", t=0.3)
    yield "slerp, gradient and filters", merge("slerp", listed, "base", t=filtered(GRADIENT, GRADIENT[::-1], 0.5))
    yield "slerp, beyond the ends", merge("slerp", listed, "base", t=1.2)
    if numerics.startswith("mergekitty"):
        yield "slerp, base second", merge("slerp", "far base", "base", t=0.3)
    else:
        yield "slerp, base second", merge("slerp", "far base", "base", t=0.8)
    name = "slerp" if numerics.startswith("mergekitty") else "nuslerp"
    pairs = {"siblings": weights(a=0.3, b=0.9), "strangers": weights(a=0.3, far=0.9), "equals": weights(a=1, same=2)}
    for what, pair in pairs.items():
        for base in (None, "base"):
            beside = f"{name} by weights, {what}{', differences' if base else ''}"
            yield beside, merge(name, pair, base)
            yield f"{beside}, rows", merge(name, pair, base, nuslerp_flatten=False)
            yield f"{beside}, columns", merge(name, pair, base, nuslerp_flatten=False, nuslerp_row_wise=True)
    yield f"{name} by weights, opposite", merge(name, weights(a=0.5, b=-0.5))
    yield "multislerp", merge("multislerp", THREE)
    yield "multislerp, differences", merge("multislerp", SIGNED, "base")
    yield "multislerp, not normalized", merge("multislerp", weights(a=0.5, far=0.9), normalize_weights=False, eps=1e-3)
    yield "multislerp, one model", merge("multislerp", weights(a=0.5))
    yield "karcher", merge("karcher", "a b c")
    yield "karcher, strangers", merge("karcher", "a far", max_iter=3)
    yield "karcher, one model", merge("karcher", "a")
    yield "karcher, six models", merge("karcher", "a b c far few fewer", "base", tol=1e-3)


def _differences(numerics: str) -> Named:
    yield "task_arithmetic", merge("task_arithmetic", TWO, "base")
    yield "task_arithmetic, lambda, signed", merge("task_arithmetic", SIGNED, "base", lambda_=0.8)
    yield "task_arithmetic, signed", merge("task_arithmetic", SIGNED, "base")
    yield "task_arithmetic, normalize", merge("task_arithmetic", THREE, "base", normalize=True)
    yield "task_arithmetic, weights that cancel", merge("task_arithmetic", weights(a=1, b=-1), "base", normalize=True)
    yield "task_arithmetic, base listed first", merge("task_arithmetic", {"base": {}, **TWO}, "base")
    yield "task_arithmetic, base listed last", merge("task_arithmetic", {**TWO, "base": {}}, "base")
    yield "task_arithmetic, no difference", merge("task_arithmetic", weights(same=0.6, a=0.7), "base")
    yield "task_arithmetic, gradients and filters", merge("task_arithmetic", BY_LAYER, "base")
    for density in (0.04, 0.2, 0.5, 1.0):
        yield f"ties, density {density}", merge("ties", THREE, "base", density=density)
    yield "ties, signed", merge("ties", SIGNED, "base", density=0.5)
    yield "ties, rescaled", merge("ties", TWO, "base", density=0.3, rescale=True)
    yield "ties, not normalized", merge("ties", TWO, "base", density=0.4, normalize=False, int8_mask=True)
    yield "ties, lambda", merge("ties", TWO, "base", density=0.4, lambda_=0.7)
    yield "ties, differences of few values", merge("ties", weights(few=0.6, fewer=0.7), "base", density=0.3)
    yield "ties, no difference", merge("ties", weights(same=0.6, a=0.7), "base", density=0.5, rescale=True)
    mixed = {"a": {"weight": 0.5, "density": filtered(GRADIENT, 0.3, 0.6)}, "b": {"weight": [0.2, 1], "density": 0.5}}
    yield "ties, gradients and filters", merge("ties", mixed, "base")
    if numerics == "mergekit-0.1.5":  # the others fail where no element would be kept
        yield "ties, density 0", merge("ties", THREE, "base", density=0.0)
        yield "ties, density 0.001", merge("ties", THREE, "base", density=0.001)


def _sparse(numerics: str) -> Named:
    for method in ("breadcrumbs", "breadcrumbs_ties"):
        yield method, merge(method, THREE, "base", density=0.5, gamma=0.1)
        yield f"{method}, small gamma", merge(method, THREE, "base", density=0.5, gamma=0.001)
        yield f"{method}, more than all", merge(method, THREE, "base", density=0.9, gamma=0.3)
        yield f"{method}, dense", merge(method, THREE, "base", gamma=0.3)
        yield f"{method}, rescaled", merge(method, SIGNED, "base", density=0.4, gamma=0.05, rescale=True)
        few = weights(few=0.6, fewer=0.7)
        yield f"{method}, differences of few values", merge(method, few, "base", density=0.4, gamma=0.1, normalize=True)
    for method in ("dare_ties", "dare_linear", "della", "della_linear"):  # with nothing left to chance
        yield f"{method}, dense", merge(method, SIGNED, "base", density=1.0)


def _consensus(numerics: str) -> Named:
    for method in ("consensus_ta", "consensus_ties"):
        yield method, merge(method, THREE, "base")
        yield f"{method}, two votes", merge(method, THREE, "base", k=2, lambda_=0.4, normalize=True)
        yield f"{method}, trimmed", merge(method, SIGNED, "base", density=0.4, lambda_=0.5)
        yield f"{method}, rescaled", merge(method, TWO, "base", density=0.4, lambda_=0.5, rescale=True)


def _selective(numerics: str) -> Named:
    for topk in (1.0, 0.5, 0.05):
        yield f"sce, {topk}", merge("sce", "a b c", "base", select_topk=topk)
    yield "sce, differences of few values", merge("sce", "few fewer", "base", select_topk=0.3, int8_mask=True)
    yield "sce, no difference", merge("sce", "same a", "base")
    for model in ("a", "far", "same"):
        yield f"arcee_fusion, {model}", merge("arcee_fusion", model, "base")
    yield "ram", merge("ram", "a b c", "base")
    yield "ram, epsilon", merge("ram", "few fewer c", "base", epsilon=2e-3)
    yield "ramplus_tl", merge("ramplus_tl", "a b c", "base")
    yield "ramplus_tl, epsilon", merge("ramplus_tl", "few fewer c", "base", epsilon=2e-3, r=0.7, alpha=1.5)


def _slices(numerics: str) -> Named:
    def part(sources: Models, first: int, last: int, **shared: Any) -> Config:
        listed = [{"model": m, "layer_range": [first, last], "parameters": dict(p)} for m, p in sources.items()]
        return {"sources": listed, **({"parameters": shared} if shared else {})}

    stacked = [part({"a": {}}, 0, 2), part({"far": {}}, 1, 3), part({"a": {}}, 2, 3)]
    yield "passthrough, frankenmerge", {"merge_method": "passthrough", "slices": stacked}
    damped = {"scale": [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.3}, {"value": 1.0}]}
    upscaled = [part({"a": {}}, 0, 2), part({"a": damped}, 1, 3)]
    yield "passthrough, scaled layers", {"merge_method": "passthrough", "slices": upscaled}
    halves = [part(weights(a=0.3, b=[0.1, 0.8]), 0, 2), part(weights(b=1.0, c=GRADIENT), 1, 3)]
    yield "linear, slices", {"merge_method": "linear", "slices": halves}
    based = [part({"base": {}, **TWO}, 0, 1), part({**TWO, "base": {}}, 1, 3, density=GRADIENT)]
    top = {"base_model": "base", "parameters": {"density": 0.6}}
    yield "ties, slices", {"merge_method": "ties", "slices": based, **top}
    arc = [part({"base": {}, "far": {}}, 0, 3)]
    gradient = {"base_model": "base", "parameters": {"t": filtered(GRADIENT, GRADIENT[::-1], 0.5)}}
    yield "slerp, slices", {"merge_method": "slerp", "slices": arc, **gradient}


def _shapes(numerics: str) -> Named:
    if numerics == "mergekit-0.1.5":  # it merges equal shapes only
        return
    for other in ("wide", "thin"):
        yield f"task_arithmetic, {other}", merge("task_arithmetic", weights(**{other: 0.6, "a": 0.7}), "base")
        yield f"ties, {other}", merge("ties", weights(**{other: 0.6, "a": 0.7}), "base", density=0.4)
    yield "breadcrumbs, thin", merge("breadcrumbs", weights(thin=0.6, a=0.7), "base", density=0.4, gamma=0.1)
    if numerics == "mergekit-0.1.4":  # the other one gives all models the rows of one vocabulary beforehand
        yield "linear, wide", merge("linear", weights(wide=0.3, a=0.5))
        yield "slerp, wide", merge("slerp", "wide", "base", t=0.3)
        yield "nuslerp, wide", merge("nuslerp", weights(wide=0.3, a=0.9), "base")
        yield "model_stock, wide", merge("model_stock", "a wide b", "base")
        yield "arcee_fusion, wide", merge("arcee_fusion", "wide", "base")


def _casts(numerics: str) -> Named:
    whole: tuple[Callable[..., Config], ...] = (
        lambda **top: merge("linear", THREE, **top),
        lambda **top: merge("ties", SIGNED, "base", density=0.4, **top),
        lambda **top: merge("slerp", "base far", "base", t=0.4, **top),
        lambda **top: merge("passthrough", {"a": {"scale": 0.3}}, **top),
        lambda **top: merge("arcee_fusion", "a", "base", **top),
    )
    for made in whole:
        for dtype in CASTS:
            yield f"{made()['merge_method']}, in {dtype}", made(dtype=dtype)
        yield f"{made()['merge_method']}, out in bfloat16", made(out_dtype="bfloat16")
        yield f"{made()['merge_method']}, in float32, out in float16", made(dtype="float32", out_dtype="float16")
    yield "passthrough, without a scale, in float16", merge("passthrough", "a", dtype="float16")


def _mixed(numerics: str) -> Iterator[Case]:
    """Models of several dtypes."""
    base, a, b = "base-bfloat16", "a-float32", "b-float16"
    two, pair = {a: {"weight": 0.6}, b: {"weight": 0.7}}, {a: {"weight": 0.6}, base: {"weight": 0.7}}
    configs = [
        merge("linear", two),
        merge("linear", pair),
        merge("slerp", f"{base} {a}", base, t=0.3),
        merge("nuslerp", two, base),
        merge("nearswap", b, base, t=0.02),
        merge("model_stock", f"{a} {b}", base),
        merge("task_arithmetic", two, base),
        merge("ties", two, base, density=0.5),
        merge("breadcrumbs", two, base, density=0.5, gamma=0.1, rescale=True),
        merge("sce", f"{a} {b}", base, select_topk=0.5),
        merge("arcee_fusion", a, base),
        merge("multislerp", two, base),
        merge("ram", f"{a} {b}", base),
        merge("consensus_ta", two, base),
    ]
    known = {method.name for method in BUILTIN.methods(numerics)}
    for config in configs:
        if config["merge_method"] in known:
            dtypes = ", ".join(use["model"].partition("-")[2] for use in config["models"])
            name = f"{config['merge_method']}, of {dtypes}"
            yield Case(name, "mixed", config, ("embed_tokens", "lm_head") if numerics.startswith("mergekitty") else ())


def real_cases(numerics: str) -> tuple[Case, ...]:
    """Cases over the three models of rxnfp, which are of float32, as they are and cast."""
    pair, listed = weights(ft=0.6, classifier=0.5), "base ft"
    configs = [
        merge("linear", weights(base=0.2, ft=0.5, classifier=0.4)),
        merge("slerp", listed, "base", t=0.4),
        merge("nuslerp", pair, "base"),
        merge("multislerp", pair, "base"),
        merge("karcher", "base ft classifier"),
        merge("nearswap", listed, "base", t=0.002),
        merge("task_arithmetic", pair, "base"),
        merge("ties", pair, "base", density=0.3),
        merge("ties", pair, "base", density=0.3, rescale=True),
        merge("breadcrumbs", pair, "base", density=0.5, gamma=0.01),
        merge("breadcrumbs_ties", pair, "base", density=0.5, gamma=0.05),
        merge("model_stock", "ft classifier", "base"),
        merge("model_stock", "ft classifier", "base", filter_wise=True),
        merge("passthrough", {"ft": {"scale": 0.3}}),
        merge("sce", "ft classifier", "base", select_topk=0.2),
        merge("arcee_fusion", "ft", "base"),
        merge("ram", "ft classifier", "base", epsilon=1e-3),
        merge("ramplus_tl", "ft classifier", "base", epsilon=1e-3),
        merge("consensus_ta", pair, "base"),
        merge("consensus_ties", pair, "base", density=0.3),
    ]
    known = {method.name for method in BUILTIN.methods(numerics)}
    chosen = [config for config in configs if config["merge_method"] in known]
    found = []
    for number, config in enumerate(chosen):
        whole = _with_dtype(config, "float32")
        name = f"{config['merge_method']} {number}"
        # all three have the base's head, in which nothing varies
        without = ("cls.",) if numerics == "mergekit-0.1.4" and config["merge_method"] == "sce" else ()
        found += [
            Case(name, "float32", whole, without),
            Case(name, "bfloat16", {**whole, "dtype": "bfloat16"}, without),
        ]
    return tuple(found)
