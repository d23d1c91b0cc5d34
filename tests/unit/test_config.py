"""What a merge changes in config.json: the number of layers, what is listed by layer, the dtype; and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from kittybuild.planner.config import LayerOrigin, with_dtype, with_layers
from kittybuild.planner.towers import sliced
from kittybuild.tensors import DType


def sliced_config(config: dict[str, Any], layers: list[int], stack: str = "model.layers", old: int = 4) -> Any:
    """The config of a model of `old` layers with these of its layers, and what it cannot say."""
    (tower,) = sliced([f"{stack}.{index}.w" for index in range(old)], config)
    return with_layers(config, tower, [LayerOrigin(config, tower, layer) for layer in layers])


def config_of(config: dict[str, Any], layers: list[int], stack: str = "model.layers", old: int = 4) -> Any:
    return sliced_config(config, layers, stack, old)[0]


@pytest.mark.parametrize(
    "key",
    ["num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers", "encoder_layers", "depth"],
)
def test_a_count_of_the_old_layers_becomes_the_new_one(key: str) -> None:
    stack = next((f"model.{side}.layers" for side in ("encoder", "decoder") if side in key), "model.layers")
    assert config_of({key: 4, "x": 4}, [0, 1, 1], stack) == {key: 3, "x": 4}


@pytest.mark.parametrize("config", [{"num_hidden_layers": 5}, {"num_layers_of_cake": 4}, {"first_k_dense": 4}])
def test_other_numbers_stay(config: dict[str, Any]) -> None:
    assert config_of(config, [0, 1, 1]) == config


LISTS: list[tuple[dict[str, Any], list[int], dict[str, Any]]] = [
    ({"layer_types": ["a", "b", "c", "d"]}, [3, 1, 1], {"layer_types": ["d", "b", "b"]}),
    ({"layers_block_type": ["a", "b"]}, [0], {"layers_block_type": ["a", "b"]}),  # as many as something else
    ({"eos_token_id": [1, 2, 3, 4]}, [0], {"eos_token_id": [1, 2, 3, 4]}),
    ({"no_rope_layers": [1, 1, 1, 0]}, [3, 0], {"no_rope_layers": [0, 1]}),
    ({"intermediate_size": [8, 8, 16, 16]}, [1, 2], {"intermediate_size": [8, 16]}),
    ({"full_attn_idxs": [1, 3]}, [0, 1, 2, 1, 2, 3], {"full_attn_idxs": [1, 3, 5]}),
    ({"mlp_only_layers": [0]}, [1, 0, 0], {"mlp_only_layers": [1, 2]}),
    ({"mlp_only_layers": []}, [1, 0], {"mlp_only_layers": []}),
    ({"hybrid_override_pattern": "M-M*"}, [0, 3, 3], {"hybrid_override_pattern": "M**"}),
    ({"attention_types": [[["x", "y"], 2]]}, [1, 3, 0], {"attention_types": [[["y", "y", "x"], 1]]}),
    ({"first_k_dense_replace": 1}, [0, 0, 2], {"first_k_dense_replace": 2}),
    ({"num_kv_shared_layers": 2}, [0, 1, 2, 2, 3], {"num_kv_shared_layers": 3}),
    ({"block_configs": [{"a": i} for i in range(4)]}, [2, 3], {"block_configs": [{"a": 2}, {"a": 3}]}),
    ({"rope_scaling": {"type": "x", "short_factor": [1, 2, 3, 4]}}, [0], {}),
]


@pytest.mark.parametrize(("config", "layers", "changed"), LISTS, ids=[next(iter(case[0])) for case in LISTS])
def test_what_is_told_layer_by_layer_follows_the_layers(
    config: dict[str, Any], layers: list[int], changed: dict[str, Any]
) -> None:
    config = {"num_hidden_layers": 4, **config}
    assert config_of(config, layers) == {**config, **changed, "num_hidden_layers": len(layers)}


@pytest.mark.parametrize(
    ("config", "layers", "doubt"),
    [
        ({"first_k_dense_replace": 1}, [0, 1, 0], ("first_k_dense_replace",)),
        ({"attn_layer_period": 2}, [0, 1, 1, 2], ("attn_layer_period",)),
        ({"attn_layer_period": 2}, [0, 1, 0, 1], ()),
        ({"sliding_window_pattern": 2, "layer_types": list("abab")}, [0, 0], ()),
    ],
)
def test_what_no_number_can_say_is_told(config: dict[str, Any], layers: list[int], doubt: tuple[str, ...]) -> None:
    assert sliced_config({"num_hidden_layers": 4, **config}, layers)[1] == doubt


def test_any_list_of_many_entries_is_by_layer_if_it_has_one_for_each() -> None:
    config = {"num_hidden_layers": 12, "altogether_new": list(range(12))}
    assert config_of(config, [11, 0], old=12) == {"num_hidden_layers": 2, "altogether_new": [11, 0]}


def test_a_layer_brings_its_entry_from_its_own_model() -> None:
    one, other = ({"num_hidden_layers": 2, "layer_types": types} for types in (["a", "b"], ["c", "d"]))
    (tower,) = sliced(["model.layers.0.w", "model.layers.1.w"], one)
    origins = [LayerOrigin(one, tower, 0), LayerOrigin(other, tower, 1)]
    assert with_layers(one, tower, origins)[0]["layer_types"] == ["a", "d"]


def test_only_the_part_that_counts_the_stack_is_changed() -> None:
    config = {
        "text_config": {"num_hidden_layers": 2, "layer_types": ["a", "b"]},
        "vision_config": {"depth": 2, "layer_types": ["a", "b"]},
    }
    assert config_of(config, [1], "model.language_model.layers", old=2) == {
        "text_config": {"num_hidden_layers": 1, "layer_types": ["b"]},
        "vision_config": {"depth": 2, "layer_types": ["a", "b"]},
    }


def test_layers_behind_the_last_that_predict_further_tokens_are_counted_apart() -> None:
    config = {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}
    assert config_of(config, [0, 2, 3]) == {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    assert config_of(config, [0, 2]) == {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}


def test_the_order_of_the_keys_and_the_given_config_stay() -> None:
    config = {"z": 1, "num_hidden_layers": 2, "a": {"num_layers": 2}}
    assert list(config_of(config, [0], old=2)) == ["z", "num_hidden_layers", "a"]
    assert config == {"z": 1, "num_hidden_layers": 2, "a": {"num_layers": 2}}


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"dtype": "float32", "torch_dtype": "float32"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        ({"x": 1}, {"x": 1, "dtype": "bfloat16"}),
        (
            {"dtype": "float32", "text_config": {"dtype": "float32"}, "vision_config": {"x": 1}},
            {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}, "vision_config": {"x": 1}},
        ),
    ],
)
def test_the_dtype_stands_under_the_name_that_the_config_uses(config: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert with_dtype(config, DType.BF16) == wanted
