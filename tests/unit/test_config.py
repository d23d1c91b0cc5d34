"""What a merge changes in config.json: the number of layers, what is listed by layer, the dtype; and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from kittybuild.planner.config import with_dtype, with_layers
from kittybuild.tensors import DType


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers", "encoder_layers", "depth"]
)
def test_a_count_of_the_old_layers_becomes_the_new_one(key: str) -> None:
    assert with_layers({key: 4, "x": 4}, 4, [0, 1, 1]) == {key: 3, "x": 4}


@pytest.mark.parametrize("config", [{"num_hidden_layers": 5}, {"num_layers_of_cake": 4}, {"first_k_dense": 4}])
def test_other_numbers_stay(config: dict[str, Any]) -> None:
    assert with_layers(config, 4, [0, 1, 1]) == config


def test_lists_by_layer_follow_their_layers() -> None:
    config = {"layer_types": ["full", "sliding", "full"], "eos_token_id": [1, 2, 3], "layers_block_type": ["a", "b"]}
    assert with_layers(config, 3, [2, 1, 1, 0]) == {
        "layer_types": ["full", "sliding", "sliding", "full"],
        "eos_token_id": [1, 2, 3],
        "layers_block_type": ["a", "b"],
    }


def test_it_looks_into_the_parts_of_a_model() -> None:
    config = {"text_config": {"num_hidden_layers": 2, "layer_types": ["a", "b"]}, "vision_config": {"depth": 7}}
    assert with_layers(config, 2, [1]) == {
        "text_config": {"num_hidden_layers": 1, "layer_types": ["b"]},
        "vision_config": {"depth": 7},
    }


def test_the_order_of_the_keys_and_the_given_config_stay() -> None:
    config = {"z": 1, "num_hidden_layers": 2, "a": {"num_layers": 2}}
    assert list(with_layers(config, 2, [0])) == ["z", "num_hidden_layers", "a"]
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
