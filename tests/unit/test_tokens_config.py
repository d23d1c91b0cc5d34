"""A vocabulary in config.json, in the names of tensors, and what models say that an output can have only once."""

from __future__ import annotations

from typing import Any

import pytest

from kittybuild.tensors import Shape
from kittybuild.tokens.agreement import Facts, disagreements
from kittybuild.tokens.config import rows_in, vocabulary_axis, with_rows, with_token_ids
from tests.tokenizers import byte_level, files_of, vocabularies


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        ({"vocab_size": 7}, 7),
        ({"text_config": {"vocab_size": 8}, "vision_config": {"vocab_size": 9}}, 8),
        ({"vocab_size": 7, "text_config": {"vocab_size": 8}}, 7),
        ({"n_vocab": 5}, 5),
        ({"hidden_size": 5}, None),
        ({"vocab_size": None}, None),
    ],
)
def test_the_rows_of_a_config(config: dict[str, Any], rows: int | None) -> None:
    assert rows_in(config) == rows


def test_only_numbers_of_rows_become_others() -> None:
    config = {
        "vocab_size": 64,
        "hidden_size": 64,
        "text_config": {"vocab_size": 64, "pad_token_id": 64},
        "audio_config": {"vocab_size": 99},
        "padded_vocab_size": 64,
        "names": ["vocab_size"],
    }
    changed = with_rows(config, 64, 70)
    assert changed == {
        **config,
        "vocab_size": 70,
        "text_config": {"vocab_size": 70, "pad_token_id": 64},
        "padded_vocab_size": 70,
    }
    assert list(changed) == list(config)


def test_ids_follow_their_tokens() -> None:
    old, new = vocabularies(
        old=files_of(byte_level([], ["<s>", "</s>", "<im>", "<gone>"])),
        new=files_of(byte_level(["in"], ["</s>", "<s>", "<im>"])),
    ).values()
    config = {
        "bos_token_id": 256,
        "eos_token_id": [257, 258],
        "pad_token_id": None,
        "image_token_index": 259,
        "vocab_size": 260,
        "text_config": {"eos_token_id": 257, "sep_token_id": 9999},
        "forced_bos_token_id": True,
    }
    changed, lost = with_token_ids(config, old, new)
    assert changed == {
        **config,
        "bos_token_id": 258,
        "eos_token_id": [257, 259],
        "text_config": {"eos_token_id": 257, "sep_token_id": 9999},
    }
    assert lost == ["image_token_index"]
    assert with_token_ids(config, old, old) == (config, [])


@pytest.mark.parametrize(
    ("name", "shape", "axis"),
    [
        ("model.embed_tokens.weight", (100, 32), 0),
        ("lm_head.weight", (100, 32), 0),
        ("lm_head.bias", (100,), 0),
        ("cls.predictions.bias", (100,), 0),
        ("final_logits_bias", (1, 100), 1),
        ("head.transposed", (32, 100), 1),
        ("model.embed_tokens.weight", (100, 100), 0),
        ("embed_tokens_per_layer.weight", (100, 7, 3), 0),
        ("model.norm.weight", (100,), None),
        ("model.layers.3.mlp.up_proj.weight", (100, 32), None),
        ("transformer.wpe.weight", (100, 32), None),
        ("embeddings.position_embeddings.weight", (100, 32), None),
        ("embeddings.token_type_embeddings.weight", (2, 32), None),
        ("model.embed_tokens.weight", (99, 32), None),
    ],
)
def test_the_axis_of_the_tokens(name: str, shape: Shape, axis: int | None) -> None:
    assert vocabulary_axis(name, shape, 100) == axis


BASE: dict[str, Any] = {"rope_theta": 10000, "max_position_embeddings": 4096, "eos_token_id": 2}


def said(config: dict[str, Any] | None = None, **facts: Any) -> tuple[str, ...]:
    """The lines about a base and one other model."""
    lead = Facts(BASE, template="{{ one }}", eos="</s>")
    merged = {"base": lead, "a": Facts({**BASE, **(config or {})}, **{"template": "{{ one }}", "eos": "</s>", **facts})}
    return disagreements(merged, "base")


def test_models_that_agree_are_not_spoken_of() -> None:
    assert said() == ()
    assert said(template=" {{ one }}\n") == ()
    assert said(template=None, eos=None) == ()
    newer = {"rope_theta": None, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    assert said(newer) == ()
    assert disagreements({"base": Facts(BASE), "a": Facts({"text_config": BASE}), "b": Facts()}, "base") == ()


@pytest.mark.parametrize(
    ("config", "facts", "line"),
    [
        ({}, {"template": "{{ two }}"}, "chat template: the output has that of base; a has another"),
        ({}, {"eos": "<|im_end|>"}, "eos token: the output has that of base, </s>; a has <|im_end|>"),
        (
            {},
            {"generation": {"eos_token_id": [2, 7]}},
            "eos_token_id: the output has that of base, 2; a has [2, 7]",
        ),
        (
            {"rope_theta": 5e5},
            {},
            'rope: the output has that of base, {"rope_theta": 10000.0}; a has {"rope_theta": 500000.0}',
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {},
            'rope: the output has that of base, {"rope_theta": 10000.0}; '
            'a has {"factor": 2.0, "rope_theta": 10000.0, "rope_type": "linear"}',
        ),
        (
            {"max_position_embeddings": 32768},
            {},
            'position limit: the output has that of base, {"max_position_embeddings": 4096}; '
            'a has {"max_position_embeddings": 32768}',
        ),
    ],
)
def test_each_disagreement_has_a_line(config: dict[str, Any], facts: dict[str, Any], line: str) -> None:
    assert said(config, **facts) == (line,)


def test_templates_that_the_base_lacks() -> None:
    models = {"base": Facts(), "a": Facts(template="x{{ y }}"), "b": Facts(template="z{{ y }}")}
    assert disagreements(models, "base") == ("chat template: the output has none, as base; a, b have one",)
    assert len(disagreements(models, "a")) == 1
