"""The programs of mergekit and mergekitty as recipes: from their arguments to the text of a recipe. Pure.

A text says all that changes the bits. A configuration that needs nothing beside it is its own recipe, word for word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import yaml

Config = Mapping[str, Any]

MERGE, MOE = "merge", "moe"
"""What a stage is called that has no name."""


@dataclass(frozen=True)
class Settings:
    """What a program's options say beside its configuration.

    `seed`: of what methods draw; `shard_size`: the most bytes of a shard; `truncate`: vocabularies of unequal sizes are
    cut to what all models have, where a merge names no tokenizer.
    """

    seed: int | None = None
    shard_size: int | None = None
    truncate: bool = False


PLAIN = Settings()


def peer_size(text: str) -> int:
    """Bytes in the peers' words: `5B` is five thousand million, `500m` and `20k` likewise; raises ValueError."""
    match = re.fullmatch(r"(\d+)([kmbg]?)b?", text.strip().lower())
    if not match or int(match[1]) < 1:
        raise ValueError(f"{text!r} is not a size such as 5B or 500M")
    return int(match[1]) * int(1000 ** {"": 0, "k": 1, "m": 2, "b": 3, "g": 3}[match[2]])


def recipe_of(stages: Mapping[str, Config], folders: Mapping[str, str], settings: Settings = PLAIN) -> str:
    """The text of a recipe with these stages, of which those in `folders` are outputs. Relative folders count from the
    recipe's own."""
    size = {} if settings.shard_size is None else {"shard_size": settings.shard_size}
    recipe: dict[str, Any] = {"kittybuild": 1, "dialect": "mergekit"}
    if settings.seed is not None:
        recipe["defaults"] = {"seed": settings.seed}
    recipe["stages"] = {name: _plain(stage) for name, stage in stages.items()}
    recipe["outputs"] = {name: {"folder": folder, **size} for name, folder in folders.items()}
    return yaml.safe_dump(recipe, sort_keys=False, width=120, allow_unicode=True)


def merge_text(text: str, config: Config, folder: str, settings: Settings) -> str:
    """mergekit-yaml, mergekit-moe: the configuration itself, unless an option says something that it does not."""
    if settings == PLAIN:
        return text
    return recipe_of({_name(config): _cut(config, settings)}, {_name(config): folder}, settings)


def multi_text(configs: Sequence[Config], folders: Mapping[str, str], settings: Settings) -> str:
    """mergekit-multi, mergekitty-mega: a stage for each document, called by its name (`merge` without one)."""
    return recipe_of({_name(config): _cut(config, settings) for config in configs}, folders, settings)


def pytorch_text(config: Config, tensors: str, folder: str, settings: Settings) -> str:
    """mergekit-pytorch. `tensors`: `same`, `intersection` or `union` of what the files hold."""
    stage = {"kind": "state_dict", **_unnamed(config), "tensors": tensors}
    return recipe_of({MERGE: stage}, {MERGE: folder}, settings)


def transplant_text(model: str, donor: str, options: Mapping[str, Any], folder: str, settings: Settings) -> str:
    """mergekit-tokensurgeon, mergekitty-tokensurgeon. `options`: keys of a transplant_tokenizer stage."""
    stage = {"kind": "transplant_tokenizer", "model": model, "donor": donor, **options}
    return recipe_of({"transplant": stage}, {"transplant": folder}, settings)


def apply_lora_text(base: str, adapter: str, folder: str, settings: Settings) -> str:
    """mergekitty-merge-lora."""
    stage = {"kind": "apply_lora", "base": base, "adapters": [{"adapter": adapter}]}
    return recipe_of({"applied": stage}, {"applied": folder}, settings)


@dataclass(frozen=True)
class Extract:
    """What mergekit-extract-lora is told. `epsilon`: only singular values above it count; 0: all up to `rank`."""

    model: str
    base: str
    rank: int
    epsilon: float = 0.0
    svd: str = "exact"
    distribute_scale: bool = True
    embed_lora: bool = False
    saved: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    skip_undecomposable: bool = False


def extract_lora_text(told: Extract, folder: str, settings: Settings) -> str:
    """mergekit-extract-lora, mergekitty-extract-lora."""
    rank = {"most": told.rank, **({"threshold": told.epsilon} if told.epsilon else {})}
    stage: dict[str, Any] = {"kind": "extract_lora", "model": told.model, "base": told.base, "rank": rank}
    stage |= {"svd": told.svd} if told.svd != "exact" else {}
    stage |= {} if told.distribute_scale else {"distribute_scale": False}
    stage |= {"include": told.include} if told.include else {}
    stage |= {"exclude": told.exclude} if told.exclude else {}
    stage |= {"embeddings": "lora"} if told.embed_lora else {}
    stage |= {"others": "leave"} if told.skip_undecomposable else {}
    stage |= {"modules_to_save": told.saved} if told.saved else {}
    return recipe_of({"extracted": stage}, {"extracted": folder}, settings)


@dataclass(frozen=True)
class Legacy:
    """What mergekit-legacy is told. Weights and densities go by position; one value counts for all models."""

    models: tuple[str, ...]
    method: str = "ties"
    base: str | None = None
    weights: tuple[float, ...] = ()
    densities: tuple[float, ...] = ()
    normalize: bool = True
    int8_mask: bool = False
    bfloat16: bool = False

    def config(self) -> dict[str, Any]:
        """The configuration that says the same. Raises ValueError where the numbers do not go by the models."""
        own = {"density": self.densities} | ({} if self.method == "slerp" else {"weight": self.weights})
        for name, values in {"weight": self.weights, **own}.items():
            if len(values) not in (0, 1, len(self.models)):
                raise ValueError(f"{len(values)} values of {name} for {len(self.models)} models")
        models: list[dict[str, Any]] = []
        for index, model in enumerate(self.models):
            given = {name: values[index if len(values) > 1 else 0] for name, values in own.items() if values}
            models.append({"model": model, **({"parameters": given} if given else {})})
        shared: dict[str, Any] = {}
        if self.method == "slerp":
            shared = {"t": self.weights[0]} if self.weights else {}
        elif self.method != "passthrough":
            shared = {"normalize": self.normalize}
        if self.int8_mask:
            shared["int8_mask"] = True
        config: dict[str, Any] = {"merge_method": self.method, "models": models}
        config |= {"base_model": self.base} if self.base else {}
        config |= {"parameters": shared} if shared else {}
        return config | ({"dtype": "bfloat16"} if self.bfloat16 else {})


def shuffled(models: Mapping[str, int], weights: Sequence[float], seed: int, *, full: bool) -> dict[str, Any]:
    """mergekit-layershuffle: a passthrough of layers of `models` (each with how many it has), drawn by `weights`.

    Layer by layer the same layer of one of the models that have it; with `full`, of each model its part of its layers
    (its weight times their number), all in any order. Neighbours of one model are one slice. Raises ValueError where
    weights are negative, or there is nothing to draw.
    """
    if len(weights) != len(models) or min(weights, default=0) < 0 or not sum(weights) > 0:
        raise ValueError("give each --model a --weight of zero or more, and not zero to all")
    draw = Random(seed)  # whose `random` gives the same numbers in every version of Python
    pairs = list(zip(models.items(), weights, strict=True))
    if full:
        chosen = [
            (model, layer)
            for (model, count), weight in pairs
            for layer in sorted(range(count), key=lambda _: draw.random())[: int(count * weight)]
        ]
        chosen.sort(key=lambda _: draw.random())
    else:
        chosen = []
        for layer in range(max(models.values(), default=0)):
            having = [(model, weight) for (model, count), weight in pairs if layer < count and weight > 0]
            if having:
                chosen.append((_drawn(having, draw.random()), layer))
    if not chosen:
        raise ValueError("no layer was drawn: give larger weights")
    slices = [{"sources": [{"model": model, "layer_range": [a, b]}]} for model, a, b in _joined(chosen)]
    return {"merge_method": "passthrough", "slices": slices}


def _drawn(having: Sequence[tuple[str, float]], number: float) -> str:
    """The model at `number` (of 0 to 1) of the way through the weights."""
    left = number * sum(weight for _, weight in having)
    for model, weight in having:
        left -= weight
        if left < 0:
            return model
    return having[-1][0]


def _joined(chosen: Sequence[tuple[str, int]]) -> list[tuple[str, int, int]]:
    """Runs of layers that follow each other in one model, as half-open ranges."""
    found: list[tuple[str, int, int]] = []
    for model, layer in chosen:
        if found and found[-1][0] == model and found[-1][2] == layer:
            found[-1] = model, found[-1][1], layer + 1
        else:
            found.append((model, layer, layer + 1))
    return found


def _name(config: Config) -> str:
    return str(config.get("name") or (MOE if "experts" in config else MERGE))


def _unnamed(config: Config) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "name"}


def _cut(config: Config, settings: Settings) -> dict[str, Any]:
    """The stage of a configuration."""
    stage = _unnamed(config)
    if "experts" in stage:
        return {"kind": MOE, **stage}
    if settings.truncate and not (stage.get("tokenizer") or stage.get("tokenizer_source")):
        stage["tokenizer_source"] = "truncate"
    return stage


def _plain(value: Any) -> Any:
    """Mappings and sequences as YAML has them; each of its own, so that no text has anchors."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
