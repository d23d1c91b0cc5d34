"""Many builds at once on one store: each derivation is computed once, and every output is right."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kittybuild.digest import Digest
from kittybuild.store.store import Store
from tests.building import Answer, build, contents, run_into, started
from tests.faults import assert_sound
from tests.helpers import noise, write_model, write_recipe

PROCESSES = 8
Outputs = dict[str, dict[str, bytes]]
SHAPES = {f"model.layers.{n}.weight": (64, 64) for n in range(12)} | {"model.norm.weight": (64,)}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eight recipes: all share one kept stage, neighbours share another, and each has one of its own."""
    top = tmp_path_factory.mktemp("together")
    for seed, name in enumerate(("base", "happy", "calm")):
        tensors = {tensor: noise(seed, tensor, shape) for tensor, shape in SHAPES.items()}
        write_model(top / name, tensors, {"model_type": "pico", "torch_dtype": "float32"})

    def mean(first: str, second: str, weight: float) -> dict[str, Any]:
        models = [{"model": m, "parameters": {"weight": w}} for m, w in ((first, 1.0), (second, weight))]
        return {"merge_method": "linear", "models": models}

    found = []
    for number in range(PROCESSES):
        stages = {
            "all": mean("base", "happy", 0.5),
            "two": mean("all", "calm", 0.1 + number // 2),
            "own": mean("two", "base", 0.2 + number),
        }
        outputs = {name: {"folder": f"out{number}/{name}"} for name in ("two", "own")}
        sources = {name: {"path": str(top / name)} for name in ("base", "happy", "calm")}
        form = {"kittybuild": 1, "sources": sources, "stages": stages, "outputs": outputs}
        found.append(Path(write_recipe(top, form, f"r{number}.yml")))
    return found


def computed(answers: list[Answer]) -> dict[str, int]:
    """How many tensors all builds together computed, by stage."""
    return {name: sum(answer["stages"][name]["computed"] for answer in answers) for name in ("all", "two", "own")}


def outputs(recipes: list[Path]) -> Outputs:
    top = recipes[0].parent
    return {f"out{n}": contents(top / f"out{n}") for n in range(PROCESSES)}


def together(recipes: list[Path], store: Path, tmp_path: Path, workers: str) -> list[Answer]:
    """Build each recipe in a process of its own, all of which are ready before the first may begin."""
    answers = [tmp_path / f"answer{n}.json" for n in range(len(recipes))]
    args = ["--store", str(store), "--workers", workers, "--jobs", "2"]
    ends = [multiprocessing.Pipe() for _ in recipes]
    processes = [
        started(run_into, str(answer), "build", str(recipe), *args, begun=end)
        for answer, recipe, (_, end) in zip(answers, recipes, ends, strict=True)
    ]
    for mine, _ in ends:
        mine.recv()
    for mine, _ in ends:
        mine.send(None)
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    found = [json.loads(answer.read_text(encoding="utf-8")) for answer in answers]
    assert [answer for answer in found if answer["status"] != 0] == []
    return found


@pytest.fixture(scope="module")
def alone(recipes: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, int], Outputs]:
    """How many tensors are computed, and all outputs, when one is built after the other."""
    store = tmp_path_factory.mktemp("alone") / "store"
    answers = [build(recipe, "--store", store, "--workers", "threads") for recipe in recipes]
    return computed(answers), outputs(recipes)


def test_eight_processes_compute_each_derivation_once(
    recipes: list[Path], alone: tuple[dict[str, int], Outputs], tmp_path: Path
) -> None:
    assert alone[0] == {"all": len(SHAPES), "two": len(SHAPES) * PROCESSES // 2, "own": len(SHAPES) * PROCESSES}
    answers = together(recipes, tmp_path / "store", tmp_path, "threads")
    assert computed(answers) == alone[0]
    assert outputs(recipes) == alone[1]
    assert_sound(str(tmp_path / "store"))
    with Store.open(str(tmp_path / "store")) as store:
        assert store.info().realisations == sum(alone[0].values())
        assert store.info().tmp_bytes == 0


def test_a_lease_dies_with_its_process(tmp_path: Path) -> None:
    what, other = Digest.of(b"what"), Digest.of(b"other")
    root = str(tmp_path / "store")
    Store.open(root).close()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        store = Store.open(root)
        os.write(writer, bytes([store.leases.take(what)]))
        time.sleep(60)
        os._exit(0)
    assert os.read(reader, 1) == b"\x01"
    with Store.open(root) as store:
        assert not store.leases.take(what)
        assert store.leases.take(other)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert store.leases.take(what, 5)


def test_threads_and_stores_of_one_process_hold_leases_apart(tmp_path: Path) -> None:
    what = Digest.of(b"what")
    with Store.open(str(tmp_path)) as one, Store.open(str(tmp_path)) as two:
        assert one.leases.take(what)
        assert not one.leases.take(what)
        assert not two.leases.take(what)
        timer = threading.Timer(0.1, one.leases.free, [what])
        timer.start()
        assert two.leases.take(what, 10)
        one.leases.free(what)
        assert not one.leases.take(what)
