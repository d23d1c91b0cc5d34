"""Whatever the Hub says of a source, the mistakes of all other stages are told in the same run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import pico_llama, write_recipe
from tests.hub_person import Person
from tests.hub_server import running

LINEAR = "{merge_method: linear, parameters: {weight: 1}, models: [{model: org/base}, {model: org/other}]}"
RECIPE = """
kittybuild: 1
sources:
  wide: {path: wide}
  lost: {path: nowhere}
stages:
  remote: {merge_method: linear, parameters: {weight: 1}, models: [{model: org/base}, {model: wide}]}
  layers: {merge_method: passthrough, slices: [{sources: [{model: org/other, layer_range: [3, 9]}]}]}
  absent: {merge_method: passthrough, models: [{model: lost}]}
  spoken: {merge_method: passthrough, models: [{model: wide}], tokenizer_source: union}
"""
TEXT = "  text: {merge_method: pasthrough, models: [{model: wide}]}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two siblings for the Hub, and a model of another width."""
    folder = tmp_path_factory.mktemp("models")
    base = pico_llama(folder / "base", 1, layers=6, width=128, tokenizer=True)
    pico_llama(folder / "other", 2, base=base)
    pico_llama(folder / "wide", 4, layers=6, width=96)
    return folder


@pytest.fixture
def person(tmp_path: Path, models: Path) -> Iterator[Person]:
    with running() as hub:
        for name in ("base", "other"):
            hub.push(f"org/{name}", models / name)
        shutil.copytree(models / "wide", tmp_path / "wide")
        yield Person(hub, tmp_path)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("state", ["fine", "missing", "gated"])
def test_of_stages_on_the_hub_and_here(person: Person, state: str, text: bool) -> None:
    if state == "missing":
        del person.hub.repositories["org/base"]
    if state == "gated":
        person.hub.gated.add("org/base")
    found = person.errors("plan", person.recipe(RECIPE + TEXT if text else RECIPE))
    of_base = {"fine": "KB301", "missing": "KB251", "gated": "KB252"}[state]
    wanted = [of_base, "KB201", "KB303", "KB332", *(["KB104"] if text else [])]
    assert sorted(error["code"] for error in found) == sorted(wanted)
    assert person.hub.sent < 500_000  # headers and small files alone
    assert not (person.folder / "recipe.lock").exists()


@pytest.mark.parametrize("words", [("lock",), ("build", "spoken", "-o", "out")])
def test_whatever_the_command(person: Person, words: tuple[str, ...]) -> None:
    del person.hub.repositories["org/base"]
    found = person.errors(words[0], person.recipe(RECIPE), *words[1:])
    assert sorted(error["code"] for error in found) == ["KB201", "KB251", "KB303", "KB332"]


@pytest.mark.parametrize("command", ["plan", "lock"])
def test_two_repositories_that_are_not_there(person: Person, command: str) -> None:
    person.hub.repositories.clear()
    found = person.errors(command, person.recipe(LINEAR))
    assert [error["code"] for error in found] == ["KB251", "KB251"]
    assert "org/base" in found[0]["message"]
    assert "org/other" in found[1]["message"]


def test_sources_of_the_lock_are_not_asked_for_again(person: Person) -> None:
    person.run("lock", person.recipe(LINEAR))
    shutil.copy(person.folder / "recipe.lock", person.folder / "other.lock")
    text = """
        kittybuild: 1
        stages:
          good: {merge_method: passthrough, slices: [{sources: [{model: org/base, layer_range: [3, 9]}]}]}
          text: {merge_method: pasthrough, models: [{model: wide}]}
        """
    found = person.errors("plan", write_recipe(person.folder, text, "other.yml"))
    assert [error["code"] for error in found] == ["KB104", "KB303"]
    assert not any(request.path.startswith("/api/models/") for request in person.hub.requests)


def test_a_hub_that_cannot_be_reached_is_not_waited_for(person: Person) -> None:
    person.hub.fault = lambda *_: 500
    found = person.errors("plan", person.recipe(RECIPE + TEXT))
    assert [error["code"] for error in found].count("KB255") == 2
    assert sum(request.path.startswith("/api/models/") for request in person.hub.requests) == 2
