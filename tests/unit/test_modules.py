"""Modules: parts of a model that are merged by themselves, named by mergekit's words or by what their tensors share."""

from __future__ import annotations

from pathlib import Path

import pytest

from kittybuild.model.plan import Plan, inputs_of
from kittybuild.planner.modules import module_of
from tests.planning import Header, errors_of, planned, step

CONFIG = {"encoder_layers": 2, "decoder_layers": 2, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("name", "modules", "wanted"),
    [
        ("encoder.block.0.w", ("encoder", "decoder"), "encoder"),
        ("model.decoder.layers.0.encoder_attn.w", ("encoder", "decoder"), "decoder"),
        ("decoder.bert.encoder.layer.0.w", ("encoder", "decoder"), "decoder"),
        ("shared.weight", ("encoder", "decoder"), None),
        ("shared.weight", ("encoder", "decoder", "default"), "default"),
        ("language_model.model.layers.0.w", ("text_decoder", "vision_tower"), "text_decoder"),
        ("vision_tower.blocks.0.w", ("text_decoder", "vision_tower"), "vision_tower"),
        ("model.visual.blocks.0.w", ("text_decoder", "vision_tower"), "vision_tower"),
        ("visual.merger.mlp.0.weight", ("text_decoder", "vision_tower", "multi_modal_projector"),
         "multi_modal_projector"),
        ("model.visual.merger.w", ("model.visual", "model.visual.merger"), "model.visual.merger"),
    ],
)  # fmt: skip
def test_the_module_of_a_tensor(name: str, modules: tuple[str, ...], wanted: str | None) -> None:
    assert module_of(name, modules) == wanted


def two_sides() -> Header:
    """A model with two stacks of two layers."""
    names = [f"model.{side}.layers.{layer}.w" for side in ("encoder", "decoder") for layer in (0, 1)]
    return dict.fromkeys((*names, "model.shared.weight"), ("F32", (2,)))


TEXT = """\
merge_method: passthrough
modules:
  encoder: {slices: [{sources: [{model: a, layer_range: [0, 2]}]}, {sources: [{model: b, layer_range: [1, 2]}]}]}
  decoder: {slices: [{sources: [{model: b, layer_range: [0, 1]}]}]}
  shared: {models: [{model: a}]}
"""


def plan_of(tmp_path: Path, text: str = TEXT) -> Plan:
    import json

    from tests.planning import write_header

    for name in "ab":
        write_header(tmp_path / name, two_sides(), {**json.loads(json.dumps(CONFIG))})
    return planned(tmp_path, {}, text)


def test_each_module_has_slices_of_its_own_and_counts_its_own_layers(tmp_path: Path) -> None:
    made = plan_of(tmp_path).stages["merge"]
    taken = {name: inputs_of(given)[0] for name, given in made.steps.items()}
    assert {name: f"{one.source} {one.name}" for name, one in taken.items()} == {  # type: ignore[union-attr]
        "model.encoder.layers.0.w": "a model.encoder.layers.0.w",
        "model.encoder.layers.1.w": "a model.encoder.layers.1.w",
        "model.encoder.layers.2.w": "b model.encoder.layers.1.w",
        "model.decoder.layers.0.w": "b model.decoder.layers.0.w",
        "model.shared.weight": "a model.shared.weight",
    }
    assert made.config == {"encoder_layers": 3, "decoder_layers": 1, "num_hidden_layers": 3}


def test_slices_without_modules_are_an_error_that_names_the_stacks(tmp_path: Path) -> None:
    text = "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]"
    (error,) = errors_of(plan_of, tmp_path, text)
    assert error.code == "KB304"
    assert "(model.encoder.layers, model.decoder.layers)" in error.message
    assert error.hint == "give each its own slices under `modules:`"


def test_tensors_of_no_module_are_an_error_or_taken_from_the_base(tmp_path: Path) -> None:
    text = TEXT.replace("  shared: {models: [{model: a}]}\n", "")
    (error,) = errors_of(plan_of, tmp_path, text)
    assert (error.code, error.message) == ("KB315", "1 tensor of a belong to no module:\n  model.shared.weight")
    made = plan_of(tmp_path, text + "base_model: b\ntake: base\n").stages["merge"]
    (given,) = inputs_of(made.steps["model.shared.weight"])
    assert given.source == "b"  # type: ignore[union-attr]


def test_a_module_of_no_tensor_is_an_error_that_names_the_stacks(tmp_path: Path) -> None:
    (error,) = errors_of(plan_of, tmp_path, TEXT.replace("decoder:", "decodre:") + "base_model: a\ntake: base\n")
    assert (error.code, error.message) == ("KB314", "no tensor of a belongs to the module 'decodre'")
    assert error.hint == "its stacks of layers: model.encoder.layers, model.decoder.layers"


def test_parameters_of_a_module_count_before_those_of_the_merge(tmp_path: Path) -> None:
    text = """\
    merge_method: linear
    parameters: {weight: [{filter: encoder, value: 2}, {value: 3}]}
    modules:
      encoder: {models: [{model: a}, {model: b}], parameters: {weight: {filter: layers.0., value: 5}}}
      default: {models: [{model: a}, {model: b, parameters: {weight: 7}}]}
    """
    plan = plan_of(tmp_path, text)
    assert step(plan, "model.encoder.layers.0.w").params["weight"] == [5.0, 5.0]
    assert step(plan, "model.encoder.layers.1.w").params["weight"] == [2.0, 2.0]
    assert step(plan, "model.decoder.layers.1.w").params["weight"] == [3.0, 7.0]
    assert not any("takes no tensor" in note for note in plan.notes)


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: passthrough\nmodels: [{model: a}]\nmodules: {encoder: {models: [{model: a}]}}",
        "merge_method: passthrough\nmodules: {encoder: {}}",
    ],
)
def test_a_merge_or_module_of_two_kinds_or_none_is_an_error(tmp_path: Path, text: str) -> None:
    assert [error.code for error in errors_of(plan_of, tmp_path, text)] == ["KB108"]
