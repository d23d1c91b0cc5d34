"""What the plan of a mixture holds: renamed inputs, configs that say what classes assume otherwise, costs."""

from __future__ import annotations

from typing import Any

import pytest

from kittybuild.builders.registry import BUILTIN
from kittybuild.executor.budget import BASELINE, block_elements, cost
from kittybuild.model.derivation import Derivation, SourceTensor
from kittybuild.planner.moe_families import FAMILIES, Sizes, assumed, family_config
from kittybuild.tensors import DType, TensorSpec
from tests.mixtures import SIZES
from tests.planning import llama, planned

MIXTURE = """
base_model: base
gate_mode: random
experts:
  - {source_model: a}
  - {source_model: b}
"""


def test_experts_and_the_rest_are_taken_over_as_they_are(tmp_path: Any) -> None:
    plan = planned(tmp_path, {"base": llama(), "a": llama(), "b": llama()}, MIXTURE)
    steps = plan.stages["moe"].steps
    assert steps["model.layers.1.block_sparse_moe.experts.1.w2.weight"] == SourceTensor(
        "b", "model.layers.1.mlp.down_proj.weight", TensorSpec(DType.BF16, (32, 64))
    )
    made = [name for name, step in steps.items() if isinstance(step, Derivation)]
    assert made == [f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(2)]
    assert any(note.endswith("the output is Mixtral") for note in plan.notes)


def test_a_layer_of_seven_billion_parameters_is_run_within_four_gigabytes() -> None:
    width, inner = 4096, 11008
    shapes = [(64, width), *[(width, width)] * 4, (inner, width), (inner, width), (width, inner), (width,), (width,)]
    inputs = tuple(SourceTensor("base", str(n), TensorSpec(DType.BF16, shape)) for n, shape in enumerate(shapes))
    drv = Derivation("decoder_layer", 1, {}, inputs, inputs[0].spec)
    builder = BUILTIN["decoder_layer"]
    assert cost(builder, drv, block_elements(builder, drv, 1_000_000_000)) < 4_000_000_000 - BASELINE


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "olmo2", "olmoe"])
def test_what_is_assumed_of_a_silent_config_is_what_its_class_assumes(model_type: str) -> None:
    from transformers import CONFIG_MAPPING

    told = {key: SIZES[key] for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")}
    theirs = CONFIG_MAPPING[model_type](**told).to_dict()
    ours = assumed({**told, "model_type": model_type})
    theirs["rope_theta"] = theirs["rope_parameters"]["rope_theta"]
    for key in ("sliding_window", "head_dim", "num_key_value_heads"):  # classes work these out from other fields
        ours.pop(key, None)
    assert {key: theirs[key] for key in ours} == ours


@pytest.mark.parametrize("family", [one for one in FAMILIES if one.model_type != "deepseek"], ids=lambda one: one.name)
def test_a_config_comes_back_from_its_class_as_it_was_told(family: Any) -> None:
    from transformers import CONFIG_MAPPING

    base = {**SIZES, "model_type": sorted(family.inputs)[0], "rope_theta": 5000.0, "rms_norm_eps": 1e-4}
    told = family_config(family, base, Sizes(experts=3, shared=family.least, per_token=2, inner=48))
    theirs = CONFIG_MAPPING[family.model_type].from_dict(told).to_dict()
    unused = {"sliding_window"}  # a class may forget a window that is not used
    known = {key: value for key, value in told.items() if key in theirs.keys() - unused}
    assert {key: theirs[key] for key in known} == known
    assert theirs["rope_parameters"]["rope_theta"] == 5000.0
    experts = theirs.get("num_local_experts") or theirs["num_experts"]
    assert (experts, theirs["num_experts_per_tok"]) == (3, 2)
