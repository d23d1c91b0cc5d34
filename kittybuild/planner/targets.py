"""What of a recipe is to be made."""

from __future__ import annotations

from collections.abc import Sequence

from kittybuild.errors import UsageError, nearest
from kittybuild.model.recipe import Recipe


def targets(recipe: Recipe, asked: Sequence[str]) -> tuple[str, ...]:
    """The stages that are wanted whole: those asked for, else the outputs, else those that no other stage needs."""
    for name in asked:
        if name not in recipe.stages:
            raise UsageError("KB001", f"there is no stage {name!r}", at=recipe.file, hint=nearest(name, recipe.stages))
    if asked or recipe.outputs:
        return tuple(name for name in recipe.stages if name in (asked or recipe.outputs))
    needed = {part.model for stage in recipe.stages.values() for ref in stage.references() for part in ref.parts()}
    return tuple(name for name in recipe.stages if name not in needed)
