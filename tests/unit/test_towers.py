"""Which stack a slice is cut from, by names, numbers and config alone."""

from __future__ import annotations

from typing import Any

import pytest

from kittybuild.planner.towers import is_count, sliced, towers


def names(**stacks: int) -> list[str]:
    return [f"{stack.replace('__', '.')}.{index}.w" for stack, count in stacks.items() for index in range(count)]


def labels(tensors: list[str], config: dict[str, Any] | None = None) -> list[str]:
    return [tower.label for tower in sliced(tensors, config)]


VISION_LANGUAGE = {"text_config": {"num_hidden_layers": 2}, "vision_config": {"depth": 2}}


@pytest.mark.parametrize(
    ("tensors", "config", "wanted"),
    [
        (names(model__layers=2), None, ["model.layers"]),
        (names(model__layers=2, classifier=3), {"num_hidden_layers": 2}, ["model.layers"]),
        (names(model__layers=2, heads=4), None, ["heads"]),
        (names(model__visual__blocks=2, model__language_model__layers=2), VISION_LANGUAGE,
         ["model.language_model.layers"]),
        (names(vision_model__encoder__layers=9, text_model__encoder__layers=2), None, ["text_model.encoder.layers"]),
        (names(encoder__block=2, decoder__block=3), {"num_layers": 2, "num_decoder_layers": 3},
         ["encoder.block", "decoder.block"]),
        (names(model__decoder__layers=2), {"num_hidden_layers": 2}, ["model.decoder.layers"]),
        (names(bert__encoder__layer=2), {"num_hidden_layers": 2}, ["bert.encoder.layer"]),
        (names(vision__blocks=2), {"depth": 2}, ["vision.blocks"]),
        (["norm.weight"], None, []),
    ],
)  # fmt: skip
def test_the_stack_of_the_text_that_the_config_counts(
    tensors: list[str], config: dict[str, Any] | None, wanted: list[str]
) -> None:
    assert labels(tensors, config) == wanted


def test_lists_side_by_side_are_one_stack() -> None:
    (tower,) = sliced(names(model__attentions=3, model__ffns=3), {"n_layers": 3})
    assert tower.stacks == ("model.attentions", "model.ffns")
    assert tower.keys == (("n_layers",),)


@pytest.mark.parametrize(
    ("stack", "keys"),
    [("encoder", {"encoder_layers", "num_hidden_layers"}), ("decoder", {"decoder_layers"})],
)
def test_encoder_and_decoder_are_counted_apart_even_if_equal(stack: str, keys: set[str]) -> None:
    config = {"encoder_layers": 2, "decoder_layers": 2, "num_hidden_layers": 2}
    found = towers(names(model__encoder__layers=2, model__decoder__layers=2), config)
    (tower,) = [tower for tower in found if stack in tower.label]
    assert {path[0] for path in tower.keys} == keys


def test_layers_that_predict_further_tokens_stand_behind_the_counted_ones() -> None:
    (tower,) = sliced(names(model__layers=4), {"num_hidden_layers": 3, "num_nextn_predict_layers": 1})
    assert (tower.count, tower.body) == (4, 3)


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "decoder_layers", "depth", "num_blocks"])
def test_numbers_of_layers(key: str) -> None:
    assert is_count(key)


@pytest.mark.parametrize(
    "key", ["num_kv_shared_layers", "num_heads", "first_k_dense_replace", "num_mtp_layers", "blocks"]
)
def test_other_numbers(key: str) -> None:
    assert not is_count(key)
