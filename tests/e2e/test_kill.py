"""Commands that are killed: a folder is the old model or the new one, no root loses anything, the next build is right.

Real processes, at moments that are spread over all that they do: builds, those that fetch, collection, pushes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from kittybuild.digest import Digest
from kittybuild.store.store import Store
from tests.building import Answer, build, contents, manifest_of, packs, run_into, started
from tests.caches import signer
from tests.conftest import Counted
from tests.faults import UnsyncedDisk, assert_sound, quick_folder
from tests.helpers import llama_config, llama_shapes, noise, pico_adapter, run_cli, write_model, write_recipe

SIZE = {"layers": 2, "width": 96, "vocab": 384}
STAGES = ("ties", "soup")
Files = dict[str, bytes]


@dataclass(frozen=True)
class Work:
    """A command, what there is when it begins (the name of a folder), and how often it is killed."""

    name: str
    args: tuple[str, ...]
    begin: str
    kills: int


BUILD = ("build", "new.yml", "--workers", "threads")
WORKS = (
    Work("a first build", BUILD, "nothing", 40),
    Work("a build that replaces", BUILD, "old", 60),
    Work("a build with processes", (*BUILD[:-1], "processes"), "old", 10),
    Work("a build that fetches", (*BUILD, "--substituter", "full", "--fetch", "always"), "old", 30),
    Work("gc", ("store", "gc"), "new", 30),
    Work("push", ("cache", "push", "new.yml", "--to", "cache"), "new", 30),
)


class World:
    """Sources, two recipes that differ in one weight, and what there is after each of them, all at one path."""

    def __init__(self, top: Path) -> None:
        self.top, self.place = top, top / "place"
        tensors = {name: noise(7, name, shape) for name, shape in llama_shapes(**SIZE).items()}
        for number, name in enumerate(("base", "happy", "calm")):
            # Rolled, not drawn again: it is as good here, and faster.
            rolled = {key: tensor + 0.02 * tensor.roll(number + 1) for key, tensor in tensors.items()}
            write_model(top / "models" / name, rolled, llama_config(**SIZE, tie=False, dtype="float32"))
        pico_adapter(top / "models/mood", top / "models/base", 3)
        self.key, self.public = signer(top, "team-1")
        (top / "nothing").mkdir()
        self.recipes(top / "nothing")
        self.models: dict[str, dict[str, Files]] = {"nothing": {stage: {} for stage in STAGES}}
        self.manifests: dict[str, str] = {}
        self.begin("nothing")
        for name in ("old", "new"):  # the new one in the place of the old: so there is something to collect
            answer = build(self.place / f"{name}.yml", "--store", self.store, "--workers", "threads")
            self.manifests = {stage: manifest_of(answer, stage) for stage in STAGES}
            self.models[name] = {stage: contents(self.place / "out" / stage) for stage in STAGES}
            shutil.copytree(self.place, top / name)
        assert run_cli(*self.args(WORKS[-1]))[0] == 0
        shutil.copytree(self.place / "cache", top / "full")
        self.weights = {
            data for files in self.models["new"].values() for n, data in files.items() if n.endswith("tensors")
        }
        self.seconds = {work.name: self.duration(work) for work in WORKS}

    @property
    def store(self) -> Path:
        return self.place / "store"

    def recipes(self, folder: Path) -> None:
        for name, weight in (("old", 0.5), ("new", 0.6)):
            ties = [{"model": model, "parameters": {"weight": weight, "density": 0.5}} for model in ("glad", "happy")]
            soup = [{"model": model, "parameters": {"weight": weight}} for model in ("ties", "calm")]
            form = {
                "kittybuild": 1,
                "sources": {n: {"path": str(self.top / "models" / n)} for n in ("base", "happy", "calm", "mood")},
                "stages": {
                    "glad": {"kind": "apply_lora", "base": "base", "adapters": [{"adapter": "mood"}]},
                    "ties": {"merge_method": "ties", "base_model": "base", "models": ties},
                    "soup": {"merge_method": "linear", "models": soup},
                },
                "outputs": {"ties": {"folder": "out/ties", "shard_size": "300KB"}, "soup": {"folder": "out/soup"}},
            }
            write_recipe(folder, form, f"{name}.yml")

    def begin(self, name: str) -> None:
        """Have at the place what there was after a build, at the same path, since roots name it."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.top / name, self.place)

    def args(self, work: Work) -> list[str]:
        """The command with all paths."""
        paths = {"new.yml": str(self.place / "new.yml"), "full": str(self.top / "full")}
        more = ["--trust", self.public] if "--substituter" in work.args else []
        more += ["--key", str(self.key)] if "push" in work.args else []
        found = [paths.get(arg, arg) for arg in work.args]
        found = [str(self.place / "cache") if arg == "cache" and at > 0 else arg for at, arg in enumerate(found)]
        return [*found, "--store", str(self.store), *more]

    def start(self, work: Work) -> BaseProcess:
        """The command in a process of its own, from the moment when it begins."""
        heard, begun = multiprocessing.Pipe(duplex=False)
        process = started(run_into, str(self.place / "answer.json"), *self.args(work), begun=begun)
        begun.close()
        heard.recv()
        return process

    def ended(self, process: BaseProcess, sign: int | None = None) -> Answer | None:
        """What a command answers, which is sent a signal first; None if that killed it."""
        if sign is not None:
            assert process.pid
            with suppress(ProcessLookupError):  # it was faster
                os.kill(process.pid, sign)
        process.join()
        if process.exitcode != 0:
            return None
        found: Answer = json.loads((self.place / "answer.json").read_text(encoding="utf-8"))
        return found

    def duration(self, work: Work) -> float:
        """How many seconds a command takes."""
        self.begin(work.begin)
        process, begin = self.start(work), time.monotonic()
        answer = self.ended(process)
        assert answer is not None
        assert answer["status"] == 0, answer
        return time.monotonic() - begin

    def kill(self, work: Work, after: float) -> None:
        """Begin a command and kill it after so many seconds, or sooner if it is faster than when it was timed."""
        while True:
            self.begin(work.begin)
            process = self.start(work)
            time.sleep(after)
            if self.ended(process, signal.SIGKILL) is None:
                return
            after *= 0.8

    def assert_nothing_lost(self, work: Work, what: str) -> None:
        """The folders are old or new; the store is sound; all roots that were there are there, with what they need."""
        for stage in STAGES:
            there = contents(self.place / "out" / stage)
            assert there in (self.models[work.begin][stage], self.models["new"][stage]), f"{what}: {stage}"
        assert_sound(str(self.store))
        with Store.open(str(self.store), disk=UnsyncedDisk()) as store:
            assert {root.name for root in store.roots()} >= ({*STAGES} if work.begin != "nothing" else set()), what
            assert store.check().damage == (), what
        for path in (self.place / "cache").glob("cas/*/*"):
            assert "#" in path.name or Digest.of(path.read_bytes()).hex == path.name, what

    def build_on(self, what: str) -> bool:
        """Do it again, without being killed; whether something of the interrupted one was used."""
        status, answer, told = self.run(*self.args(WORKS[0]))
        assert (status, answer["ok"]) == (0, True), f"{what}: {answer}"
        assert {stage: contents(self.place / "out" / stage) for stage in STAGES} == self.models["new"], what
        assert {stage: manifest_of(answer, stage) for stage in STAGES} == self.manifests, what
        assert self.weights <= set(packs(self.store).values()), what
        assert not list((self.store / "tmp").iterdir()), what
        assert not list(self.place.glob("out/*.kittybuild-*")), what
        return "an interrupted build left" in told

    def push_on(self, what: str) -> None:
        """Push again: then the cache is what an undisturbed push makes."""
        assert run_cli(*self.args(WORKS[-1]))[0] == 0
        there = {name: data for name, data in contents(self.place / "cache").items() if "#" not in name}
        assert there == contents(self.top / "full"), what

    def run(self, *args: str) -> tuple[int, Answer, str]:
        """A command in this process: exit status, document, standard error."""
        from click.testing import CliRunner

        from kittybuild.cli import main

        done = CliRunner().invoke(main, [*args, "--json"])
        return done.exit_code, json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with quick_folder() as top:
        yield World(top)


@pytest.mark.slow
@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
def test_killed_at_any_moment(work: Work, world: World, counted: Counted) -> None:
    """The moments are random, one in each of as many equal parts of the time that the command takes."""
    chance, salvaged = random.Random(f"kittybuild/{work.name}"), 0
    for number in range(work.kills):
        moment = (number + chance.random()) / work.kills
        what = f"{work.name}, killed at {moment:.3f}"
        world.kill(work, moment * world.seconds[work.name])
        world.assert_nothing_lost(work, what)
        salvaged += world.build_on(what)
        if work.name == "push":
            world.push_on(what)
    assert salvaged or work not in WORKS[:2]
    counted(f"kill: {work.name}", 0, work.kills)


def computed(answer: Answer) -> int:
    return sum(stage["computed"] for stage in answer["stages"].values())


@pytest.mark.slow
def test_a_person_who_interrupts_is_answered_and_goes_on_where_it_stopped(world: World) -> None:
    """As soon as the first pack is there; tried again where the build was faster than we."""
    first = WORKS[0]
    for _ in range(20):
        world.begin("nothing")
        (world.store / "packs").mkdir(parents=True)
        process = world.start(first)
        while process.is_alive() and not os.listdir(world.store / "packs"):
            time.sleep(0.0005)
        answer = world.ended(process, signal.SIGINT)
        if answer is not None and answer["status"] != 0:
            break
    assert answer is not None
    assert (answer["status"], answer["ok"], answer["errors"][0]["code"]) == (130, False, "KB003")
    status, again, _ = world.run(*world.args(first))
    assert (status, {stage: manifest_of(again, stage) for stage in STAGES}) == (0, world.manifests)
    assert computed(again) < 3 * len(llama_shapes(**SIZE))
