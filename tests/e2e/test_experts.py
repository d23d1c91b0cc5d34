"""Fused and split experts are one model in two layouts: whichever stands in the base, the numbers are the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.architectures import Architecture, loaded, write_siblings
from tests.building import build, linear
from tests.helpers import load_tensors, save_tensors

MIXTRAL = Architecture("mixtral", "MixtralForCausalLM", "experts")


def fuse(folder: Path, to: Path) -> None:
    """The same model with its experts in two tensors a layer, under the names of today."""
    import torch

    tensors = load_tensors(folder)
    fused = {name.replace("block_sparse_moe", "mlp"): t for name, t in tensors.items() if ".experts." not in name}
    for layer in range(3):
        stem = f"model.layers.{layer}.block_sparse_moe.experts"
        w1, w2, w3 = ([tensors[f"{stem}.{e}.{word}.weight"] for e in range(4)] for word in ("w1", "w2", "w3"))
        new = stem.replace("block_sparse_moe", "mlp")
        fused[f"{new}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(w1, w3, strict=True)])
        fused[f"{new}.down_proj"] = torch.stack(w2)
    to.mkdir()
    save_tensors(to / "model.safetensors", fused)
    shutil.copy(folder / "config.json", to)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a` and `b` split, and `fused_a` and `fused_b`."""
    folder = tmp_path_factory.mktemp("experts")
    write_siblings(MIXTRAL, folder)
    for name in "ab":
        fuse(folder / name, folder / f"fused_{name}")
    return folder


@pytest.mark.parametrize(("first", "second"), [("a", "fused_b"), ("fused_a", "b")])
def test_either_layout_gives_the_same_numbers(models: Path, tmp_path: Path, first: str, second: str) -> None:
    import torch

    def made(one: str, other: str, out: str) -> Path:
        recipe = linear(tmp_path, {models / one: 0.25, models / other: 0.75}, f"{out}.yml")
        build(recipe, "-o", tmp_path / out, "--store", tmp_path / out / ".." / f"{out}-store")
        return tmp_path / out

    alike = made(first, first[:-1] + "b", "alike")
    mixed = made(first, second, "mixed")
    one, other = load_tensors(alike), load_tensors(mixed)
    assert one.keys() == other.keys() == load_tensors(models / first).keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert loaded(MIXTRAL, mixed)[1] == {}


def test_a_second_build_computes_nothing(models: Path, tmp_path: Path) -> None:
    recipe = linear(tmp_path, {models / "fused_a": 0.25, models / "b": 0.75})
    args = (recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")
    build(*args)
    again = build(*args)["stages"]
    assert [stage["computed"] for stage in again.values()] == [0] * len(again)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "mixtral"
