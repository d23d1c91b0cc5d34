"""The keys of whole stages: they change when something changes that can change the manifest, and else never."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kittybuild.builders.registry import BUILTIN
from kittybuild.digest import Digest
from kittybuild.planner.shortcut import stage_keys
from kittybuild.planner.targets import targets
from kittybuild.planner.views import source_names
from tests.planning import parse, prints_of

RECIPE = """\
kittybuild: 1
name: calm
sources:
  base: {path: models/base}
  joy: {path: adapters/joy}
defaults: {seed: 7}
stages:
  glad: {kind: apply_lora, base: base, adapters: [{adapter: joy, weight: 0.5}]}
  still: {merge_method: passthrough, models: [{model: other+joy}]}
  calm:
    merge_method: ties
    base_model: base
    models:
      - {model: glad, parameters: {weight: 0.6, density: [0.5, 1]}}
      - {model: still, parameters: {weight: [{filter: mlp, value: 0.25}, {value: 0.75}]}}
  aside: {merge_method: linear, models: [{model: lonely, parameters: {weight: 1}}]}
outputs:
  calm: {folder: out/calm, shard_size: 1GB}
"""


def keys(text: str, *asked: str, changed: str | None = None) -> dict[str, Digest]:
    """The keys of a recipe over sources as `prints_of` has them."""
    recipe = parse(text)
    return stage_keys(recipe, targets(recipe, asked), prints_of(recipe, changed), BUILTIN)


BEFORE = keys(RECIPE)


def test_there_is_a_key_for_every_stage_that_is_needed_in_the_order_of_building() -> None:
    assert list(BEFORE) == ["glad", "other+joy", "still", "calm"]
    assert len(set(BEFORE.values())) == 4
    assert keys(RECIPE) == BEFORE


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("name: calm", "name: other # a remark"),
        ("kittybuild: 1\n", "kittybuild: 1\n\n# a remark\n"),
        ("out/calm", "elsewhere"),
        ("weight: 0.6", "weight: 0.60"),
        ("lonely", "lonelier"),
        ("{merge_method: passthrough, models", "{kind: merge, merge_method: passthrough, models"),
        ("{model: glad, parameters", "{model: {model: {path: glad}}, parameters"),
    ],
)
def test_what_cannot_change_the_tensors_changes_no_key(old: str, new: str) -> None:
    assert RECIPE.count(old) == 1
    assert keys(RECIPE.replace(old, new)) == BEFORE


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("weight: 0.6", "weight: 0.7"),
        ("weight: 0.6", "weight: 0.6000000000000001"),
        ("density: [0.5, 1]", "density: [0.5, 0.9]"),
        ("filter: mlp", "filter: attn"),
        ("merge_method: ties", "merge_method: task_arithmetic"),
        ("merge_method: ties", "merge_method: ties\n    dtype: float32"),
        ("merge_method: ties", "merge_method: ties\n    out_dtype: float32"),
        ("merge_method: ties", "merge_method: ties\n    parameters: {normalize: false}"),
        ("merge_method: ties", "merge_method: ties\n    keep: false"),
        ("merge_method: ties", "merge_method: ties\n    allow_nan: true"),
        ("defaults: {seed: 7}", "defaults: {seed: 7}\nallow_nan: true"),
        ("filter: mlp, value", "filter: mlp, layers: 1..2, value"),
        ("base_model: base", "base_model: other"),
        ("seed: 7", "seed: 8"),
        ("shard_size: 1GB", "shard_size: 2GB"),
    ],
)
def test_what_can_change_the_manifest_changes_the_key(old: str, new: str) -> None:
    assert RECIPE.count(old) == 1
    assert keys(RECIPE.replace(old, new))["calm"] != BEFORE["calm"]


def test_a_change_reaches_all_that_hangs_on_it() -> None:
    def different(text: str, changed: str | None = None) -> set[str]:
        return {name for name, key in keys(text, "calm", changed=changed).items() if key != before[name]}

    # The keys of intermediate stages hold what is asked of them as well, so all stages of one build change together.
    before = keys(RECIPE, "calm")
    assert different(RECIPE.replace("weight: 0.5", "weight: 0.4")) == set(before)
    assert different(RECIPE, "joy") == set(before)
    assert different(RECIPE, "base") == set(before)
    assert different(RECIPE, "lonely") == set()


def test_a_source_counts_by_what_it_is_and_not_by_where() -> None:
    recipe = parse(RECIPE)
    prints = {name: Digest.of(name.encode()) for name in source_names(recipe)}
    moved = parse(RECIPE.replace("models/base", "moved/base"))
    assert stage_keys(recipe, ["calm"], prints, BUILTIN) == stage_keys(moved, ["calm"], prints, BUILTIN)


def test_each_of_several_adapters_counts() -> None:
    text = RECIPE.replace("{adapter: joy, weight: 0.5}", "{adapter: joy, weight: 0.5}, {adapter: zen}")
    assert keys(text)["glad"] != keys(text, changed="zen")["glad"]


def test_a_stage_asked_for_alone_has_its_own_key() -> None:
    assert set(keys(RECIPE, "glad")) == {"glad"}
    assert keys(RECIPE, "glad")["glad"] != BEFORE["glad"]


def test_the_version_of_any_builder_counts() -> None:
    recipe = parse(RECIPE)
    prints = {name: Digest.of(name.encode()) for name in source_names(recipe)}
    newer = type(BUILTIN)(
        {
            key: replace(builder, version=builder.version + (builder.name == "slerp"))
            for key, builder in BUILTIN.by_class.items()
        }
    )
    before = stage_keys(recipe, ["calm"], prints, BUILTIN)
    assert stage_keys(recipe, ["calm"], prints, newer)["calm"] != before["calm"]
