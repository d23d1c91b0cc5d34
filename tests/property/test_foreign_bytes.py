"""Whatever bytes a stranger sends: every reader gives a value or an error with a code. It never fails otherwise, hangs,
takes much memory, executes or writes anything.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kittybuild import api
from kittybuild.checkpoint.adapter import read_adapter
from kittybuild.checkpoint.gguf import derived_companion
from kittybuild.checkpoint.opening import open_source
from kittybuild.checkpoint.sources.lockfile import read_lock
from kittybuild.publish.attest import attested, trusted_keys
from kittybuild.publish.provenance import read_provenance
from kittybuild.publish.published import open_published
from kittybuild.publish.verify import verify
from kittybuild.tokens.chat import read_template
from kittybuild.tokens.reading import FILES, read_vocabulary
from tests.building import build, linear
from tests.foreign import BYTES, FRAMED, JSON, Foreign
from tests.helpers import pico_adapter, pico_llama, write_json, write_recipe
from tests.tokenizers import byte_level, files_of, sentencepiece, unigram, write_files
from tests.unit.test_gguf import Model


def models(folder: Path) -> None:
    base = pico_llama(folder / "base", 0, layers=1, width=8, tokenizer=True)
    pico_llama(folder / "other", 1, base=base, tokenizer=True)
    pico_adapter(folder / "mood", base, 2, rank=2, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.0.*v_proj": 4})


def planned(**recipe: Any) -> Callable[[Path], object]:
    """Make the plan of a recipe over these models, as the command `plan` does."""

    def parse(folder: Path) -> object:
        if not (folder / "recipe.yml").exists():
            write_recipe(folder, recipe)
        return plan(folder)

    return parse


def plan(folder: Path) -> object:
    return api.plan(api.prepare(api.read_recipe(str(folder / "recipe.yml")), offline=True), None)


def sliced() -> dict[str, Any]:
    slices = [{"sources": [{"model": "base", "layer_range": [0, 1]}]}] * 2
    return {"merge_method": "passthrough", "slices": slices}


def soup(**more: Any) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [{"model": "base"}, {"model": "other"}],
        "parameters": {"weight": 1},
    } | more


def opened(file: str) -> Callable[[Path], object]:
    return lambda folder: open_source(str(folder / file))


def torch_file(layout: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        import torch

        value = {
            "state_dict": {"x": torch.arange(6.0).reshape(2, 3).t(), "y": torch.ones(2)},
            "epoch": 1,
            "opt": [1, {}],
        }
        torch.save(value, folder / "x.pt", _use_new_zipfile_serialization=layout == "zip")

    return make


def gguf(folder: Path) -> object:
    """A file with the tokens of a tokenizer."""
    document = byte_level(["Hello", "Ġworld"])["model"]
    tokens = list(document["vocab"])
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in document["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": "{{ messages }}",
        "general.name": "tiny",
    }
    return Model(metadata=metadata).write(folder / "x.gguf")


def read_gguf(folder: Path) -> None:
    path = str(folder / "x.gguf")
    for companion in open_source(path).companions:
        derived_companion(path, companion.name)


def tokens(folder: Path) -> None:
    """As `planned`, only the vocabulary: quicker."""
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}
    read_vocabulary(files, 300, "here")
    read_template(files, "here")


def tokenizer(document: Callable[[], dict[str, Any]]) -> Callable[[Path], object]:
    config = {"eos_token": {"content": "</s>"}, "chat_template": [{"name": "default", "template": "{{ x }}"}]}
    config |= {
        "added_tokens_decoder": {"290": {"content": "<x>", "special": True}},
        "additional_special_tokens": ["<y>"],
    }
    return lambda folder: write_files(folder, files_of(document(), config))


def published(folder: Path) -> None:
    models(folder)
    from tests.caches import signer

    key, public = signer(folder, "team-1")
    (folder / "keys").write_text(f"{public}\n")
    recipe = linear(folder, {"base": 0.5, "other": 0.5})
    build(recipe, "-o", folder / "out", "--store", folder / "store", "--attest", key)
    shutil.rmtree(folder / "store")


def proven(folder: Path) -> None:
    out = str(folder / "out")
    said = read_provenance(out)
    verify(out, said)
    attested(out, said, trusted_keys([str(folder / "keys")]))
    from kittybuild.builders.registry import BUILTIN

    assert open_published(out, BUILTIN, offline=True).lock is not None


OURS = {
    "kittybuild": 1,
    "sources": {"base": {"path": "base"}, "other": {"path": "other"}, "mood": {"path": "mood"}},
    "defaults": {"out_dtype": "float32", "seed": 3},
    "stages": {
        "glad": {"kind": "apply_lora", "base": "base", "adapters": [{"adapter": "mood", "weight": 0.5}]},
        "soup": {
            "merge_method": "ties",
            "base_model": "base",
            "models": [
                {"model": "glad", "parameters": {"weight": [0, 1], "density": {"value": 0.5}}},
                {"model": "other", "parameters": {"weight": [{"filter": "mlp", "value": 1}, {"value": 0.1}]}},
            ],
        },
    },
    "outputs": {"soup": {"folder": "out", "shard_size": "1MB"}},
}
MOE = {
    "base_model": "base",
    "gate_mode": "hidden",
    "experts": [{"source_model": name, "positive_prompts": [f"w1 {name}"]} for name in ("base", "other")],
}
TEXT = """
merge_method: linear
models:
  - {model: base, parameters: &w {weight: 0.5}}
  - model: other
    parameters:
      <<: *w
      normalize: true
parameters: {weight: [{filter: self_attn, value: [0, 0.5]}, {value: 0.25}]}
tokenizer: {source: union, tokens: {"<s>": {source: base, force: true}}}
"""


def with_recipe(text: str | dict[str, Any]) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        models(folder)
        text_of = text if isinstance(text, str) else json.dumps(text)
        (folder / "recipe.yml").write_text(text_of)

    return make


def locked(folder: Path) -> None:
    models(folder)
    write_recipe(folder, soup())
    api.lock(api.read_recipe(str(folder / "recipe.yml")), offline=True)


def sharded(folder: Path) -> None:
    pico_llama(folder, 0, layers=1, width=8, shards=2)


def quantized(folder: Path) -> None:
    models(folder)
    config = json.loads((folder / "base/config.json").read_text())
    config |= {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "rope_scaling": {"factor": 2},
    }
    config |= {"text_config": {"layer_types": ["full_attention"], "vocab_size": 64}, "vision_config": {"depth": 2}}
    write_json(folder / "base/config.json", config)


INDEX, CONFIG = "model.safetensors.index.json", "base/config.json"
TABLE = (
    Foreign("safetensors", "x.safetensors", FRAMED, lambda f: pico_llama(f, 0, layers=1, width=8).joinpath(
        "model.safetensors").rename(f / "x.safetensors"), opened("x.safetensors")),
    Foreign("index of shards", INDEX, JSON, sharded, opened("")),
    Foreign("torch file, zip", "x.pt", BYTES, torch_file("zip"), opened("x.pt"), 200),
    Foreign("torch file, legacy", "x.pt", BYTES, torch_file("legacy"), opened("x.pt"), 200),
    Foreign("gguf", "x.gguf", BYTES, gguf, read_gguf),
    Foreign("adapter's config", "mood/adapter_config.json", JSON, models, lambda folder: read_adapter(
        open_source(str(folder / "mood")))),
    Foreign("adapter's factors", "mood/adapter_model.safetensors", FRAMED, models, lambda folder: read_adapter(
        open_source(str(folder / "mood")))),
    Foreign("config, sliced", CONFIG, JSON, quantized, planned(**sliced()), 40),
    Foreign("config, merged", CONFIG, JSON, models, planned(**soup(tokenizer={"source": "union"})), 40),
    Foreign("config, in a mixture", CONFIG, JSON, models, planned(**MOE), 40),
    Foreign("tokenizer.json, BPE", "tokenizer.json", JSON, tokenizer(lambda: byte_level(["Hello"])), tokens),
    Foreign("tokenizer.json, unigram", "tokenizer.json", JSON, tokenizer(lambda: unigram({"ab": -1.0})), tokens),
    Foreign("tokenizer_config.json", "tokenizer_config.json", JSON, tokenizer(lambda: unigram({"ab": -1.0})), tokens),
    Foreign("tokenizer.json, merged", "base/tokenizer.json", JSON, models, planned(**soup(tokenizer_source="union")),
            40),
    Foreign("sentencepiece", "tokenizer.model", BYTES, lambda f: (f / "tokenizer.model").write_bytes(
        sentencepiece([("<unk>", 2), ("<s>", 3), ("a", 1), ("b", 4), ("ab", 1)])), tokens, 200),
    Foreign("recipe", "recipe.yml", JSON, with_recipe(OURS), plan, 100),
    Foreign("mergekit's recipe", "recipe.yml", BYTES, with_recipe(TEXT), plan, 100),
    Foreign("mergekit-moe's recipe", "recipe.yml", JSON, with_recipe(MOE), plan),
    Foreign("recipe.lock", "recipe.lock", JSON, locked, lambda folder: read_lock(str(folder / "recipe.yml"))),
    Foreign("kittybuild.json", "out/kittybuild.json", JSON, published, proven, 40),
    Foreign("attestation", "out/kittybuild.attestation.json", JSON, published, proven, 40),
)  # fmt: skip


@pytest.mark.parametrize("foreign", TABLE, ids=str)
def test_any_bytes_are_a_value_or_an_error(foreign: Foreign, tmp_path: Path) -> None:
    foreign.tried(tmp_path)
