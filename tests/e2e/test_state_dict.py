"""Raw state dicts: files of any model, merged over the tensors that all have, or over all that any has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.building import build, fails
from tests.helpers import load_tensors, noise, save_tensors, write_recipe

COMMON, ONLY_A, ONLY_B = "conv.weight", "old.bias", "new.bias"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """`a.pt` and `b.safetensors`: one tensor in common, one of floats and one of integers; two alone."""
    import torch

    steps = torch.tensor([1, 2])
    a = {COMMON: noise(1, COMMON, (3, 4)), ONLY_A: noise(1, ONLY_A, (5,)), "steps": steps}
    b = {COMMON: noise(2, COMMON, (3, 4)), ONLY_B: noise(2, ONLY_B, (6,)), "steps": steps}
    torch.save(a, tmp_path / "a.pt")
    save_tensors(tmp_path / "b.safetensors", b)
    return tmp_path


def recipe(folder: Path, tensors: str, **more: Any) -> str:
    stage = {
        "kind": "state_dict",
        "merge_method": "linear",
        "tensors": tensors,
        "models": [{"model": "a.pt"}, {"model": "b.safetensors"}],
        "parameters": {"weight": 0.5},
        **more,
    }
    return write_recipe(folder, {"kittybuild": 1, "stages": {"soup": stage}})


def made(folder: Path, tensors: str, **more: Any) -> tuple[dict[str, Any], str]:
    document = build(recipe(folder, tensors, **more), "-o", folder / "out", "--store", folder / "store")
    return load_tensors(folder / "out"), "\n".join(document["notes"])


def test_the_same_tensors_are_asked_for_unless_the_recipe_says_otherwise(files: Path) -> None:
    status, code, error = fails(recipe(files, "same"), "-o", files / "out", "--store", files / "store")
    assert (status, code) == (3, "KB302")
    assert ONLY_B in error["message"]


def test_an_intersection_tells_what_it_leaves_out(files: Path) -> None:
    found, notes = made(files, "intersection")
    assert found.keys() == {COMMON, "steps"}
    assert f"not all models have 1 tensor of a.pt, left out:\n  {ONLY_A}" in notes
    assert f"not all models have 1 tensor of b.safetensors, left out:\n  {ONLY_B}" in notes


def test_a_union_merges_each_tensor_of_those_that_have_it(files: Path) -> None:
    import torch

    found, _ = made(files, "union")
    assert found.keys() == {COMMON, ONLY_A, ONLY_B, "steps"}
    mean = (noise(1, COMMON, (3, 4)).double() + noise(2, COMMON, (3, 4)).double()) / 2
    torch.testing.assert_close(found[COMMON], mean.float())
    assert torch.equal(found[ONLY_A], noise(1, ONLY_A, (5,)))
    assert torch.equal(found[ONLY_B], noise(2, ONLY_B, (6,)))
    assert found["steps"].tolist() == [1, 2]


def test_a_union_of_three_leaves_no_weight_to_a_model_that_lacks_the_tensor(files: Path) -> None:
    import torch

    save_tensors(files / "c.safetensors", {ONLY_A: noise(3, ONLY_A, (5,))})
    models = [{"model": name, "parameters": {"weight": w}} for name, w in
              (("a.pt", 1), ("b.safetensors", 5), ("c.safetensors", 3))]  # fmt: skip
    found, _ = made(files, "union", models=models)
    wanted = (noise(1, ONLY_A, (5,)).double() + 3 * noise(3, ONLY_A, (5,)).double()) / 4
    torch.testing.assert_close(found[ONLY_A], wanted.float())


def test_slices_of_raw_files_are_refused(files: Path) -> None:
    text = recipe(files, "same", models=None, slices=[{"sources": [{"model": "a.pt", "layer_range": [0, 1]}]}])
    assert fails(text, "-o", files / "out", "--store", files / "store")[1] == "KB102"
