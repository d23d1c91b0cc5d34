"""What tensor names tell, without a table of architectures."""

from __future__ import annotations

import pytest

from kittybuild.planner.names import LayerName, before_layers, layer_of, natural, stacks


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.layers.12.mlp.up_proj.weight", LayerName("model.layers", 12, "mlp.up_proj.weight")),
        ("transformer.h.0.attn.c_attn.bias", LayerName("transformer.h", 0, "attn.c_attn.bias")),
        ("model.layers.3.mlp.experts.7.w1.weight", LayerName("model.layers", 3, "mlp.experts.7.w1.weight")),
        (
            "encoder.block.1.layer.0.SelfAttention.q.weight",
            LayerName("encoder.block", 1, "layer.0.SelfAttention.q.weight"),
        ),
        ("blk.007.x", LayerName("blk", 7, "x")),
        ("model.norm.weight", None),
        ("lm_head.weight", None),
        ("model.layers.12", None),
        ("0.weight", None),
        ("layer12.weight", None),
        ("", None),
    ],
)
def test_a_layer_is_the_first_number_between_points(name: str, wanted: LayerName | None) -> None:
    assert layer_of(name) == wanted


def test_a_name_moves_to_another_layer() -> None:
    layer = layer_of("model.layers.3.mlp.experts.7.w1.weight")
    assert layer is not None
    assert layer.at(11) == "model.layers.11.mlp.experts.7.w1.weight"


def test_stacks_count_their_layers() -> None:
    names = ["encoder.layers.0.x", "encoder.layers.4.x", "decoder.layers.1.y", "lm_head.weight"]
    assert stacks(names) == {"encoder.layers": 5, "decoder.layers": 2}
    assert stacks(["norm.weight"]) == {}


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "transformer.wte.weight", "wpe.weight", "embeddings.norm"]
)
def test_embeddings_stand_before_the_layers(name: str) -> None:
    assert before_layers(name)


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "unembed.weight", "gpt_neox.embed_out.weight"])
def test_the_rest_stands_behind_them(name: str) -> None:
    assert not before_layers(name)


def test_people_count_to_ten() -> None:
    names = ["layers.10.a", "layers.2.b", "layers.2.a", "lm_head", "embed", "layers.2"]
    assert sorted(names, key=natural) == ["embed", "layers.2", "layers.2.a", "layers.2.b", "layers.10.a", "lm_head"]


def test_any_names_can_be_sorted() -> None:
    assert sorted(["1", "a", "", "a1", "1a", "²"], key=natural) == ["", "1", "1a", "a", "a1", "²"]


def test_a_number_of_any_length_is_no_trouble() -> None:
    longest = f"layers.{'9' * 5000}.x"
    assert layer_of(longest) is None
    assert sorted([longest, "layers.10.x"], key=natural) == ["layers.10.x", longest]
