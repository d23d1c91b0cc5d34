"""Each of mergekit's programs makes, bit for bit, what its printed recipe makes when `build` builds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.building import build, contents
from tests.helpers import load_tensors, noise, pico_adapter, pico_llama, run_cli, save_tensors, write_recipe
from tests.surgery import tokenizers, write

SOUP = """
    merge_method: linear
    models:
      - {model: a, parameters: {weight: 0.5}}
      - {model: b, parameters: {weight: 0.5}}
"""
MULTI = """
    name: soup
    merge_method: linear
    models: [{model: a}, {model: b}]
    parameters: {weight: 0.5}
    ---
    merge_method: slerp
    base_model: a
    models: [{model: soup}]
    parameters: {t: 0.5}
"""
FILES = """
    merge_method: linear
    models: [{model: x.safetensors}, {model: y.safetensors}]
    parameters: {weight: 0.5}
"""
EXPERTS = """
    base_model: a
    gate_mode: random
    architecture: mixtral
    experts: [{source_model: b}, {source_model: c}]
"""
PROGRAMS = {
    "merge": ("merge", "soup.yml", "out"),
    "options": ("merge", "soup.yml", "out", "--random-seed", "7", "--out-shard-size", "50k"),
    "truncate": ("merge", "soup.yml", "out", "--unsafe-truncate-embeddings"),
    "moe": ("moe", "moe.yml", "out"),
    "seeded moe": ("moe", "moe.yml", "out", "--random-seed", "5"),
    "multi": ("multi", "multi.yml", "--out-path", "out", "-I", "mid"),
    "mega": ("multi", "multi.yml", "all", "-R"),
    "pytorch": ("pytorch", "files.yml", "out", "-u"),
    "layershuffle": ("layershuffle", "out", "-m", "a", "-m", "b", "--random-seed", "3"),
    "full-random": ("layershuffle", "out", "-m", "a", "-m", "b", "-w", "0.5", "-w", "0.5", "--full-random", "--fp16"),
    "tokensurgeon": ("tokensurgeon", "one", "two", "out", "-a", "mean", "-k", "8", "-bm", "yes"),
    "barycentric": ("tokensurgeon", "one", "two", "out", "-k", "8", "-b", "-nc"),
    "extract-lora": ("extract-lora", "--model", "b", "--base-model", "a", "--out-path", "out", "--max-rank", "4"),
    "by threshold": ("extract-lora", "b", "a", "out", "--sv-epsilon", "0.05", "--embed-lora", "--skip-undecomposable"),
    "merge-lora": ("merge-lora", "a", "lora", "out"),
    "legacy": ("legacy", "out", "--merge", "a", "--merge", "b", "--weight", "0.4", "--base-model", "c", "--bf16"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    pico_llama(folder / "a", 1, layers=4)
    for seed, name in enumerate("bc", 2):
        pico_llama(folder / name, seed, base=folder / "a")
    pico_adapter(folder / "lora", folder / "a", 4)
    for name, files in tokenizers().items():
        write(folder, name, files)
    save_tensors(folder / "x.safetensors", {"w": noise(1, "w", (3, 4)), "old": noise(1, "old", (5,))})
    save_tensors(folder / "y.safetensors", {"w": noise(2, "w", (3, 4))})
    return folder


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the models and the configurations."""
    for model in models.iterdir():
        (tmp_path / model.name).symlink_to(model)
    for name, text in {"soup.yml": SOUP, "multi.yml": MULTI, "files.yml": FILES, "moe.yml": EXPERTS}.items():
        write_recipe(tmp_path, text, name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KITTYBUILD_STORE", str(tmp_path / "store"))
    return tmp_path


def done(*words: str | Path) -> dict[str, Any]:
    status, document = run_cli(*words)
    assert (status, document["ok"]) == (0, True), document
    return document


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_makes_what_its_recipe_makes(here: Path, name: str) -> None:
    made = done(*PROGRAMS[name])
    recipe = write_recipe(here, done(*PROGRAMS[name], "--print-recipe")["recipe"], "printed.yml")
    own = "kittybuild:" in Path(recipe).read_text(encoding="utf-8")
    again = build(recipe, *(() if own else ("-o", "out")), "--store", here / "other")
    assert again["outputs"].keys() == made["outputs"].keys()
    for stage, report in again["stages"].items():
        assert report["manifest"] == made["stages"][stage]["manifest"]
        assert report["computed"] > 0
    for output in made["outputs"].values():
        assert Path(output["folder"]).relative_to(here).parts[0] in ("out", "mid", "all")
        assert load_tensors(output["folder"])


@pytest.mark.parametrize("name", PROGRAMS)
def test_again_it_computes_nothing(here: Path, name: str) -> None:
    done(*PROGRAMS[name])
    stages = done(*PROGRAMS[name])["stages"]
    assert sum(stage["computed"] for stage in stages.values()) == 0


def test_printing_a_recipe_builds_nothing(here: Path) -> None:
    for words in PROGRAMS.values():
        done(*words, "--print-recipe")
    assert not {"out", "mid", "all", "store"} & {path.name for path in here.iterdir()}


def test_a_merge_is_the_same_as_build_and_keeps_the_configuration(here: Path) -> None:
    done("merge", "soup.yml", "out")
    build("soup.yml", "-o", "built", "--store", here / "other")
    out, built = contents(here / "out"), contents(here / "built")
    assert out["model.safetensors"] == built["model.safetensors"]
    assert out["mergekit_config.yml"] == (here / "soup.yml").read_bytes()


def test_options_that_change_nothing_are_noted_and_change_nothing(here: Path) -> None:
    plain = done("merge", "soup.yml", "out")
    words = ("--cuda", "--no-copy-tokenizer", "--copy-tokenizer", "--lazy-unpickle", "--write-threads", "4", "-v", "-v")
    told = done("merge", "soup.yml", "out", *words)
    assert told["stages"]["merge"]["manifest"] == plain["stages"]["merge"]["manifest"]
    assert [note.partition(":")[0] for note in told["notes"]] == ["--cuda", "--lazy-unpickle", "--write-threads"]


def test_what_is_wrong_with_a_configuration_is_told_in_its_place(here: Path) -> None:
    write_recipe(here, SOUP.replace("linear", "linaer"), "wrong.yml")
    status, document = run_cli("merge", "wrong.yml", "out", "--random-seed", "7")
    assert status == 3
    assert document["errors"][0]["at"].startswith("wrong.yml:2:")


def test_a_recipe_of_ours_is_no_configuration(here: Path) -> None:
    write_recipe(here, {"kittybuild": 1, "stages": {"soup": yaml.safe_load(SOUP)}}, "own.yml")
    status, document = run_cli("merge", "own.yml", "out")
    assert (status, document["errors"][0]["code"]) == (2, "KB017")


@pytest.mark.parametrize(
    "words",
    [
        ("multi", "multi.yml", "-I", "mid"),
        ("multi", "multi.yml"),
        ("pytorch", "files.yml", "out", "-i", "-u"),
        ("layershuffle", "out", "-m", "a", "-w", "1", "-w", "2"),
        ("legacy", "out", "--merge", "a", "--merge", "b", "--weight", "1", "--weight", "2", "--weight", "3"),
        ("tokensurgeon", "one", "two", "out", "-b", "-a", "omp"),
        ("extract-lora", "b", "a"),
        ("extract-lora", "b", "a", "out", "--model", "c"),
    ],
    ids=" ".join,
)
def test_arguments_that_do_not_go_together_are_an_error(here: Path, words: tuple[str, ...]) -> None:
    status, document = run_cli(*words)
    assert (status, document["errors"][0]["code"]) == (2, "KB018")


def test_a_dry_shuffle_writes_its_configuration_and_builds_nothing(here: Path) -> None:
    config = done("layershuffle", "out", "-m", "a", "-m", "b", "--dry-run", "--write-yaml", "drawn.yml")["config"]
    assert yaml.safe_load((here / "drawn.yml").read_text(encoding="utf-8")) == config
    assert not (here / "out").exists()
    assert build("drawn.yml", "-o", "out", "--store", here / "other")["stages"]["merge"]["tensors"] == 39
