"""Any sequence of putting, getting, building and collecting by two processes, of which one dies half-way, and of rot.

The store knows what a dict would, or less. "Less" only where something was damaged or cut short, and never other bytes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kittybuild.digest import Digest
from kittybuild.store.layout import stored_digests
from kittybuild.store.pack import PackLayout, read_pack_header
from kittybuild.store.store import FinishedPack
from tests.actors import DIED, SAMPLES, Actor, Other
from tests.building import contents
from tests.faults import assert_sound, manifest_of, quick_folder
from tests.helpers import noise, write_model, write_recipe

WEIGHTS = (0.25, 0.5, 0.75)
SHAPES = {"model.embed.weight": (16, 16), "model.layers.0.weight": (16, 16), "model.norm.weight": (16,)}
FOLDERS = ("/a", "/b")
NAMES = st.lists(st.sampled_from(sorted(SAMPLES)), min_size=1, max_size=4, unique=True).map(tuple)
NAME_OF = {s.ref.digest: s.name for s in SAMPLES.values()}


@dataclass(frozen=True)
class World:
    """Recipes with one weight each, and what a build in a new store makes: folder and manifest by weight."""

    recipes: str
    models: dict[float | None, dict[str, bytes]]
    manifests: dict[float, str]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with quick_folder() as top:
        for seed, name in enumerate(("base", "happy")):
            tensors = {tensor: noise(seed, tensor, shape) for tensor, shape in SHAPES.items()}
            write_model(top / name, tensors, {"model_type": "pico", "torch_dtype": "float32"})
        found = World(str(top), {None: {}}, {})
        for weight in WEIGHTS:
            # One of the two stages is the same for all weights, and of the other so is one tensor.
            only = [{"filter": "norm", "value": 0.5}, {"value": weight}]
            mean = [{"model": name, "parameters": {"weight": 0.5}} for name in ("base", "happy")]
            soup = [
                {"model": "mean", "parameters": {"weight": 0.5}},
                {"model": "happy", "parameters": {"weight": only}},
            ]
            form = {
                "kittybuild": 1,
                "sources": {name: {"path": str(top / name)} for name in ("base", "happy")},
                "stages": {
                    "mean": {"merge_method": "linear", "models": mean},
                    "soup": {"merge_method": "linear", "models": soup},
                },
                "outputs": {"soup": {"folder": "out"}},
            }
            write_recipe(top, form, f"{weight}.yml")
            actor = Actor(str(top / f"store{weight}"), str(top))
            assert actor.act("build", weight) == len(SHAPES)
            found.models[weight] = contents(top / "out")
            (found.manifests[weight],) = actor.act("roots").values()
            actor.let_go()
        yield found


class SharedStore(RuleBasedStateMachine):
    """The dict: `held` are the samples that must be there, `kept` those of each output, `out` and `rooted` the weights
    of the output folder and of its root. `torn` are manifests that were damaged; `rotten`: the folder's shard was."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world, self.stack = world, ExitStack()
        self.top = self.stack.enter_context(quick_folder())
        self.root = str(self.top / "store")
        self.actors = Actor(self.root, world.recipes), Other(self.root, world.recipes)
        self.open = [False, False]
        self.kept: dict[str, tuple[str, ...]] = {}
        self.held: set[str] = set()
        self.out: float | None = None
        self.rooted: float | None = None
        self.torn: set[str] = set()
        self.rotten = False

    def teardown(self) -> None:
        """In the end all is well again, once everything that has a root was made again."""
        self.let_go(who=1)
        here = self.actors[0]
        here.act("repair")
        for folder, names in self.kept.items():
            here.act("put", names, folder)
        if self.rooted is not None:
            here.act("build", self.rooted)
            assert contents(self.top / "out") == self.world.models[self.rooted]
        assert here.act("damage") == []
        assert here.act("gc", False) is None
        here.let_go()
        assert_sound(self.root, NAME_OF)
        self.actors[1].close()
        self.stack.close()

    def act(self, who: int, name: str, *args: Any) -> Any:
        self.open[who] = True
        return self.actors[who].act(name, *args)

    who = st.integers(0, 1)

    @rule(who=who)
    def let_go(self, who: int) -> None:
        self.actors[who].act("let_go")
        self.open[who] = False

    @rule(who=who, names=NAMES, folder=st.sampled_from(FOLDERS))
    def put(self, who: int, names: tuple[str, ...], folder: str) -> None:
        assert self.act(who, "put", names, folder) is None
        self.has_put(names, folder)

    def has_put(self, names: tuple[str, ...], folder: str) -> None:
        self.kept[folder] = names
        self.held |= set(names)
        self.torn.discard(manifest(names))

    @rule(who=who, names=NAMES)
    def get(self, who: int, names: tuple[str, ...]) -> None:
        for name, data in zip(names, self.act(who, "get", names), strict=True):
            assert data == SAMPLES[name].data or (data is None and name not in self.held)

    @rule(who=who, weight=st.sampled_from(WEIGHTS))
    def build(self, who: int, weight: float) -> None:
        computed = self.act(who, "build", weight)
        known = weight == self.rooted == self.out and not self.rotten and not self.torn
        assert computed in ((0,) if known else range(len(SHAPES) + 1))
        self.has_built(weight)

    def has_built(self, weight: float) -> None:
        self.out = self.rooted = weight
        self.rotten = False
        self.torn.discard(self.world.manifests[weight])

    @rule(who=who, keep=st.booleans())
    def collect(self, who: int, keep: bool) -> None:
        """Not while the other has the store open, and not while nobody knows what a root needs."""
        needs = {manifest(names) for names in self.kept.values()}
        needs |= {self.world.manifests[self.rooted]} if self.rooted is not None else set()
        expected = "KB707" if self.open[1 - who] else "KB706" if needs & self.torn else None
        assert self.act(who, "gc", keep) == expected
        if expected is None:
            self.forget_what_no_root_keeps(keep)

    def forget_what_no_root_keeps(self, keep: bool = False) -> None:
        """With `keep` only what has no bytes, for which no pack is kept."""
        rooted = {name for names in self.kept.values() for name in names}
        self.held = {name for name in self.held if name in rooted or (keep and SAMPLES[name].data)}

    def die(self, n: int, name: str, *args: Any) -> tuple[Any, dict[str, str]]:
        """The other process ends at its n-th file operation; what it answers if it has not so many, and the roots."""
        self.let_go(0)
        answer = self.actors[1].act("end", n, name, *args)
        self.open[1] = False
        self.torn = {name for name in self.torn if not self.is_sound(name)}
        return answer, self.act(0, "roots")

    @rule(n=st.integers(0, 110), names=NAMES, folder=st.sampled_from(FOLDERS))
    def die_putting(self, n: int, names: tuple[str, ...], folder: str) -> None:
        """Before the root is there nothing is promised; then everything is."""
        answer, roots = self.die(n, "put", names, folder)
        assert answer in (None, DIED)
        if roots.get(folder) == manifest(names) and (self.kept.get(folder) != names or answer is None):
            self.has_put(names, folder)

    @rule(n=st.integers(0, 220), weight=st.sampled_from(WEIGHTS))
    def die_building(self, n: int, weight: float) -> None:
        """The folder may be the new one before its root is there, and not the other way round."""
        _, roots = self.die(n, "build", weight)
        if contents(self.top / "out") == self.world.models[weight]:
            self.out, self.rotten = weight, False
        if roots.get(str(self.top / "out")) == self.world.manifests[weight] and self.rooted != weight:
            assert self.out == weight
            self.rooted = weight

    @rule(n=st.integers(0, 60))
    def die_collecting(self, n: int) -> None:
        """What no root keeps is there or not."""
        answer, _ = self.die(n, "gc", False)
        assert answer in (None, DIED, "KB706")
        if answer != "KB706":
            self.forget_what_no_root_keeps()

    def is_sound(self, name: str) -> bool:
        path = Path(self.root, "manifests", name[:2], f"{name}.json")
        return path.exists() and Digest.of(path.read_bytes()).hex == name

    @rule(who=who)
    def lose_the_index(self, who: int) -> None:
        for each in (0, 1):
            self.let_go(each)
        shutil.rmtree(f"{self.root}/index", ignore_errors=True)
        assert isinstance(self.act(who, "roots"), dict)

    @precondition(lambda self: self.kept or self.rooted)
    @rule(kind=st.sampled_from(["packs", "manifests"]), which=st.integers(0, 100), at=st.integers(0, 1 << 20))
    def rot(self, kind: str, which: int, at: int) -> None:
        """A bit flips, and a check finds it."""
        found = stored_digests(f"{self.root}/{kind}", ".safetensors" if kind == "packs" else ".json")
        damaged = self.act(0, "damage")
        sound = [(digest, path) for digest, path in found if path not in damaged]
        if not sound:
            return
        digest, path = sound[which % len(sound)]
        if kind == "manifests":
            self.torn.add(digest.hex)
        else:
            names = {NAME_OF.get(ref.digest) for ref in read_pack_header(path)[1].values()}
            self.held -= {name for name in names if name}
            self.rotten |= None in names
        flip(Path(path), at)
        assert path in self.act(0, "damage")

    @rule(who=who)
    def repair(self, who: int) -> None:
        assert self.act(who, "repair") is None

    @invariant()
    def the_folder_is_one_of_the_models(self) -> None:
        if not self.rotten:
            assert contents(self.top / "out") == self.world.models[self.out]


def flip(path: Path, at: int) -> None:
    """One bit, somewhere, and the time of the change: of one that nobody can see, test_damage.py tells."""
    stat = path.stat()
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(at % stat.st_size)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))


def manifest(names: tuple[str, ...]) -> str:
    """The digest of what `put` makes of samples."""
    samples = [SAMPLES[name] for name in names]
    layout = PackLayout.of((s.name, s.spec) for s in samples)
    digest: Digest = layout.digest({s.name: s.ref for s in samples})
    return manifest_of(FinishedPack(digest, "", layout.size), samples).digest.hex


@pytest.mark.slow
def test_two_processes_on_one_store(world: World) -> None:
    # Without shrinking: what fails is a list of commands that can be read, and real builds take their time.
    few = settings(max_examples=25, stateful_step_count=20, phases=[Phase.generate])
    run_state_machine_as_test(lambda: SharedStore(world), settings=few)
