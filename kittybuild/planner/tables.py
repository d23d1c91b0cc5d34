"""The hidden stages that gather tables with a row for each token, before they are merged: which merges have them."""

from __future__ import annotations

from kittybuild.model.recipe import MergeStage, ModelRef
from kittybuild.planner.peers import rules_of


def gathers(stage: MergeStage) -> bool:
    """Whether a merge may gather tables."""
    return stage.tokenizer is not None or rules_of(stage.numerics).rebuilds


def tables_stage(stage: str, ref: ModelRef) -> str:
    """The name of the hidden stage that gathers a model's tables for a merge."""
    return f"{stage}/tables of {ref}"
