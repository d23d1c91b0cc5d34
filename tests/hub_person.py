"""Somebody who runs commands beside a Hub of their own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.building import fresh
from tests.helpers import write_recipe
from tests.hub_server import Hub


class Person:
    """Somebody with a recipe, a store and a Hugging Face cache of their own, and a Hub."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.hub, self.folder = hub, folder
        self.out, self.store, self.home = folder / "out", folder / "store", folder / "hf"
        self.env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(self.home), "HF_TOKEN": ""}

    def recipe(self, text: str) -> str:
        return write_recipe(self.folder, text)

    def run(self, *args: str | Path) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
        """The JSON document of a command, and all that it printed."""
        self.hub.forget()
        store = () if args[0] == "lock" else ("--store", self.store)
        done = fresh(*args, *store, "--json", env=self.env)
        assert "Traceback" not in done.stderr, done.stderr
        return json.loads(done.stdout), done

    def build(self, recipe: str, *args: str | Path) -> dict[str, Any]:
        document, done = self.run("build", recipe, "-o", self.out, *args)
        assert document["ok"], done.stderr
        return document

    def errors(self, *args: str | Path) -> list[dict[str, Any]]:
        document, _ = self.run(*args)
        assert document["ok"] is False
        return list(document["errors"])

    def error(self, *args: str | Path) -> dict[str, Any]:
        document, done = self.run(*args)
        assert (document["ok"], done.returncode) == (False, 4), document
        return dict(document["errors"][0])

    @property
    def lock(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "recipe.lock").read_text(encoding="utf-8")))
