"""Pico models, adapters and recipes for tests, and the commands as a test calls them.

The weights come from a counter-based generator keyed by (seed, tensor name): they are the same on every machine, and
in every order of making them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

HEADS = 4
KV_HEADS = 2
TARGETS = ("q_proj", "v_proj")


def noise(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 values that only seed and name decide."""
    import torch
    from numpy.random import Generator, Philox

    number = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")
    return torch.from_numpy(Generator(Philox(key=number)).standard_normal(shape, dtype="float32"))


def llama_shapes(*, layers: int = 2, width: int = 32, vocab: int = 64, tie: bool = False) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a Llama's tensors."""
    inner, groups = 2 * width, KV_HEADS * (width // HEADS)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for layer in range(layers):
        shapes |= {
            f"model.layers.{layer}.self_attn.q_proj.weight": (width, width),
            f"model.layers.{layer}.self_attn.k_proj.weight": (groups, width),
            f"model.layers.{layer}.self_attn.v_proj.weight": (groups, width),
            f"model.layers.{layer}.self_attn.o_proj.weight": (width, width),
            f"model.layers.{layer}.mlp.gate_proj.weight": (inner, width),
            f"model.layers.{layer}.mlp.up_proj.weight": (inner, width),
            f"model.layers.{layer}.mlp.down_proj.weight": (width, inner),
            f"model.layers.{layer}.input_layernorm.weight": (width,),
            f"model.layers.{layer}.post_attention_layernorm.weight": (width,),
        }
    shapes["model.norm.weight"] = (width,)
    return shapes if tie else {**shapes, "lm_head.weight": (vocab, width)}


def llama_config(*, layers: int, width: int, vocab: int, tie: bool, dtype: str) -> dict[str, Any]:
    """The config.json of a Llama of that size."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 128,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tie,
        "torch_dtype": dtype,
        "vocab_size": vocab,
    }


def pico_llama(
    folder: str | Path,
    seed: int,
    *,
    layers: int = 2,
    width: int = 32,
    dtype: str | None = None,
    vocab: int = 64,
    shards: int = 1,
    tie: bool = False,
    base: str | Path | None = None,
    spread: float = 0.02,
    tokenizer: bool = False,
) -> Path:
    """A Llama folder that transformers can load. With `base` a sibling of it: its size, its weights + spread * noise.

    `dtype` is the base's, else bfloat16.
    """
    import torch

    folder = Path(folder)
    if base is None:
        config = llama_config(layers=layers, width=width, vocab=vocab, tie=tie, dtype=dtype or "bfloat16")
        tensors = {}
        for name, shape in llama_shapes(layers=layers, width=width, vocab=vocab, tie=tie).items():
            drawn = noise(seed, name, shape)
            tensors[name] = 1 + 0.1 * drawn if len(shape) == 1 else drawn / math.sqrt(shape[-1])
    else:
        config = json.loads((Path(base) / "config.json").read_text(encoding="utf-8"))
        config["torch_dtype"] = dtype or config["torch_dtype"]
        tensors = {
            name: tensor.float() + spread * noise(seed, name, tuple(tensor.shape))
            for name, tensor in load_tensors(base).items()
        }
    kind = getattr(torch, config["torch_dtype"])
    write_model(folder, {name: tensor.to(kind) for name, tensor in tensors.items()}, config, shards=shards)
    if tokenizer:
        write_tokenizer(folder, config["vocab_size"])
    return folder


def write_model(
    folder: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, *, shards: int = 1
) -> Path:
    """A checkpoint folder with these tensors, in one file or in `shards` files with an index."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    if shards == 1:
        save_tensors(folder / "model.safetensors", tensors)
        return folder
    names, weight_map = list(tensors), {}
    size = -(-len(names) // shards)
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number * size : (number + 1) * size]
        save_tensors(folder / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return folder


def write_tokenizer(folder: str | Path, vocab: int) -> None:
    """A small word-level tokenizer with `vocab` tokens, as transformers loads it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<unk>", "<s>", "</s>"]
    words = {word: index for index, word in enumerate([*special, *(f"w{index}" for index in range(vocab - 3))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(special)
    folder = Path(folder)
    made.save(str(folder / "tokenizer.json"))
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    write_json(folder / "tokenizer_config.json", {**roles, "tokenizer_class": "PreTrainedTokenizerFast"})
    write_json(folder / "special_tokens_map.json", roles)


def pico_adapter(
    folder: str | Path,
    base: str | Path,
    seed: int,
    rank: int = 4,
    targets: Iterable[str] = TARGETS,
    *,
    dtype: str = "float32",
    **config: Any,
) -> Path:
    """A PEFT LoRA adapter for every module of `base` whose last name is one of `targets`.

    `config` goes into adapter_config.json; a `rank_pattern` in it (keys: ends of names) and `fan_in_fan_out` count for
    the factors, too.
    """
    import torch

    folder, targets = Path(folder), tuple(targets)
    patterns = config.get("rank_pattern", {})
    factors = {}
    for name, tensor in load_tensors(base).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in targets or tensor.dim() != 2:
            continue
        rows, columns = tensor.shape
        if config.get("fan_in_fan_out"):
            rows, columns = columns, rows
        found = [value for key, value in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{key})", module)]
        r = found[0] if found else rank
        factors[f"base_model.model.{module}.lora_A.weight"] = noise(seed, f"{module}/A", (r, columns)) / 8
        factors[f"base_model.model.{module}.lora_B.weight"] = noise(seed, f"{module}/B", (rows, r)) / 8
    folder.mkdir(parents=True, exist_ok=True)
    kind = getattr(torch, dtype)
    save_tensors(folder / "adapter_model.safetensors", {name: tensor.to(kind) for name, tensor in factors.items()})
    plain = {
        "base_model_name_or_path": str(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    write_json(folder / "adapter_config.json", {**plain, **config})
    return folder


def save_tensors(file: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, as transformers writes it."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(file), metadata={"format": "pt"})


def load_tensors(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder by name, in the order of the names."""
    from safetensors.torch import load_file

    found = {
        name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    return {name: found[name] for name in sorted(found)}


def write_json(file: str | Path, value: Any) -> None:
    """A JSON file, as transformers writes it."""
    Path(file).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_recipe(folder: str | Path, recipe: str | Mapping[str, Any], name: str = "recipe.yml") -> str:
    """The path of a new recipe file: a text as it is (its common indentation taken away), or plain data as YAML."""
    import yaml

    text = textwrap.dedent(recipe) if isinstance(recipe, str) else yaml.safe_dump(dict(recipe), sort_keys=False)
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def run_cli(*args: str | Path) -> tuple[int, dict[str, Any]]:
    """The exit status and the JSON document of a command; `--json` is added. A crash of ours is raised."""
    from click.testing import CliRunner

    from kittybuild.cli import main

    result = CliRunner().invoke(main, [*map(str, args), "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    documents = [line for line in result.stdout.splitlines() if line.startswith("{")]
    return result.exit_code, json.loads(documents[0]) if documents else {}
