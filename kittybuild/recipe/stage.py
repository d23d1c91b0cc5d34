"""From the text of one stage to Stage: what kinds share (dtypes, keep, numerics), and transplant_tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from kittybuild.errors import RecipeError, nearest
from kittybuild.model.derivation import KITTY_1
from kittybuild.model.method import Catalogue
from kittybuild.model.recipe import Approximation, Sides, Stage, TransplantStage
from kittybuild.recipe.adapters import apply_lora, extract_lora, merge_adapters
from kittybuild.recipe.merge import Problems, Scope, merge_stage
from kittybuild.recipe.moe import moe_stage
from kittybuild.recipe.reference import parse_reference
from kittybuild.recipe.schema import (
    STAGE_KINDS,
    ApplyLoraText,
    ExtractLoraText,
    MergeAdaptersText,
    MoeText,
    TransplantText,
    check,
)
from kittybuild.recipe.yamltext import Document, Path
from kittybuild.tensors import DType


@dataclass(frozen=True)
class Reading:
    """One document, the methods of all classes, and what stages take that do not say otherwise; problems and notes.

    `broken`: the stages and sources that have problems.
    `strict`: in stages of ours, words of the peers that have no effect are errors.
    """

    document: Document
    catalogue: Catalogue
    numerics: str
    problems: Problems
    defaults: Mapping[str, str | None] = field(default_factory=lambda: MappingProxyType({}))
    allow_nan: bool = False
    notes: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    strict: bool = True


def read_stage(name: str, value: dict[str, Any], reading: Reading, path: Path | None = None) -> Stage | None:
    """A stage of ours, or (at the path of a whole document) a mergekit configuration. None: its problems are noted."""
    document, problems, defaults = reading.document, reading.problems, reading.defaults
    own, path = path is None, ("stages", name) if path is None else path
    kind = value.get("kind", "moe" if not own and "experts" in value else "merge")
    schema = STAGE_KINDS.get(kind) if isinstance(kind, str) else None
    if schema is None:
        where, hint = str(document.at((*path, "kind"))), nearest(str(kind), STAGE_KINDS)
        problems.append(RecipeError("KB103", f"unknown kind of stage {kind!r}", at=where, hint=hint))
        return None
    form, left_out = check(schema, value, document, problems, path)
    if form is None:
        return None
    given = {"dtype": form.dtype or defaults.get("dtype"), "out_dtype": form.out_dtype or defaults.get("out_dtype")}
    shared: dict[str, Any] = {
        **read_dtypes(given, document, path, problems),
        "keep": form.keep,
        "allow_nan": reading.allow_nan if form.allow_nan is None else form.allow_nan,
        "at": document.key_at(path) if path else document.at(path),
    }
    if isinstance(form, ApplyLoraText):
        return apply_lora(name, form, document, path, problems, shared)
    if isinstance(form, ExtractLoraText):
        return extract_lora(name, form, document, path, problems, shared)
    if isinstance(form, MergeAdaptersText):
        return merge_adapters(name, form, document, path, problems, shared)
    if isinstance(form, TransplantText):
        return _transplant(name, form, reading, path, shared)
    if isinstance(form, MoeText):
        return moe_stage(name, form, document, path, problems, shared)
    numerics = read_numerics(form.numerics, reading, (*path, "numerics"))
    scope = Scope(
        document, path, reading.catalogue, numerics, problems, reading.notes, own and reading.strict, left_out
    )
    stage = merge_stage(form, scope)
    return replace(stage, name=name, **shared) if stage else None


def _transplant(
    name: str, form: TransplantText, reading: Reading, path: Path, shared: Mapping[str, Any]
) -> TransplantStage | None:
    model, donor = (
        parse_reference(text, reading.document.at((*path, key)), reading.problems)
        for key, text in (("model", form.model), ("donor", form.donor))
    )
    if model is None or donor is None:
        return None
    approximation = Approximation(**{field.name: getattr(form, field.name) for field in fields(Approximation)})
    return TransplantStage(
        name, model, donor, approximation, _sides(form.prefix_match), _sides(form.byte_match), **shared
    )


def _sides(text: bool | Sides) -> Sides:
    """In YAML, a plain `yes` is true."""
    return ("yes" if text else "no") if isinstance(text, bool) else text


def read_numerics(word: str | None, reading: Reading, path: Path) -> str:
    """The class of arithmetic that `word` names, else the one for stages that name none; problems are noted."""
    if word is None:
        return reading.numerics
    if word in reading.catalogue:
        return word
    at, hint = str(reading.document.at(path)), nearest(word, reading.catalogue)
    reading.problems.append(RecipeError("KB103", f"numerics cannot be {word!r}", at=at, hint=hint))
    return KITTY_1


def read_dtypes(
    given: Mapping[str, str | None], document: Document, path: Path, problems: Problems
) -> dict[str, DType | None]:
    """The dtypes of these names (`dtype`, `out_dtype`); problems are noted."""
    found: dict[str, DType | None] = {}
    for key, word in given.items():
        found[key] = DType.named(word) if word else None
        if word and (found[key] is None or not found[key].is_float):  # type: ignore[union-attr]
            hint = nearest(word, [dtype.torch_name for dtype in DType if dtype.is_float])
            problems.append(
                RecipeError("KB103", f"{key} cannot be {word!r}", at=str(document.at((*path, key))), hint=hint)
            )
    return found
