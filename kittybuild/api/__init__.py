"""The Python API: plan and build a recipe, as the commands do, without printing, exiting or reading the environment."""

from __future__ import annotations

from kittybuild.api.building import MEMORY, build, built, check_models, record
from kittybuild.api.caches import pull, push
from kittybuild.api.planning import explain, plan
from kittybuild.api.preparing import LockReport, Prepared, lock, prepare, read_recipe, recipe_of, recipe_text
from kittybuild.api.reports import BuildReport, OutputReport, StageReport
from kittybuild.api.why import why
from kittybuild.model.plan import Plan

__all__ = [
    "MEMORY",
    "BuildReport",
    "LockReport",
    "OutputReport",
    "Plan",
    "Prepared",
    "StageReport",
    "build",
    "built",
    "check_models",
    "explain",
    "lock",
    "plan",
    "prepare",
    "pull",
    "push",
    "read_recipe",
    "recipe_of",
    "recipe_text",
    "record",
    "why",
]
