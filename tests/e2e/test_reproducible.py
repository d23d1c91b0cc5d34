"""The same recipe gives the same bits on every processor, with every number of workers, in every budget and order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.building import build, contents, fresh, packs
from tests.helpers import pico_adapter, pico_llama, write_recipe

OUTS = ("ties", "slerp", "task", "lora", "soup", "franken")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Siblings whose embeddings are larger than a block and no multiple of one."""
    folder = tmp_path_factory.mktemp("models")
    pico_llama(folder / "base", 0, width=128, vocab=3001)
    pico_llama(folder / "happy", 1, base=folder / "base")
    pico_llama(folder / "calm", 2, base=folder / "base", dtype="float32")
    pico_adapter(folder / "mood", folder / "base", 3, rank=8, targets=("q_proj", "gate_proj", "down_proj"))
    return folder


@pytest.fixture(scope="module")
def recipe(models: Path) -> str:
    """Every method, on tensors of several blocks."""
    half: Mapping[str, Any] = {"weight": 0.3, "density": 0.41}
    pair = [{"model": "happy", "parameters": half}, {"model": "calm", "parameters": {"weight": 0.9, "density": 0.7}}]
    plain = [{"model": use["model"], "parameters": {"weight": 0.37}} for use in pair]
    slices = [
        {"sources": [{"model": "happy", "layer_range": [0, 2]}]},
        {"sources": [{"model": "base", "layer_range": [1, 2]}]},
    ]
    stages = {
        "ties": {"merge_method": "ties", "base_model": "base", "models": pair, "out_dtype": "float32"},
        "slerp": {
            "merge_method": "slerp",
            "base_model": "base",
            "models": [{"model": "calm"}],
            "parameters": {"t": [0.1, 0.9]},
        },
        "task": {"merge_method": "task_arithmetic", "base_model": "base", "models": plain},
        "lora": {"kind": "apply_lora", "base": "calm", "adapters": [{"adapter": "mood", "weight": 0.7}]},
        "soup": {"merge_method": "linear", "models": [*plain, {"model": "lora", "parameters": {"weight": 0.1}}]},
        "franken": {"merge_method": "passthrough", "slices": slices, "parameters": {"scale": 0.3}},
    }
    sources = {name: {"path": str(models / name)} for name in ("base", "happy", "calm", "mood")}
    outputs = {name: {"folder": f"out/{name}", "shard_size": "1MB"} for name in OUTS}
    return write_recipe(models, {"kittybuild": 1, "sources": sources, "stages": stages, "outputs": outputs})


@pytest.fixture(scope="module")
def expected(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, bytes]]:
    """The manifests and the packs of a build in this process."""
    store = tmp_path_factory.mktemp("expected") / "store"
    answer = build(recipe, "--store", store, "--jobs", "1")
    return {name: stage["manifest"] for name, stage in answer["stages"].items()}, packs(store)


Expected = tuple[dict[str, str], dict[str, bytes]]


def assert_same(answer: Mapping[str, Any], store: Path, expected: Expected) -> None:
    assert answer["ok"], answer
    assert sum(stage["computed"] for stage in answer["stages"].values()) > 100
    assert {name: stage["manifest"] for name, stage in answer["stages"].items()} == expected[0]
    assert packs(store) == expected[1]


@pytest.mark.parametrize(
    "limits", [("--jobs", "2"), ("--jobs", "7", "--memory", "256MB"), ("--memory", "1MB")], ids=str
)
def test_workers_and_memory_change_no_bit(
    limits: tuple[str, ...], recipe: str, expected: Expected, tmp_path: Path
) -> None:
    assert_same(build(recipe, "--store", tmp_path / "store", *limits), tmp_path / "store", expected)


@pytest.mark.slow
def test_processor_hash_seed_umask_and_place_change_no_bit(recipe: str, expected: Expected, tmp_path: Path) -> None:
    """Processes in which torch uses other instructions, and which differ in whatever else a process may differ."""
    variants: list[tuple[Mapping[str, str], Mapping[str, Any], tuple[str, ...]]] = [
        ({"ATEN_CPU_CAPABILITY": "default", "PYTHONHASHSEED": "1"}, {"umask": 0o077}, ("--jobs", "1")),
        ({"ATEN_CPU_CAPABILITY": "avx2", "PYTHONHASHSEED": "2"}, {"cwd": "/"}, ("--jobs", "2", "--memory", "256MB")),
        ({"ATEN_CPU_CAPABILITY": "avx512", "OMP_NUM_THREADS": "4", "TZ": "Asia/Tokyo"}, {"cwd": tmp_path}, ()),
    ]

    def run(number: int) -> dict[str, Any]:
        env, options, args = variants[number]
        done = fresh("build", recipe, "--store", tmp_path / f"s{number}", *args, "--json", env=env, **options)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    # At the same time, and into the same folders: the last one wins, and all write the same.
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(run, range(len(variants))))
    for number, answer in enumerate(answers):
        assert_same(answer, tmp_path / f"s{number}", expected)


def test_stages_may_be_built_in_any_order_and_alone(recipe: str, expected: Expected, tmp_path: Path) -> None:
    for name in reversed(OUTS):
        build(recipe, name, "--store", tmp_path / "store")
    answer = build(recipe, "--store", tmp_path / "store")
    assert sum(stage["computed"] for stage in answer["stages"].values()) == 0
    assert {name: stage["manifest"] for name, stage in answer["stages"].items()} == expected[0]
    # The soup alone keeps what its input makes in other packs than an output has.
    assert expected[1].items() <= packs(tmp_path / "store").items()


def test_the_folders_are_the_same_byte_for_byte(recipe: str, tmp_path: Path) -> None:

    build(recipe, "soup", "--store", tmp_path / "one", "-o", tmp_path / "a/soup")

    build(recipe, "soup", "--store", tmp_path / "two", "-o", tmp_path / "b/soup", "--jobs", "1")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
