"""`publish` against a server on this machine that takes uploads as the Hub does; nothing here was seen by the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.building import build, contents, fresh
from tests.helpers import pico_llama, run_cli, write_recipe
from tests.hub_server import Hub, Request, running

REPO = "org/calm"
RECIPE = """\
kittybuild: 1
stages:
  calm:
    merge_method: linear
    models:
      - {{model: {models}/base, parameters: {{weight: 0.5}}}}
      - {{model: {models}/happy, parameters: {{weight: {w}}}}}
outputs: {{calm: {{folder: {folder}, shard_size: {size}}}}}
"""


class Author:
    """Somebody with outputs and a Hub."""

    def __init__(self, hub: Hub, top: Path, models: Path) -> None:
        self.hub, self.top, self.models = hub, top, models

    def build(self, name: str = "calm", weight: float = 0.5, size: str = "40KB") -> Path:
        text = RECIPE.format(models=self.models, w=weight, folder=name, size=size)
        recipe = write_recipe(self.top, text, f"{name}.yml")
        build(recipe, "--store", self.top / "store", "--workers", "threads")
        return self.top / name

    def run(self, *args: str | Path) -> dict[str, Any]:
        self.hub.forget()
        env = {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.top / "hf"),
            "HF_TOKEN": "hf_me",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        done = fresh(*args, "--json", env=env)
        assert "Traceback" not in done.stderr, done.stderr
        return {**json.loads(done.stdout), "status": done.returncode}

    def publish(self, folder: Path, *args: str) -> dict[str, Any]:
        document = self.run("publish", folder, REPO, *args)
        assert document["ok"], document
        return document

    @property
    def files(self) -> dict[str, bytes]:
        return self.hub.repositories[REPO][-1][1]

    def uploads(self) -> int:
        return sum(request.path.startswith("/upload/") for request in self.hub.requests)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = pico_llama(folder / "base", 1)
    pico_llama(folder / "happy", 2, base=base)
    return folder


@pytest.fixture
def author(tmp_path: Path, models: Path) -> Iterator[Author]:
    with running() as hub:
        yield Author(hub, tmp_path, models)


def test_a_new_repository_holds_the_folder_and_is_reproduced(author: Author, tmp_path: Path) -> None:
    folder = author.build()
    document = author.publish(folder)
    assert author.files == {**contents(folder), ".gitattributes": b""}
    assert len(author.hub.repositories[REPO]) == 2  # its making, and one commit
    assert document["commit"] == author.hub.repositories[REPO][-1][0]
    found = author.run("reproduce", REPO, "--store", tmp_path / "other", "--workers", "threads")
    assert (found["ok"], found["recipe"], found["stage"]) == (True, "kittybuild.json", "calm")
    assert found["tensors"]["identical"] == found["computed"] > 0


def test_what_is_there_is_not_sent_again(author: Author) -> None:
    folder = author.build()
    author.publish(folder)
    author.publish(folder)
    assert author.uploads() == 0


def test_what_was_cut_goes_on_where_it_stopped(author: Author) -> None:
    folder = author.build()
    shards = sorted(folder.glob("*.safetensors"))
    last = len(shards[-1].read_bytes())

    def fault(request: Request, data: bytes) -> int | None:
        return 403 if request.path.startswith("/upload/") and len(data) == last else None

    author.hub.fault = fault
    assert author.run("publish", folder, REPO)["status"] == 4
    assert list(author.files) == [".gitattributes"]
    author.hub.fault = None
    author.publish(folder)
    assert author.uploads() == 1 < len(shards)
    assert author.files == {**contents(folder), ".gitattributes": b""}


def test_a_new_version_takes_the_place_of_the_old_one(author: Author) -> None:
    author.publish(author.build())
    before = [name for name in author.files if name.endswith(".safetensors")]
    other = author.build("calm2", 0.7, "1GB")
    document = author.publish(other)
    assert len(before) > 1
    assert author.files == {**contents(other), ".gitattributes": b""}
    assert document["deleted"] == sorted([*before, "model.safetensors.index.json"])


def test_an_edited_readme_stays_unless_told(author: Author) -> None:
    author.publish(author.build())
    author.hub.push(REPO, {**author.files, "README.md": b"my own words"})
    other = author.build("calm2", 0.7)
    assert author.publish(other)["readme_kept"] is True
    assert author.files["README.md"] == b"my own words"
    assert author.files["kittybuild.json"] == (other / "kittybuild.json").read_bytes()
    assert author.publish(other)["readme_kept"] is True
    assert author.publish(other, "--overwrite-readme")["readme_kept"] is False
    assert author.files["README.md"] == (other / "README.md").read_bytes()


def test_somebody_elses_readme_stays(author: Author) -> None:
    author.hub.push(REPO, {"README.md": b"# a plan"})
    author.publish(author.build())
    assert author.files["README.md"] == b"# a plan"


def test_a_damaged_folder_is_not_published(author: Author) -> None:
    folder = author.build()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    document = author.run("publish", folder, REPO)
    assert (document["status"], document["errors"][0]["code"]) == (6, "KB603")
    assert REPO not in author.hub.repositories


def test_what_is_no_repository(author: Author) -> None:
    status, document = run_cli("publish", author.build(), "calm")
    assert (status, document["errors"][0]["code"]) == (2, "KB015")
