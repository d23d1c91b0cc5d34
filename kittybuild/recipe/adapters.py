"""From the texts of the stages that make or use adapters to Stage."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kittybuild.errors import RecipeError
from kittybuild.model.recipe import (
    AdapterUse,
    ApplyLoraStage,
    Decomposition,
    ExtractLoraStage,
    MergeAdaptersStage,
    Rank,
)
from kittybuild.recipe.merge import Problems
from kittybuild.recipe.reference import parse_reference
from kittybuild.recipe.schema import AdapterText, ApplyLoraText, ExtractLoraText, MergeAdaptersText
from kittybuild.recipe.yamltext import Document, Path


def apply_lora(
    name: str, form: ApplyLoraText, document: Document, path: Path, problems: Problems, shared: Mapping[str, Any]
) -> ApplyLoraStage | None:
    """An apply_lora stage; problems are noted."""
    base = parse_reference(form.base, document.at((*path, "base")), problems)
    adapters = _uses(form.adapters, document, path, problems)
    return ApplyLoraStage(name, base, adapters, **shared) if base else None


def extract_lora(
    name: str, form: ExtractLoraText, document: Document, path: Path, problems: Problems, shared: Mapping[str, Any]
) -> ExtractLoraStage | None:
    """An extract_lora stage; problems are noted."""
    model = parse_reference(form.model, document.at((*path, "model")), problems)
    base = parse_reference(form.base, document.at((*path, "base")), problems)
    for key, patterns in (("include", form.include), ("exclude", form.exclude)):
        for index, pattern in enumerate(patterns):
            _check_pattern(pattern, document, (*path, key, index), problems)
    decomposition = _decomposition(form)
    if model is None or base is None or decomposition is None:
        return None
    return ExtractLoraStage(
        name,
        model,
        base,
        decomposition,
        include=tuple(form.include),
        exclude=tuple(form.exclude),
        embeddings=form.embeddings,
        others=form.others,
        saved=tuple(form.modules_to_save),
        transposed=form.fan_in_fan_out,
        **shared,
    )


def merge_adapters(
    name: str, form: MergeAdaptersText, document: Document, path: Path, problems: Problems, shared: Mapping[str, Any]
) -> MergeAdaptersStage:
    """A merge_adapters stage; problems are noted."""
    adapters = _uses(form.adapters, document, path, problems)

    def fail(key: str, message: str, hint: str) -> None:
        at = document.key_at((*path, key)) if key in form.model_fields_set else document.key_at(path)
        problems.append(RecipeError("KB103", message, at=str(at), hint=hint))

    sparse = form.method in ("ties", "dare_linear", "dare_ties")
    if form.rank is None and (form.method == "svd" or (sparse and form.space == "delta")):
        fail(
            "method", f"{form.method} of differences needs a rank", "add `rank: 16`, or `rank: {most: 64, energy: 0.9}`"
        )
    if form.space == "factors" and (form.rank is not None or form.method in ("cat", "svd")):
        fail("space", f"{form.method} with a rank has no space of factors", "leave `space` out")
    return MergeAdaptersStage(
        name, form.method, adapters, form.space, form.density, decomposition=_decomposition(form), **shared
    )


def _decomposition(form: ExtractLoraText | MergeAdaptersText) -> Decomposition | None:
    """How a text wants differences to be cut down; None where it gives no rank."""
    rank = form.rank
    if rank is None:
        return None
    most = Rank(rank.most, rank.exact, rank.energy, rank.threshold)
    iterations = form.iterations if form.svd == "randomized" else None
    return Decomposition(most, iterations, form.float64, form.distribute_scale)


def _check_pattern(pattern: str, document: Document, path: Path, problems: Problems) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        at, hint = str(document.at(path)), "a regular expression, searched in the names of modules"
        problems.append(RecipeError("KB103", f"{pattern!r} is no pattern: {error}", at=at, hint=hint))


def _uses(
    adapters: Sequence[AdapterText], document: Document, path: Path, problems: Problems
) -> tuple[AdapterUse, ...]:
    """The adapters that a stage lists."""
    found: list[AdapterUse] = []
    for index, item in enumerate(adapters):
        here = document.at((*path, "adapters", index))
        adapter = parse_reference(item.adapter, here, problems)
        if adapter and adapter.adapter:
            hint = f"list them one by one: {adapter.base_text} and {adapter.adapter_text}"
            problems.append(RecipeError("KB111", f"an adapter has no adapter: {adapter}", at=str(here), hint=hint))
        elif adapter:
            found.append(AdapterUse(adapter, item.weight, here))
    return tuple(found)
