"""Mixtures of experts built from pico models: what each family holds, computes, and recomputes after a change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.building import build, fails, packs
from tests.helpers import load_tensors, pico_adapter, save_tensors, write_recipe
from tests.mixtures import loaded, logits, mixture, pico

FAMILIES = (
    ("Mixtral", "llama", 0),
    ("Mixtral", "mistral", 0),
    ("Qwen2-MoE", "qwen2", 1),
    ("Qwen2-MoE", "llama", 1),
    ("Qwen2-MoE", "mistral", 1),
    ("Qwen3-MoE", "qwen3", 0),
    ("OLMoE", "olmoe", 0),
    ("FlexOlmo", "olmo2", 0),
)
RESIDUAL = {"residual_scale": 0.0}
Dense = Callable[[str, int], Path]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Dense:
    """A dense model of a type and a seed, made once."""
    top = tmp_path_factory.mktemp("dense")

    def made(model_type: str, seed: int = 0) -> Path:
        folder = top / f"{model_type}-{seed}"
        return folder if folder.exists() else pico(folder, model_type, seed)

    return made


def built(folder: Path, recipe: dict[str, Any], *args: Any) -> dict[str, Any]:
    text = write_recipe(folder, recipe, "moe.yml")
    return build(text, "-o", folder / "out", "--store", folder / "store", *args)["stages"]


def test_hidden_states_choose_the_rows(dense: Dense, tmp_path: Path) -> None:
    recipe = mixture(dense("llama", 0), [dense("llama", 1), dense("llama", 2)], gate_mode="hidden")
    stages = built(tmp_path, recipe)
    assert list(stages) == ["moe/into layer 0", "moe/into layer 1", "moe"]
    made = load_tensors(tmp_path / "out")
    rows = [made[f"model.layers.{layer}.block_sparse_moe.gate.weight"] for layer in range(2)]
    assert not rows[0].equal(rows[1])
    assert all(abs(row.norm() - 1) < 0.01 for layer in rows for row in layer)
    assert (tmp_path / "out" / "mergekit_moe_config.yml").is_file()


@pytest.mark.parametrize("layout", ["split", "fused"])
@pytest.mark.parametrize(("family", "model_type", "shared"), FAMILIES)
@pytest.mark.parametrize("gate_mode", ["cheap_embed", "random", "uniform_random"])
def test_experts_that_equal_the_dense_model_give_its_logits_under_any_router(
    dense: Dense, tmp_path: Path, family: str, model_type: str, shared: int, gate_mode: str, layout: str
) -> None:
    base = dense(model_type, 0)
    beside = [{"source_model": str(base), "positive_prompts": ["w1"], **RESIDUAL}] * shared
    recipe = mixture(base, [base, base, base], gate_mode=gate_mode, architecture=family, shared_experts=beside)
    built(tmp_path, {"kind": "moe", **recipe, "layout": layout})
    difference = (logits(tmp_path / "out") - logits(base)).abs().max()
    assert difference < 1e-5


@pytest.mark.parametrize(("family", "model_type", "shared"), FAMILIES)
def test_a_family_is_chosen_loaded_and_run_with_hidden_gates(
    dense: Dense, tmp_path: Path, family: str, model_type: str, shared: int
) -> None:
    models = [dense(model_type, seed) for seed in range(3)]
    beside = [{"source_model": str(models[1]), "positive_prompts": ["w3 w4"]}] * shared
    wanted = {"architecture": family} if model_type in ("llama", "mistral") else {}
    recipe = mixture(models[0], models[1:], gate_mode="hidden", shared_experts=beside, **wanted)
    built(tmp_path, recipe)
    model = loaded(tmp_path / "out")
    assert type(model).__name__ == json.loads((tmp_path / "out/config.json").read_text())["architectures"][0]
    assert logits(tmp_path / "out").isfinite().all()


def test_deepseek_is_mixtral_under_other_names_and_takes_a_shared_expert(dense: Dense, tmp_path: Path) -> None:
    base, first, second = (dense("llama", seed) for seed in range(3))
    beside = [{"source_model": str(first)}]
    built(tmp_path / "d", mixture(base, [first, second], architecture="deepseek", shared_experts=beside))
    built(tmp_path / "m", mixture(base, [first, second]))
    ours, theirs = load_tensors(tmp_path / "d/out"), load_tensors(tmp_path / "m/out")
    for name, word in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        shared = ours.pop(f"model.layers.1.mlp.shared_experts.{name}_proj.weight")
        assert shared.equal(ours[f"model.layers.1.mlp.experts.0.{name}_proj.weight"])
        ours.pop(f"model.layers.0.mlp.shared_experts.{name}_proj.weight")
        ours = {key.replace(f".{name}_proj.", f".{word}."): value for key, value in ours.items()}
    renamed = {key.replace(".mlp.", ".block_sparse_moe."): value for key, value in ours.items()}
    assert renamed.keys() == theirs.keys()
    assert all(renamed[name].equal(theirs[name]) for name in theirs)
    config = json.loads((tmp_path / "d/out/config.json").read_text())
    assert (config["model_type"], config["n_routed_experts"], config["n_shared_experts"]) == ("deepseek", 2, 1)
    assert config["rope_theta"] == 10000.0


def test_noise_and_factor_change_the_matrices_that_they_are_for(dense: Dense, tmp_path: Path) -> None:
    base, first, second = (dense("llama", seed) for seed in range(3))
    recipe = mixture(base, [first, second])
    recipe["experts"][0] |= {"noise_scale": 0.5}
    recipe["experts"][1] |= {"residual_scale": 0.5}
    built(tmp_path, recipe)
    made, noisy, halved = (load_tensors(folder) for folder in (tmp_path / "out", first, second))
    module = "model.layers.0.block_sparse_moe.experts"
    for ours, word in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
        name = f"model.layers.0.mlp.{word}_proj.weight"
        added = made[f"{module}.0.{ours}.weight"] - noisy[name]
        assert abs(added.std() - 0.5) < 0.05
        assert made[f"{module}.1.{ours}.weight"].equal(halved[name] * (0.5 if word == "down" else 1.0))
    fused = {"kind": "moe", **recipe, "layout": "fused"}
    built(tmp_path / "fused", fused)
    assert (logits(tmp_path / "out") - logits(tmp_path / "fused/out")).abs().max() < 1e-5


def test_another_prompt_recomputes_the_routers_only(dense: Dense, tmp_path: Path) -> None:
    recipe = mixture(dense("llama", 0), [dense("llama", 1), dense("llama", 2)], gate_mode="hidden")
    first = built(tmp_path, recipe)
    assert first["moe"]["computed"] == first["moe"]["tensors"]
    recipe["experts"][1]["positive_prompts"] = ["w50 w51"]
    again = built(tmp_path, recipe)
    assert {name: stage["computed"] for name, stage in again.items()} == {
        "moe/into layer 0": 1,
        "moe/into layer 1": 1,
        "moe": 2,
    }
    recipe["gate_mode"] = "hidden_avg"  # works from the same states
    again = built(tmp_path, recipe)
    assert {name: stage["computed"] for name, stage in again.items()} == {
        "moe/into layer 0": 0,
        "moe/into layer 1": 0,
        "moe": 2,
    }


def test_another_layer_of_an_expert_rewrites_its_shard_only(dense: Dense, tmp_path: Path) -> None:
    expert = pico(tmp_path / "expert", "llama", 5)
    recipe = {
        "kittybuild": 1,
        "stages": {"moe": {"kind": "moe", **mixture(dense("llama", 0), [expert, dense("llama", 2)])}},
        "outputs": {"moe": {"folder": "out", "shard_size": "20kB"}},
    }
    text = write_recipe(tmp_path, recipe)
    build(text, "--store", tmp_path / "store")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.safetensors")}
    tensors = load_tensors(expert)
    tensors["model.layers.1.mlp.up_proj.weight"] += 1
    save_tensors(expert / "model.safetensors", tensors)
    done = build(text, "--store", tmp_path / "store")
    assert done["stages"]["moe"]["computed"] == 1
    assert done["outputs"]["moe"] == {**done["outputs"]["moe"], "shards_written": 1, "shards_linked": len(before) - 1}
    changed = [name for name, data in before.items() if (tmp_path / "out" / name).read_bytes() != data]
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert changed == [index["model.layers.1.block_sparse_moe.experts.0.w3.weight"]]


@pytest.mark.parametrize("gate_mode", ["cheap_embed", "hidden"])
def test_a_chain_fused_has_the_bits_of_one_kept_and_writes_nothing_of_it(
    dense: Dense, tmp_path: Path, gate_mode: str
) -> None:
    base = dense("llama", 0)
    adapters = [str(pico_adapter(tmp_path / f"adapter{seed}", base, seed)) for seed in (1, 2)]
    manifests, computed = {}, {}
    for keep in (True, False):
        merge = {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in ("a", "b")]}
        stages: dict[str, Any] = {
            "a": {"kind": "apply_lora", "base": str(base), "adapters": [{"adapter": adapters[0]}], "keep": keep},
            "b": {"kind": "apply_lora", "base": str(base), "adapters": [{"adapter": adapters[1]}], "keep": keep},
            "soup": {**merge, "keep": keep},
            "moe": {"kind": "moe", **mixture("soup", ["a", f"{base}+{adapters[1]}"], gate_mode=gate_mode)},
        }
        recipe = write_recipe(tmp_path, {"kittybuild": 1, "stages": stages})
        store = tmp_path / f"store{keep}"
        done = build(recipe, "moe", "-o", tmp_path / f"out{keep}", "--store", store)
        manifests[keep] = done["stages"]["moe"]["manifest"]
        computed[keep] = {name: stage["computed"] for name, stage in done["stages"].items()}
    assert manifests[True] == manifests[False]
    assert all(computed[True][name] for name in ("a", "b", "soup"))
    assert not any(computed[False][name] for name in ("a", "b", "soup"))
    # One pack is the output, the others are hidden states: the router's own, not an intermediate model's.
    assert len(packs(tmp_path / "storeFalse")) == 1 + (2 if gate_mode == "hidden" else 1)


def test_a_prompt_longer_than_the_context_is_told_before_anything_is_built(dense: Dense, tmp_path: Path) -> None:
    recipe = mixture(dense("llama", 0), [dense("llama", 1), dense("llama", 2)])
    recipe["experts"][0]["positive_prompts"] = [" ".join(["w1"] * 40)]
    status, code, error = fails(write_recipe(tmp_path, recipe), "-o", tmp_path / "out", "--store", tmp_path / "s")
    assert (status, code) == (3, "KB353")
    assert "41 tokens" in error["message"]


def test_why_no_family_fits_is_told_for_each(dense: Dense, tmp_path: Path) -> None:
    recipe = mixture(dense("qwen3", 0), [dense("llama", 1), dense("qwen3", 2)])
    _, code, error = fails(write_recipe(tmp_path, recipe), "-o", tmp_path / "out", "--store", tmp_path / "s")
    assert code == "KB350"
    for family in ("Mixtral", "DeepSeek-MoE", "Qwen2-MoE", "Qwen3-MoE", "OLMoE", "FlexOlmo"):
        assert f"\n  {family}: " in error["message"]


def test_an_expert_of_another_shape_is_refused(dense: Dense, tmp_path: Path) -> None:
    wide = pico(tmp_path / "wide", "llama", 3, intermediate_size=64)
    recipe = mixture(dense("llama", 0), [wide, dense("llama", 2)])
    _, code, error = fails(write_recipe(tmp_path, recipe), "-o", tmp_path / "out", "--store", tmp_path / "s")
    assert code == "KB351"
    assert "[64, 32], the base's [48, 32]" in error["message"]
