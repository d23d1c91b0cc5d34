"""The documentation says what is true: its recipes parse, its commands exist, its tables are those of the code.

The table of methods is made from the code: KITTYBUILD_GOLDEN=write pytest tests/unit/test_docs.py writes it anew.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
import pytest
import yaml

from kittybuild import errors, tensors
from kittybuild.builders.base import Builder, Builders
from kittybuild.builders.plugins import load
from kittybuild.builders.registry import BUILTIN
from kittybuild.cli import main, reference
from kittybuild.planner.lower import DEFAULT_SHARD
from kittybuild.recipe import schema
from kittybuild.recipe.parse import parse_recipe, parse_size
from kittybuild.testing import LAWS, run
from tests.building import contents
from tests.helpers import pico_llama, run_cli, write_recipe
from tests.planning import llama, planned, step

ROOT = Path(__file__).resolve().parents[2]
PAGES = tuple(sorted(ROOT.glob("docs/*.md")))
README = ROOT / "README.md"
FRAGMENT = "# fragment"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def blocks(language: str, *pages: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a language: place and text."""
    found = []
    for path in pages or (*PAGES, README):
        text = path.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            if match[1] == language:
                line = text.count("\n", 0, match.start()) + 2
                found.append((f"{path.relative_to(ROOT).as_posix()}:{line}", match[2]))
    return found


def section(text: str, title: str) -> str:
    """What stands under a heading, up to the next heading."""
    return re.split(r"^#+ ", text.partition(f"# {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def between(text: str, mark: str) -> str:
    """What stands between `<!-- mark -->` and `<!-- end -->`."""
    return text.partition(f"<!-- {mark} -->\n")[2].partition("<!-- end -->")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of the rows of all tables in a text, without their headings."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    heads = {n - 1 for n, line in enumerate(lines) if line.startswith("|---")}
    cells = [line.strip("|").split("|") for n, line in enumerate(lines) if n not in heads and n - 1 not in heads]
    return [[cell.strip() for cell in row] for row in cells]


def words(cell: str) -> list[str]:
    """What stands in backquotes."""
    return re.findall(r"`([^`]+)`", cell)


def first_words(text: str) -> list[str]:
    """What stands in backquotes in the first column of the tables in a text."""
    return [word for row in rows(text) for word in words(row[0])]


# ---- blocks: recipes, commands, JSON


@pytest.mark.parametrize(("place", "text"), blocks("yaml"), ids=lambda value: value.partition("\n")[0])
def test_a_recipe_parses_and_a_fragment_is_none(place: str, text: str) -> None:
    if not text.startswith(FRAGMENT):
        assert parse_recipe(text, place, BUILTIN.catalogue()).stages
        return
    assert not {"kittybuild", "merge_method"} & set(yaml.safe_load(text)), "this is a whole recipe and no fragment"


def commands() -> list[tuple[str, str]]:
    """Every `$ kittybuild ...` line in the documentation."""
    lines = [(place, line) for place, text in blocks("console") for line in text.splitlines()]
    return [(place, line.removeprefix("$ ")) for place, line in lines if line.startswith("$ kittybuild")]


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the first words name, and the words that are left."""
    found: click.Command = main
    while isinstance(found, click.Group) and words:
        name, *words = words
        inner = found.get_command(click.Context(found), name)
        assert inner is not None, f"there is no command {name!r}"
        found = inner
    return found, words


@pytest.mark.parametrize(("place", "line"), commands())
def test_a_command_and_its_options_exist(place: str, line: str) -> None:
    command, arguments = command_of(shlex.split(line, comments=True)[1:])
    command.make_context(line, arguments)  # raises UsageError


def shape(value: Any) -> Any:
    """The keys of a JSON document, and the kinds of its values."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value[:1]]
    return float if type(value) is float else type(value)


@pytest.fixture(scope="module")
def soup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe of commands.md and its models."""
    folder = tmp_path_factory.mktemp("docs")
    pico_llama(folder / "models/a", 1, layers=4)
    pico_llama(folder / "models/b", 2, base=folder / "models/a")
    texts = [text for _, text in blocks("yaml", ROOT / "docs/commands.md") if not text.startswith(FRAGMENT)]
    write_recipe(folder, texts[0], "soup.yml")
    return folder


def test_the_json_documents_are_as_commands_print_them(soup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(soup)
    monkeypatch.setenv("KITTYBUILD_STORE", str(soup / "store"))
    text = page("commands.md").partition("\n## JSON\n")[2].partition("\n## ")[0]
    examples = [(match[1], match[2]) for match in FENCE.finditer(text) if match[1] in ("console", "json")]
    pairs = [(a[1], b[1]) for a, b in pairwise(examples) if (a[0], b[0]) == ("console", "json")]
    assert len(pairs) == 12
    for line, document in pairs:
        _, found = run_cli(*shlex.split(line)[2:-1])
        assert shape(found) == shape(json.loads(document)), line


# ---- commands.md


COMMANDS = (
    *("build", "plan", "why", "lock", "verify", "reproduce", "diff", "publish", "methods", "schema"),
    *("store info", "store roots", "store gc", "store check", "store repair"),
    *("cache keygen", "cache push", "cache pull", "cache info", "cache gc", "cache roots"),
)
PROGRAMS = (
    *("merge", "moe", "multi", "pytorch", "layershuffle", "tokensurgeon"),
    *("extract-lora", "merge-lora", "legacy"),
)
"""The commands of from-mergekit.md."""


def option_words(option: click.Option) -> list[str]:
    """How a table writes an option: `-o`, `--output DIR`."""
    names = list(option.opts)
    if not option.is_flag:
        metavar = "N" if isinstance(option.type, click.IntRange) else option.metavar or option.type.name.upper()
        names[-1] += f" {metavar}"
    return names


@pytest.mark.parametrize("name", COMMANDS)
def test_the_options_of_a_command_are_all_there(name: str) -> None:
    command, _ = command_of(name.split())
    options = [param for param in command.params if isinstance(param, click.Option)]
    table = rows(between(page("commands.md"), f"options of {name}"))
    assert [words(row[0]) for row in table] == [option_words(option) for option in options]
    for option, (_, meaning) in zip(options, table, strict=True):
        if option.show_default:
            assert f"default `{option.default}`" in meaning


def test_there_are_no_other_commands() -> None:
    found = []
    for name in main.list_commands(click.Context(main)):
        command, _ = command_of([name])
        found += [f"{name} {inner}" for inner in command.commands] if isinstance(command, click.Group) else [name]
    assert tuple(found) == COMMANDS + PROGRAMS


# ---- errors.md


@functools.cache
def codes() -> Mapping[str, frozenset[str]]:
    """Every code in the package, each with the names of the functions that are called with it."""
    found: dict[str, set[str]] = {}
    for path in sorted(ROOT.glob("kittybuild/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and re.fullmatch(r"KB\d{3}", str(node.value)):
                found.setdefault(node.value, set())
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                found.setdefault(str(node.args[0].value), set()).add(ast.unparse(node.func))
    return {code: frozenset(names) for code, names in found.items() if re.fullmatch(r"KB\d{3}", code)}


def test_every_error_code_is_documented_and_every_documented_code_is_used() -> None:
    documented = [row[0] for row in rows(page("errors.md"))]
    assert documented == sorted(documented)
    assert documented == sorted(codes())


def test_the_errors_have_the_exit_statuses_of_their_sections() -> None:
    text = page("errors.md")
    sections = re.findall(r"^## KB(\d): .*\(exit status (\d+)\)$", text, re.MULTILINE)
    statuses = {f"KB{digit}": int(status) for digit, status in sections}
    for code, names in codes().items():
        for kind in (getattr(errors, name, None) for name in names):
            assert kind is None or kind.exit_status == statuses[code[:3]], code


def test_the_exit_statuses_are_all_there() -> None:
    raised = {
        getattr(errors, name).exit_status for names in codes().values() for name in names if hasattr(errors, name)
    }
    table = [int(row[0]) for row in rows(section(page("commands.md"), "Exit statuses"))]
    assert table == sorted({0, 1, 130} | raised)


def test_the_package_speaks_only_of_commands_that_exist() -> None:
    for path in sorted(ROOT.glob("kittybuild/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant):
                for line in re.findall(r"`kittybuild ([a-z ]+)", str(node.value)):
                    command_of(line.split())


# ---- recipe.md


KEYS: Mapping[str, type] = {
    "The top level": schema.RecipeText,
    "Sources": schema.SourceText,
    "Outputs": schema.OutputText,
}
STAGE_KEYS = {"kind", "dtype", "out_dtype", "keep", "allow_nan"}


@pytest.mark.parametrize("title", KEYS)
def test_the_keys_of_a_section_are_those_of_the_schema(title: str) -> None:
    assert set(first_words(section(page("recipe.md"), title))) == set(KEYS[title].model_fields)  # type: ignore[attr-defined]


def test_the_keys_of_stages_are_those_of_the_schema() -> None:
    text = page("recipe.md")
    assert set(first_words(section(text, "Stages"))) == STAGE_KEYS
    merge = {*schema.MergeText.model_fields, *schema.ModelText.model_fields} - STAGE_KEYS
    assert set(first_words(section(text, "merge"))) == merge
    slices = {*schema.SliceText.model_fields, *schema.SliceSourceText.model_fields}
    assert set(first_words(section(text, "Slices"))) == slices
    lora = {*schema.ApplyLoraText.model_fields, *schema.AdapterText.model_fields} - STAGE_KEYS
    assert set(first_words(section(text, "apply_lora"))) == lora
    raw = {*schema.StateDictText.model_fields} - {*schema.MergeText.model_fields}
    assert set(first_words(section(text, "state_dict"))) == raw
    fields = schema.TransplantText.model_fields
    methods = get_args(fields["approximation_method"].annotation)
    assert set(first_words(section(page("transplant.md"), "Options"))) == {*fields, *methods} - STAGE_KEYS
    mixture = {*schema.MoeText.model_fields, *schema.ExpertText.model_fields} - STAGE_KEYS - {"name"}
    assert set(first_words(section(page("moe.md"), "Keys"))) == mixture
    made = section(page("lora.md"), "extract_lora")
    assert set(first_words(made)) >= set(schema.ExtractLoraText.model_fields) - STAGE_KEYS
    merged = section(page("lora.md"), "merge_adapters")
    assert set(first_words(merged)) >= set(schema.MergeAdaptersText.model_fields) - STAGE_KEYS
    assert set(first_words(section(text, "Dtypes"))) == set(schema.DefaultsText.model_fields)


def test_the_keys_of_a_tokenizer_are_those_of_the_schema() -> None:
    keys = first_words(section(page("tokenizers.md"), "Keys of a tokenizer"))
    assert keys == [*schema.TokenizerText.model_fields, *schema.TokenRuleText.model_fields]


def test_the_dtypes_are_all_there() -> None:
    line = next(line for line in section(page("recipe.md"), "Dtypes").splitlines() if line.startswith("The words are"))
    assert set(words(line)) - {"torch."} == {dtype.torch_name for dtype in tensors.DType if dtype.is_float}


def test_the_default_shard_size_is_the_one_that_is_told() -> None:
    row = next(row for row in rows(section(page("recipe.md"), "Outputs")) if "`shard_size`" in row[0])
    assert parse_size(words(row[1])[0]) == DEFAULT_SHARD


def test_the_worked_values_are_those_of_the_planner(tmp_path: Path) -> None:
    text = page("recipe.md")
    recipe = FENCE.findall(section(text, "Parameters"))[-1][1]
    models = {f"models/{name}": llama(layers=5) for name in ("base", "a", "b")}
    plan = planned(tmp_path, models, recipe)
    table = rows(between(text, "values"))
    assert len(table) > 5
    for tensor, *numbers, _ in table:
        params = step(plan, words(tensor)[0]).params
        assert numbers == [f"{value:g}" for value in (*params["weight"], *params["density"])], tensor


# ---- methods.md, plugins.md


def test_the_methods_are_those_of_the_code() -> None:
    wanted = "\n".join(reference.page(name, BUILTIN) for name in reference.names(BUILTIN))
    text = page("methods.md")
    if os.environ.get("KITTYBUILD_GOLDEN") == "write":
        before, _, after = text.partition("<!-- methods -->\n")
        (ROOT / "docs/methods.md").write_text(
            f"{before}<!-- methods -->\n{wanted}<!-- end -->{after.partition('<!-- end -->')[2]}", encoding="utf-8"
        )
        return
    assert between(text, "methods") == wanted


@pytest.fixture
def plugin(tmp_path: Path) -> Builders:
    """The example of plugins.md, loaded as a file."""
    source, _ = (text for _, text in blocks("python", ROOT / "docs/plugins.md"))
    (tmp_path / "loudest.py").write_text(source, encoding="utf-8")
    return load([str(tmp_path / "loudest.py")])


def test_the_plug_in_keeps_the_laws_as_its_test_says(
    plugin: Builders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, test = (text for _, text in blocks("python", ROOT / "docs/plugins.md"))
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(test, "plugins.md", "exec"), names)
    (check,) = (value for name, value in names.items() if name.startswith("test_"))
    check()
    sys.modules.pop("loudest")


def test_the_plug_in_does_what_it_says(plugin: Builders, tmp_path: Path) -> None:
    models = {name: llama() for name in ("base", "a", "b")}
    text = "merge_method: loudest\nbase_model: base\nparameters: {strength: [0, 1]}\nmodels: [{model: a}, {model: b}]"
    made = step(planned(tmp_path, models, text, builders=plugin), "model.layers.1.mlp.up_proj.weight")
    assert (made.builder, made.params) == ("loudest", {"strength": 1.0})
    numbers = [[0.0] * 4, [1.0, -2.0, 0.5, 3.0], [-4.0, 1.0, 0.5, -3.0]]
    base, one, other = np.array(numbers, np.float32)
    found = run(plugin["loudest"], [base, one, other], {"strength": 0.5})
    assert found.tolist() == [-2.0, -1.0, 0.25, 1.5]


def test_the_laws_are_those_of_the_code() -> None:
    told = {words(name)[0]: says for name, says in rows(between(page("plugins.md"), "laws"))}
    assert told == {name: str(law.__doc__).replace("\n    ", " ") for name, law in LAWS.items()}


def test_the_fields_of_a_builder_are_told() -> None:
    fields = {field.name for field in dataclasses.fields(Builder)}
    told = set(first_words(section(page("plugins.md"), "What the Builder says")))
    assert fields - told == {"prepare", "streamed", "whole", "numerics", "machine"}, "what a plug-in does not say"
    assert told <= fields


# ---- the other pages


def test_a_key_is_made_of_what_is_told() -> None:
    tree = ast.parse((ROOT / "kittybuild/model/derivation.py").read_text(encoding="utf-8"))
    key = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "key")
    form = next(node for node in ast.walk(key) if isinstance(node, ast.Dict))
    hashed = [node.value for node in form.keys if isinstance(node, ast.Constant)]
    table = rows(section(page("reproducibility.md"), "What is in a derivation key"))
    assert [words(row[0])[0] for row in table] == hashed


def test_an_output_holds_what_is_told(soup: Path) -> None:
    status, _ = run_cli("build", soup / "soup.yml", "-o", soup / "told", "--store", soup / "store")
    assert status == 0
    found = json.loads((soup / "told/kittybuild.json").read_text(encoding="utf-8"))
    assert first_words(section(page("output.md"), "kittybuild.json")) == list(found)
    assert set(contents(soup / "told")) <= set(first_words(section(page("output.md"), "Files")))


def test_what_is_not_built_yet_is_not_there() -> None:
    table = [row[0] for row in rows(section(page("index.md"), "Not built yet"))]
    absent = [name for what in table if what.startswith("the commands") for name in words(what)]
    assert absent == ["sweep", "report"]
    for name in absent:
        with pytest.raises(AssertionError, match="there is no command"):
            command_of(name.split())


def slug(title: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", title).lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    return {slug(title) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("path", [*PAGES, README], ids=lambda path: path.name)
def test_internal_links_lead_somewhere(path: Path) -> None:
    for link in LINK.findall(FENCE.sub("", path.read_text(encoding="utf-8"))):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), f"{path.name}: {link}"
        assert not anchor or anchor in anchors(found), f"{path.name}: {link}"


def test_the_index_names_every_page_and_every_recipe() -> None:
    linked = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in LINK.findall(page("index.md"))}
    assert set(PAGES) - {ROOT / "docs/index.md"} <= linked
    assert set(ROOT.glob("recipes/*.yml")) <= linked
