"""`reproduce` on outputs of ours, and `build --check`: the rebuild is the same, or the first cause is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kittybuild import reproduce as again
from kittybuild.builders.base import Builders
from kittybuild.builders.registry import BUILTIN
from tests.building import build, linear
from tests.helpers import load_tensors, pico_llama, run_cli, save_tensors, write_json, write_recipe

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = pico_llama(folder / "base", 1, layers=1, width=16)
    pico_llama(folder / "happy", 2, base=base)
    return folder


@pytest.fixture
def made(models: Path, tmp_path: Path) -> Path:
    """An output in a folder of its own, with sources of its own beside it, at the names in its recipe."""
    for name in ("base", "happy"):
        shutil.copytree(models / name, tmp_path / "made" / name)
    recipe = write_recipe(
        tmp_path / "made",
        """\
        kittybuild: 1
        sources: {base: {path: base}, happy: {path: happy}}
        stages:
          soup:
            merge_method: linear
            models:
              - {model: base, parameters: {weight: 0.25}}
              - {model: happy, parameters: {weight: 0.75}}
          calm:
            merge_method: task_arithmetic
            base_model: base
            models: [{model: soup, parameters: {weight: 0.5}}]
        outputs: {calm: {folder: calm}}
        """,
    )
    build(recipe, "--store", tmp_path / "store", "--workers", "threads")
    shutil.copytree(tmp_path / "made/calm", tmp_path / "calm", copy_function=shutil.copyfile)
    return tmp_path / "calm"


def reproduced(folder: Path, *args: str | Path, status: int = 0) -> dict[str, Any]:
    sources = [f"--source={name}={folder.parent / 'made' / name}" for name in ("base", "happy")]
    found, document = run_cli(
        "reproduce", folder, *sources, "--store", folder.parent / "other", "--workers", "threads", *args
    )
    assert (found, document["ok"]) == (status, status == 0), document
    return document


def edit(file: Path, name: str = NORM) -> None:
    from safetensors.torch import load_file

    tensors = load_file(file)
    tensors[name][0] += 1
    save_tensors(file, tensors)


def test_an_output_is_reproduced_in_another_store(made: Path) -> None:
    document = reproduced(made)
    total = len(load_tensors(made))
    assert (document["recipe"], document["stage"]) == ("kittybuild.json", "calm")
    assert (document["tensors"]["identical"], document["computed"], document["cached"]) == (total, total, 0)
    assert reproduced(made)["cached"] == total
    assert reproduced(made, "--fresh")["computed"] == total


def test_a_tensor_that_was_changed_afterwards(made: Path) -> None:
    edit(made / "model.safetensors")
    document = reproduced(made, status=6)
    assert [one["tensor"] for one in document["differences"]] == [NORM]
    assert document["cause"] == f"{NORM} is not what the folder's kittybuild.json says: it was changed after the build"


def test_a_source_that_is_another_now(made: Path) -> None:
    edit(made.parent / "made/happy/model.safetensors")
    document = reproduced(made, status=6)
    assert [one["tensor"] for one in document["differences"]] == [NORM]
    assert document["cause"] == "the source happy holds other tensors than the one that was merged"


def test_a_recipe_that_is_another_now(made: Path) -> None:
    story = json.loads((made / "kittybuild.json").read_text(encoding="utf-8"))
    story["recipe"]["text"] = story["recipe"]["text"].replace("{weight: 0.5}", "{weight: 0.6}")
    write_json(made / "kittybuild.json", story)
    document = reproduced(made, status=6)
    assert document["cause"].endswith("its parameters are others")


def test_other_numerics_are_a_cause(made: Path) -> None:
    document = reproduced(made, "--numerics", "mergekit-0.1.5", status=6)
    assert ": the numerics was kitty-1, now it is mergekit-0.1.5" in document["cause"]


def test_numerics_of_the_command_line_are_kept(models: Path, tmp_path: Path) -> None:
    recipe = linear(tmp_path, {models / "base": 0.3, models / "happy": 0.5})
    args = ("--store", tmp_path / "store", "--workers", "threads")
    build(recipe, "-o", tmp_path / "out", "--numerics", "mergekit-0.1.5", *args)
    status, document = run_cli("reproduce", tmp_path / "out", *args, "--fresh")
    assert (status, document["numerics"]) == (0, ["mergekit-0.1.5"])


def test_text_for_a_person(made: Path) -> None:
    from click.testing import CliRunner

    from kittybuild.cli import main

    edit(made / "model.safetensors")
    sources = [f"--source={name}={made.parent / 'made' / name}" for name in ("base", "happy")]
    done = CliRunner().invoke(main, ["reproduce", str(made), *sources, "--store", str(made.parent / "other")])
    assert done.exit_code == 6
    total = len(load_tensors(made))
    assert f"{total - 1} of {total} tensors are bit-identical" in done.stdout
    assert f"KB606: 1 of {total} tensors came out otherwise:\n  {NORM}: 1 of 16 elements differ" in done.stderr


class TestCheck:
    """`build --check` builds twice, and believes only what came out the same."""

    def test_a_sound_build_is_the_same_twice(self, models: Path, tmp_path: Path) -> None:
        recipe = linear(tmp_path, {models / "base": 0.5, models / "happy": 0.5})
        args = ("-o", tmp_path / "out", "--store", tmp_path / "store", "--workers", "threads", "--check")
        assert build(recipe, *args)["ok"]
        assert build(recipe, *args)["ok"]  # from the store, held against one that is computed
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yml", "store"]

    def test_a_builder_that_gives_other_bits_is_found(self, models: Path, tmp_path: Path) -> None:
        from dataclasses import replace

        from kittybuild import api
        from kittybuild.store.store import Store

        recipe = linear(tmp_path, {models / "base": 0.5, models / "happy": 0.5})
        prepared = api.prepare(api.read_recipe(recipe), folder=str(tmp_path / "out"))
        with Store.open(str(tmp_path / "store")) as store:
            report = api.build(prepared, store, processes=False)
            limits = again.Limits(processes=False)
            assert again.rebuilt(prepared, report, store, limits=limits) == ()
            other = again.rebuilt(prepared, report, store, limits=limits, builders=_moody(BUILTIN, replace))
        assert f"merge: tensor {NORM}" in other
        assert "merge: shard 1" in other


def _moody(builders: Builders, replace: Any) -> Builders:
    """The builders, of which linear adds something: as a machine would that computes wrong now and then."""
    (place,) = [key for key, b in builders.by_class.items() if (b.name, b.numerics) == ("linear", "kitty-1")]
    linear = builders.by_class[place]

    def prepare(job: Any) -> Any:
        combine = linear.prepare(job)
        return lambda block: combine(block) + 1

    return replace(builders, by_class={**builders.by_class, place: replace(linear, prepare=prepare)})
