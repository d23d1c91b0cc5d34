"""From the text of a moe stage to MoeStage: experts, and whether their prompts can tell them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kittybuild.errors import KittybuildError, RecipeError
from kittybuild.model.recipe import Expert, MoeStage
from kittybuild.recipe.reference import parse_reference
from kittybuild.recipe.schema import ExpertText, MoeText
from kittybuild.recipe.yamltext import Document, Path

Problems = list[KittybuildError]


def moe_stage(
    name: str, form: MoeText, document: Document, path: Path, problems: Problems, shared: Mapping[str, Any]
) -> MoeStage | None:
    """The stage; None where one of its references is none (noted)."""
    base = parse_reference(form.base_model, document.at((*path, "base_model")), problems)
    experts = _experts(form.experts, (*path, "experts"), document, problems)
    beside = _experts(form.shared_experts or [], (*path, "shared_experts"), document, problems)
    count = len(form.experts)
    if not 1 <= form.experts_per_token <= count:
        message = f"experts_per_token is {form.experts_per_token}, and there are {count} experts"
        at = document.at((*path, "experts_per_token"))
        hint = f"write a number from 1 to {count}"
        problems.append(RecipeError("KB117", message, at=str(at), hint=hint))
    if base is None or len(experts) < count or len(beside) < len(form.shared_experts or []):
        return None
    stage = MoeStage(
        name, base, experts, beside, form.gate_mode, form.experts_per_token, form.architecture, form.layout, **shared
    )
    if stage.prompted:
        _check_prompts(stage, problems)
    return stage


def _experts(texts: Sequence[ExpertText], path: Path, document: Document, problems: Problems) -> tuple[Expert, ...]:
    found = []
    for index, text in enumerate(texts):
        model = parse_reference(text.source_model, document.at((*path, index, "source_model")), problems)
        if model:
            positive, negative = tuple(text.positive_prompts or ()), tuple(text.negative_prompts or ())
            at = document.at((*path, index))
            found.append(Expert(model, positive, negative, text.noise_scale, text.residual_scale, at))
    return tuple(found)


def _check_prompts(stage: MoeStage, problems: Problems) -> None:
    """Each expert has prompts, and not those of another: a router whose rows are equal chooses nothing."""
    seen: dict[tuple[tuple[str, ...], tuple[str, ...]], Expert] = {}
    for expert in stage.experts:
        prompts = expert.positive, expert.negative
        if not expert.positive:
            message = f"{expert.model} has no positive_prompts, which gate_mode {stage.gate_mode} works from"
            hint = "give it some, or choose `gate_mode: random`"
            problems.append(RecipeError("KB118", message, at=str(expert.at), hint=hint))
        elif prompts in seen:
            message = f"{expert.model} has the prompts of {seen[prompts].model}: nothing tells them apart"
            hint = "give each expert prompts of what it is for"
            problems.append(RecipeError("KB118", message, at=str(expert.at), hint=hint))
        seen.setdefault(prompts, expert)
