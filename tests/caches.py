"""Caches for tests: a machine with a recipe, a lock, its sources and a store, a signer, and hands to spoil a cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kittybuild.store.remote.keys import SigningKey
from tests.building import Answer, build
from tests.helpers import pico_adapter, pico_llama, run_cli, write_recipe

STAGES = {
    "glad": {"kind": "apply_lora", "base": "base", "adapters": [{"adapter": "mood"}]},
    "soup": {
        "merge_method": "linear",
        "models": [
            {"model": "glad", "parameters": {"weight": 0.5}},
            {"model": "happy", "parameters": {"weight": 0.5}},
        ],
    },
    "copy": {"merge_method": "passthrough", "models": [{"model": "happy"}]},
}


@dataclass(frozen=True)
class Machine:
    """A folder with all that one machine has."""

    folder: Path

    @property
    def recipe(self) -> str:
        return str(self.folder / "recipe.yml")

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def build(self, *args: str | Path) -> Answer:
        return build(self.recipe, "--store", self.store, *args)

    def push(self, to: str | Path, key: Path, *args: str | Path) -> Answer:
        status, document = run_cli("cache", "push", self.recipe, "--store", self.store, "--to", to, "--key", key, *args)
        assert status == 0, document
        return document

    def like(self, folder: Path, *, weights: bool) -> Machine:
        """Another machine with the same recipe and lock; `weights`: and the files of weights."""
        folder.mkdir()
        for name in ("recipe.yml", "recipe.lock"):
            shutil.copy(self.folder / name, folder / name)
        shutil.copytree(self.folder / "models", folder / "models")
        if not weights:
            for file in folder.glob("models/*/*.safetensors"):
                file.unlink()
        return Machine(folder)


def machine(folder: Path, *, layers: int = 1) -> Machine:
    """A machine that has everything, with a lock and nothing built."""
    base = pico_llama(folder / "models/base", 0, layers=layers, shards=2, tokenizer=True)
    pico_llama(folder / "models/happy", 1, base=base)
    pico_adapter(folder / "models/mood", base, 3)
    sources = {name: {"path": f"models/{name}"} for name in ("base", "happy", "mood")}
    outputs = {name: {"folder": f"out/{name}"} for name in ("soup", "copy")}
    write_recipe(folder, {"kittybuild": 1, "sources": sources, "stages": STAGES, "outputs": outputs})
    assert run_cli("lock", folder / "recipe.yml")[0] == 0
    return Machine(folder)


def signer(folder: Path, name: str) -> tuple[Path, str]:
    """A new key: the file of its secret part, and its public part."""
    key, path = SigningKey.new(name), folder / f"{name}.key"
    key.write(str(path))
    return path, str(key.public)


def counts(document: Answer, stage: str = "soup") -> tuple[int, int]:
    """Computed and fetched."""
    found = document["stages"][stage]
    return found["computed"], found["fetched"]


def spoil(cache: Path, pattern: str, change: Callable[[bytes], bytes]) -> int:
    """Change all files of a cache that a pattern finds; their number."""
    files = [path for path in cache.glob(pattern) if path.is_file()]
    for path in files:
        path.write_bytes(change(path.read_bytes()))
    return len(files)


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    """A change of JSON."""

    def apply(data: bytes) -> bytes:
        form = json.loads(data)
        change(form)
        return json.dumps(form).encode()

    return apply
