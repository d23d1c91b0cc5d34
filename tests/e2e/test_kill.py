"""Builds that are killed: the folder is the old model or the new one, and the next build ends with the same bits."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.building import Answer, build_into, contents, manifest_of, packs, started
from tests.helpers import llama_config, llama_shapes, noise, pico_adapter, write_model, write_recipe

KILLS = 20
SIZE = {"layers": 6, "width": 256, "vocab": 1024}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three siblings of 18 MB each and an adapter, and recipes that differ in one weight."""
    top = tmp_path_factory.mktemp("kill")
    names = {name: noise(7, name, shape) for name, shape in llama_shapes(**SIZE).items()}
    for number, name in enumerate(("base", "happy", "calm")):
        # Rolled, not drawn again: it is as good here, and faster.
        tensors = {key: tensor + 0.02 * tensor.roll(number + 1) for key, tensor in names.items()}
        write_model(top / name, tensors, llama_config(**SIZE, tie=False, dtype="float32"))
    pico_adapter(top / "mood", top / "base", 3)
    for name, weight in (("old", 0.5), ("new", 0.6)):
        ties = [{"model": model, "parameters": {"weight": weight, "density": 0.5}} for model in ("glad", "happy")]
        soup = [{"model": model, "parameters": {"weight": weight}} for model in ("ties", "calm")]
        form = {
            "kittybuild": 1,
            "sources": {source: {"path": str(top / source)} for source in ("base", "happy", "calm", "mood")},
            "stages": {
                "glad": {"kind": "apply_lora", "base": "base", "adapters": [{"adapter": "mood"}]},
                "ties": {"merge_method": "ties", "base_model": "base", "models": ties},
                "soup": {"merge_method": "linear", "models": soup},
            },
            "outputs": {"ties": {"folder": "out/ties", "shard_size": "3MB"}, "soup": {"folder": "out/soup"}},
        }
        write_recipe(top, form, f"{name}.yml")
    return top


def start(place: Path, recipe: Path, workers: str = "threads") -> BaseProcess:
    """A build with store and outputs in `place`."""
    shutil.copy(recipe, place / "recipe.yml")
    answer = place / "answer.json"
    answer.unlink(missing_ok=True)
    args = [str(place / "recipe.yml"), "--store", str(place / "store"), "--workers", workers]
    return started(build_into, str(answer), *args)


def ended(process: BaseProcess, place: Path, sign: int | None = None) -> Answer | None:
    """What a build answers, which is sent a signal first; None if that killed it."""
    if sign is not None:
        assert process.pid
        with suppress(ProcessLookupError):  # it was faster
            os.kill(process.pid, sign)
    process.join()
    if process.exitcode != 0:
        return None
    found: Answer = json.loads((place / "answer.json").read_text(encoding="utf-8"))
    return found


def run(place: Path, recipe: Path, kill_after: float | None = None, workers: str = "threads") -> Answer | None:
    """What a build answers; None if it was killed after so many seconds."""
    process = start(place, recipe, workers)
    if kill_after is None:
        return ended(process, place)
    time.sleep(kill_after)
    return ended(process, place, signal.SIGKILL)


def finished(answer: Answer | None) -> Answer:
    assert answer is not None
    assert answer["status"] == 0, answer
    return answer


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, dict[str, dict[str, bytes]]]:
    """What uninterrupted builds make: recipe -> output -> its files. Their folders and stores stay."""
    found = {}
    for name in ("old", "new"):
        (folder / f"whole-{name}").mkdir()
        finished(run(folder / f"whole-{name}", folder / f"{name}.yml"))
        found[name] = {stage: contents(folder / f"whole-{name}/out/{stage}") for stage in ("ties", "soup")}
    return found


@pytest.mark.slow
def test_killed_at_any_moment(folder: Path, models: dict[str, dict[str, dict[str, bytes]]], tmp_path: Path) -> None:
    """Half of the builds are the first in their folder and store, half replace an older model."""
    seconds = {}
    for workers in ("threads", "processes"):
        (tmp_path / workers).mkdir()
        begin = time.monotonic()
        whole = finished(run(tmp_path / workers, folder / "new.yml", workers=workers))
        seconds[workers] = time.monotonic() - begin
    moments = random.Random(20261122)
    weights = {data for files in models["new"].values() for name, data in files.items() if name.endswith("tensors")}
    salvaged = 0
    for number in range(KILLS):
        workers = "processes" if number % 4 < 2 else "threads"
        place, update, after = tmp_path / str(number), number % 2 == 1, moments.uniform(0.0, seconds[workers])
        while True:
            if update:
                shutil.copytree(folder / "whole-old", place)
            else:
                place.mkdir()
            if run(place, folder / "new.yml", after, workers=workers) is None:
                break
            after *= 0.8  # it was faster than the one that we timed
            shutil.rmtree(place)
        for stage in ("ties", "soup"):
            there = contents(place / "out" / stage)
            assert there in ([models["old"][stage]] if update else [{}]) + [models["new"][stage]], f"{number}: {stage}"
        answer = finished(run(place, folder / "new.yml"))
        assert {stage: contents(place / "out" / stage) for stage in ("ties", "soup")} == models["new"]
        for stage in ("ties", "soup"):
            assert manifest_of(answer, stage) == manifest_of(whole, stage)
        assert weights <= set(packs(place / "store").values())
        assert not list((place / "store/tmp").iterdir())
        assert not list(place.glob("out/*.kittybuild-*"))
        salvaged += "an interrupted build left" in answer["stderr"]
        shutil.rmtree(place)
    assert salvaged >= 1


def computed(answer: Answer) -> int:
    return sum(stage["computed"] for stage in answer["stages"].values())


@pytest.mark.slow
def test_a_person_who_interrupts_is_answered_and_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    """As soon as the first pack is there; tried again where the build was faster than we."""
    (tmp_path / "whole").mkdir()
    whole = finished(run(tmp_path / "whole", folder / "new.yml"))
    for number in range(20):
        place = tmp_path / str(number)
        (place / "store/packs").mkdir(parents=True)
        process = start(place, folder / "new.yml")
        while process.is_alive() and not os.listdir(place / "store/packs"):
            time.sleep(0.0005)
        answer = ended(process, place, signal.SIGINT)
        if answer is not None and answer["status"] != 0:
            break
    assert answer is not None
    assert (answer["status"], answer["ok"], answer["errors"][0]["code"]) == (130, False, "KB003")
    again = finished(run(place, folder / "new.yml"))
    assert computed(again) < computed(whole)
    for stage, made in whole["stages"].items():
        assert again["stages"][stage]["manifest"] == made["manifest"]
