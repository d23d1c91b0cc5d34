"""Builds from inputs that are not safetensors of plain numbers: pickled, FP8. Real ones are in test_real_models.py."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kittybuild.checkpoint.opening import open_source
from tests.building import build, fails, fresh, linear, manifest_of
from tests.helpers import load_tensors, pico_llama, save_tensors, write_json, write_model
from tests.torchfiles import raw

E4M3 = torch.float8_e4m3fn


def pickled(folder: Path, source: Path, *, legacy: bool = False, shards: int = 1) -> Path:
    """The checkpoint `source` as `.bin` files."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_tensors(source)
    names, weight_map = list(tensors), {}
    for number in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        part = {name: tensors[name] for name in names[number::shards]}
        torch.save(part, folder / file, _use_new_zipfile_serialization=not legacy)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        write_json(folder / "pytorch_model.bin.index.json", {"weight_map": weight_map})
    return folder


def same(folder: Path, expected: Mapping[str, torch.Tensor]) -> None:
    found = load_tensors(folder)
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name
        assert raw(tensor) == raw(expected[name]), name


class TestPickled:
    @pytest.mark.parametrize("form", [{}, {"legacy": True}, {"shards": 3}], ids=["zip", "legacy", "shards"])
    def test_a_merge_is_the_one_of_safetensors(self, tmp_path: Path, form: dict[str, Any]) -> None:
        base = pico_llama(tmp_path / "base", 1)
        happy = pico_llama(tmp_path / "happy", 2, base=base)
        plain = build(linear(tmp_path, {base: 0.5, happy: 0.5}), "-o", tmp_path / "out", "--store", tmp_path / "store")
        other = pickled(tmp_path / "pickled", happy, **form)
        recipe = linear(tmp_path, {base: 0.5, other: 0.5}, "other.yml")
        document = build(recipe, "-o", tmp_path / "other", "--store", tmp_path / "second")
        assert manifest_of(document) == manifest_of(plain)
        again = build(recipe, "-o", tmp_path / "other", "--store", tmp_path / "second")
        assert again["stages"]["merge"]["computed"] == 0

    def test_a_plan_of_pickled_sources_runs_nothing_in_them(self, tmp_path: Path) -> None:
        mark = tmp_path / "mark"

        class Evil:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.system, (f"touch {mark}",)

        base = pico_llama(tmp_path / "base", 1)
        evil = pickled(tmp_path / "evil", base)
        torch.save({**load_tensors(base), "extra": Evil()}, evil / "pytorch_model.bin")
        recipe = linear(tmp_path, {base: 0.5, evil: 0.5})
        status, code, error = fails(recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")
        assert (status, code) == (4, "KB221")
        assert "'posix.system'" in error["message"]
        assert not mark.exists()
        assert not (tmp_path / "out").exists()

    def test_a_plan_starts_without_torch(self, tmp_path: Path) -> None:
        base = pico_llama(tmp_path / "base", 1)
        other = pickled(tmp_path / "pickled", base)
        recipe = linear(tmp_path, {base: 0.5, other: 0.5})
        done = fresh("plan", recipe, "--store", tmp_path / "store", env={"PYTHONPROFILEIMPORTTIME": "1"})
        assert done.returncode == 0, done.stderr
        modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "kittybuild.checkpoint.pickled" in modules
        assert not modules & {"torch", "numpy"}


def fp8(folder: Path, source: Path, *, shards: int = 1) -> dict[str, torch.Tensor]:
    """The checkpoint `source` with its matrices in FP8 and blocks of 16, and what they stand for."""
    stored, scales, plain = {}, {}, {}
    for name, tensor in load_tensors(source).items():
        if tensor.dim() == 1 or "embed" in name or "lm_head" in name:
            stored[name] = plain[name] = tensor
            continue
        blocks = tensor.float().unfold(0, 16, 16).unfold(1, 16, 16)
        scale = blocks.abs().amax((2, 3)) / 448
        whole = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
        stored[name] = (tensor.float() / whole).to(E4M3)
        scales[f"{name}_scale_inv"] = scale
        plain[name] = (stored[name].float() * whole).bfloat16()
    config = json.loads((source / "config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    write_model(folder, stored | scales, {**config, "quantization_config": quantization}, shards=shards)
    return plain


class TestFp8:
    def test_the_output_is_plain_and_its_config_says_so(self, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        plain = fp8(tmp_path / "fp8", pico_llama(tmp_path / "base", 1))
        document = build(
            linear(tmp_path, {tmp_path / "fp8": 1.0}), "-o", tmp_path / "out", "--store", tmp_path / "store"
        )
        same(tmp_path / "out", plain)
        assert any("14 as F8_E4M3 with scales, are read as bfloat16" in note for note in document["notes"])
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert "quantization_config" not in config
        lock = json.loads((tmp_path / "out" / "kittybuild.json").read_text())["lock"]
        assert [source["quantized"] for source in lock["sources"].values()] == [{"F8_E4M3 with scales": 14}]
        _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]

    def test_a_merge_is_the_one_of_what_it_stands_for(self, tmp_path: Path) -> None:
        base = pico_llama(tmp_path / "base", 1)
        plain = fp8(tmp_path / "fp8", base)
        config = json.loads((base / "config.json").read_text())
        write_model(tmp_path / "plain", plain, config)
        manifests = set()
        for name in ("fp8", "plain"):
            recipe = linear(tmp_path, {base: 0.5, tmp_path / name: 0.5})
            document = build(recipe, "-o", tmp_path / f"out-{name}", "--store", tmp_path / f"store-{name}")
            manifests.add(manifest_of(document))
        assert len(manifests) == 1

    def test_a_scale_that_changes_in_another_shard_is_noticed(self, tmp_path: Path) -> None:
        plain = fp8(tmp_path / "fp8", pico_llama(tmp_path / "base", 1), shards=2)
        recipe, store = linear(tmp_path, {tmp_path / "fp8": 1.0}), tmp_path / "store"
        build(recipe, "-o", tmp_path / "out", "--store", store)
        same(tmp_path / "out", plain)
        split = [name for name, entry in open_source(str(tmp_path / "fp8")).entries.items() if len(entry.files) == 2]
        assert split, "no tensor has its scale in the other shard: the test shows nothing"
        shard = tmp_path / "fp8" / "model-00002-of-00002.safetensors"
        changed = {name: t * 2 if name.endswith("_scale_inv") else t for name, t in load_file(shard).items()}
        save_tensors(shard, changed)
        build(recipe, "-o", tmp_path / "out", "--store", store)
        doubled = {name.removesuffix("_scale_inv") for name in changed if name.endswith("_scale_inv")}
        assert set(split) <= doubled
        same(tmp_path / "out", {name: tensor * 2 if name in doubled else tensor for name, tensor in plain.items()})
