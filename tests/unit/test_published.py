"""The configuration of a published merge is read in the class of arithmetic of the tool that made it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kittybuild import api
from kittybuild.errors import UsageError
from kittybuild.model.derivation import KITTY_1
from kittybuild.model.recipe import MergeStage
from kittybuild.planner.published import published_class
from tests.helpers import write_json, write_recipe

CLASSES = (KITTY_1, "mergekit-0.1.5", "mergekitty-0.3")
INDEX = "model.safetensors.index.json"
TEXT = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]"


def published(folder: Path, metadata: object, name: str = "mergekit_config.yml") -> tuple[str | None, str | None]:
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": {}})
    return published_class(write_recipe(folder, TEXT, name), CLASSES)


def test_the_index_names_the_tool(tmp_path: Path) -> None:
    numerics, note = published(tmp_path, {"total_size": 8, "mergekit_version": "0.1.5"})
    assert numerics == "mergekit-0.1.5"
    assert note == (
        f"{tmp_path}/mergekit_config.yml: the index of the model beside it was written by mergekit 0.1.5:"
        " numerics mergekit-0.1.5 is taken, and --numerics kitty-1 takes ours"
    )


@pytest.mark.parametrize("name", ["mergekit_config.yml", "mergekitty_config.yml"])
def test_every_mergekitty_is_the_one_that_we_know(name: str, tmp_path: Path) -> None:
    numerics, note = published(tmp_path, {"mergekitty_version": "0.0.7"}, name)
    assert numerics == "mergekitty-0.3"
    assert "written by mergekitty:" in (note or "")


def test_of_a_version_that_we_do_not_have_is_a_note(tmp_path: Path) -> None:
    numerics, note = published(tmp_path, {"mergekit_version": "0.1.2"})
    assert numerics is None
    assert "mergekit 0.1.2, whose arithmetic we do not have" in (note or "")


@pytest.mark.parametrize("metadata", [{}, {"total_size": 8}, None, "0.1.5", ["mergekit_version"]])
def test_an_index_that_names_no_tool_says_nothing(metadata: object, tmp_path: Path) -> None:
    assert published(tmp_path, metadata) == (None, None)


def test_other_files_are_recipes_like_any(tmp_path: Path) -> None:
    assert published(tmp_path, {"mergekit_version": "0.1.5"}, "config.yml") == (None, None)


def test_without_an_index_or_with_a_damaged_one_nothing_is_known(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, TEXT, "mergekit_config.yml")
    assert published_class(recipe, CLASSES) == (None, None)
    (tmp_path / INDEX).write_text("{", encoding="utf-8")
    assert published_class(recipe, CLASSES) == (None, None)


class TestReading:
    """The same through the API: what is told goes before what the file says, and a stage's own word before both."""

    @staticmethod
    def numerics(file: str, **options: str) -> str:
        (stage,) = api.read_recipe(file, **options).stages.values()  # type: ignore[arg-type]
        assert isinstance(stage, MergeStage)
        return stage.numerics

    def test_what_is_told_goes_before_the_index(self, tmp_path: Path) -> None:
        published(tmp_path, {"mergekit_version": "0.1.5"})
        recipe = str(tmp_path / "mergekit_config.yml")
        assert self.numerics(recipe, numerics=KITTY_1) == KITTY_1
        assert api.read_recipe(recipe, numerics=KITTY_1).notes == ()

    def test_a_note_of_a_version_that_we_do_not_have_is_a_note_of_the_recipe(self, tmp_path: Path) -> None:
        _, note = published(tmp_path, {"mergekit_version": "0.1.2"})
        recipe = str(tmp_path / "mergekit_config.yml")
        assert api.read_recipe(recipe).notes == (note,)
        assert self.numerics(recipe) == KITTY_1

    def test_unknown_numerics_are_refused_with_the_nearest(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError) as caught:
            api.read_recipe(write_recipe(tmp_path, TEXT), numerics="kity-1")
        assert (caught.value.code, caught.value.hint) == ("KB006", "did you mean 'kitty-1'?")
