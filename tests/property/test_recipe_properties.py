"""What holds for every recipe and every file: values stay in range, and what is wrong is an error of ours."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kittybuild.builders.registry import BUILTIN
from kittybuild.checkpoint.adapter import read_adapter, read_adapter_folder
from kittybuild.checkpoint.folder import INDEX, read_folder
from kittybuild.checkpoint.safetensors_file import read_safetensors
from kittybuild.errors import KittybuildError, Problems, RecipeError, SourceError
from kittybuild.model.method import Param
from kittybuild.model.recipe import NOWHERE, Given, Recipe
from kittybuild.planner.names import layer_of, natural
from kittybuild.planner.shortcut import stage_keys
from kittybuild.recipe.parse import parse_recipe
from kittybuild.recipe.settings import Lookup, entries, interpolate, parse_entry
from kittybuild.recipe.yamltext import read_documents
from tests.helpers import write_json
from tests.planning import header_bytes, llama

NUMBERS = st.floats(-1e6, 1e6)
POSITIONS = st.floats(0, 1)
WORDS = st.sampled_from(["a", "b", "base", "org/name", "a+b", "a@main", "./a", "", "@", "a+b+c"])
SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates(), WORDS
)
PATTERNS = SCALARS | st.text("re:.*()[]\\\\d+?mlp", max_size=8).map("re:{}".format)
RANGE_TEXTS = SCALARS | st.sampled_from(["0..2", "1..", "..3", "2..1", "..", "4"])
FILTERS = st.fixed_dictionaries(
    {"value": SCALARS | st.lists(SCALARS, max_size=3)}, optional={"filter": PATTERNS, "layers": RANGE_TEXTS}
)
SETTINGS = SCALARS | st.lists(SCALARS, max_size=4) | FILTERS | st.lists(FILTERS | SCALARS, max_size=3)
NAMES = st.sampled_from(["weight", "density", "t", "normalize", "lambda", "int8_mask", "rescale", "scale", "wieght"])
PARAMETERS = st.dictionaries(NAMES, SETTINGS, max_size=3) | SCALARS
REFERENCES = WORDS | SCALARS | st.fixed_dictionaries({"model": SCALARS | WORDS}, optional={"lora": SCALARS})
METHODS = st.sampled_from([*(method.name for method in BUILTIN.methods()), "average"])
NUMERICS = st.sampled_from([*BUILTIN.classes(), "mergekit-0.1.3"])
RANGES = st.lists(st.integers(-2, 8) | SCALARS, max_size=3) | SCALARS
MODELS = st.fixed_dictionaries({"model": REFERENCES}, optional={"parameters": PARAMETERS, "x": SCALARS})
SOURCES = st.fixed_dictionaries({"model": REFERENCES, "layer_range": RANGES}, optional={"parameters": PARAMETERS})
SLICES = st.fixed_dictionaries(
    {"sources": st.lists(SOURCES, max_size=2) | SCALARS},
    optional={
        "merge_method": METHODS | SCALARS,
        "base_model": REFERENCES,
        "parameters": PARAMETERS,
        "residual_weight": SCALARS,
    },
)
MERGES = st.fixed_dictionaries(
    {"merge_method": METHODS | SCALARS},
    optional={
        "models": st.lists(MODELS, max_size=3) | SCALARS,
        "slices": st.lists(SLICES, max_size=3) | SCALARS,
        "base_model": REFERENCES,
        "parameters": PARAMETERS,
        "dtype": st.sampled_from(["bfloat16", "float16", "int8", "bf16"]) | SCALARS,
        "tokenizer_source": SCALARS,
        "name": SCALARS,
        "keep": SCALARS,
        "allow_nan": SCALARS,
        "numerics": NUMERICS | SCALARS,
        "kind": st.just("merge") | SCALARS,
    },
)
ADAPTERS = st.fixed_dictionaries({"adapter": REFERENCES}, optional={"weight": SCALARS})
LORAS = st.fixed_dictionaries(
    {"kind": st.just("apply_lora"), "base": REFERENCES, "adapters": st.lists(ADAPTERS, max_size=2) | SCALARS}
)
STAGES = st.dictionaries(WORDS | st.text(max_size=4), MERGES | LORAS | SCALARS, max_size=3)
OWN = st.fixed_dictionaries(
    {"kittybuild": st.just(1) | SCALARS, "stages": STAGES | SCALARS},
    optional={
        "name": SCALARS,
        "numerics": NUMERICS | SCALARS,
        "allow_nan": SCALARS,
        "sources": st.dictionaries(WORDS, st.dictionaries(st.sampled_from(["path", "package", "file"]), SCALARS)),
        "defaults": st.dictionaries(st.sampled_from(["dtype", "out_dtype", "seed"]), SCALARS) | SCALARS,
        "outputs": st.dictionaries(WORDS, st.fixed_dictionaries({"folder": SCALARS}, optional={"shard_size": SCALARS})),
    },
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


def parsed(text: str) -> Recipe | None:
    """The recipe, or None after errors of ours, each of which says where it is."""
    try:
        return parse_recipe(text, "recipe.yml", BUILTIN.catalogue())
    except Problems as problems:
        found: tuple[KittybuildError, ...] = problems.errors
    except RecipeError as error:
        found = (error,)
    for error in found:
        assert isinstance(error, RecipeError)
        assert str(error.at).startswith("recipe.yml")
        assert error.code.startswith("KB1")
        assert len(error.message) < 2000
    return None


class TestGradients:
    @given(st.lists(NUMBERS, min_size=1, max_size=6), POSITIONS)
    def test_a_gradient_stays_between_its_least_and_its_largest_value(self, values: list[float], t: float) -> None:
        found = interpolate(values, t)
        assert isinstance(found, float)
        room = 1e-15 * max(map(abs, values))
        assert min(values) - room <= found <= max(values) + room

    @given(st.lists(NUMBERS, min_size=1, max_size=6))
    def test_it_begins_and_ends_with_its_ends(self, values: list[float]) -> None:
        assert (interpolate(values, 0.0), interpolate(values, 1.0)) == (values[0], values[-1])

    @given(st.lists(NUMBERS, min_size=2, max_size=6).map(sorted), POSITIONS, POSITIONS)
    def test_a_rising_one_rises(self, values: list[float], one: float, other: float) -> None:
        low, high = (interpolate(values, t) for t in sorted((one, other)))
        assert isinstance(low, float)
        assert isinstance(high, float)
        assert low <= high + 1e-9 * max(map(abs, values))

    @given(st.lists(st.booleans() | st.text(max_size=3), min_size=1, max_size=4), POSITIONS)
    def test_words_are_picked(self, values: list[bool | str], t: float) -> None:
        assert interpolate(values, t) in values

    @given(SETTINGS, st.text(max_size=5), st.none() | st.integers(0, 4), POSITIONS)
    def test_any_setting_has_a_value_of_its_kind_or_is_refused(
        self, setting: Any, tensor: str, layer: int | None, t: float
    ) -> None:
        param = Param("weight", float, "input", "", default=0.25)
        with suppress(ValueError, OverflowError, RecipeError):
            given = Given(tuple(parse_entry(item, NOWHERE) for _, item in entries(setting)))
            found = Lookup(param, [None, given]).resolve(tensor, layer, t)
            assert found is not None
            assert isinstance(found.value, float)


class TestRecipes:
    """Random mergekit-like data as YAML is a recipe or an error with a place, never a crash."""

    @given(st.lists(MERGES, min_size=1, max_size=2))
    @settings(max_examples=200)
    def test_mergekit_documents(self, documents: list[Any]) -> None:
        parsed(yaml.safe_dump_all(documents, sort_keys=False))

    @given(OWN)
    @settings(max_examples=200)
    def test_recipes_of_ours(self, recipe: Any) -> None:
        parsed(yaml.safe_dump(recipe, sort_keys=False))

    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
    def test_any_text(self, text: str) -> None:
        parsed(text)

    @given(st.text(st.sampled_from("ab:-?[]{},&*<#'\"|>!%@ \n\t12."), max_size=60))
    @settings(max_examples=200)
    def test_any_text_of_yamls_own_signs(self, text: str) -> None:
        parsed(text)

    @given(st.integers(0, 2000), st.sampled_from(["a", "\0", ":", "[", "é", "\n", "  "]))
    def test_a_recipe_with_one_place_changed(self, place: int, sign: str) -> None:
        place %= len(SOUND)
        parsed(SOUND[:place] + sign + SOUND[place + 1 :])

    @given(JSON)
    def test_json_is_read_as_the_same_data(self, value: Any) -> None:
        text = json.dumps(value)
        with suppress(RecipeError):
            for document in read_documents(text, "recipe.yml"):
                assert type(document.value) in (type(value), str, float)


SOUND = """\
kittybuild: 1
sources: {base: {path: models/base}}
stages:
  soup:
    merge_method: ties
    base_model: base
    models:
      - {model: a, parameters: {weight: 0.6, density: [0.5, 1]}}
      - {model: b+joy, parameters: {weight: [{filter: mlp, value: 0.25}, {value: 0.75}]}}
    parameters: {normalize: false}
outputs: {soup: {folder: out, shard_size: 1GB}}
"""


def test_the_sound_recipe_is_sound() -> None:
    recipe = parsed(SOUND)
    assert recipe is not None
    with pytest.raises(KeyError):
        stage_keys(recipe, ["soup"], {}, BUILTIN)


class TestNames:
    @given(st.lists(st.text(st.sampled_from("ab.019²٣é"), max_size=12)))
    def test_any_names_have_one_order(self, names: list[str]) -> None:
        ordered = sorted(set(names), key=natural)
        backwards = ordered[::-1]
        assert sorted(backwards, key=natural) == ordered

    @given(st.text(st.sampled_from("ab.019\n"), max_size=12), st.integers(0, 99))
    def test_a_layers_name_goes_there_and_back(self, name: str, index: int) -> None:
        layer = layer_of(name)
        if layer:
            moved = layer_of(layer.at(index))
            assert moved is not None
            assert (moved.stack, moved.index, moved.rest) == (layer.stack, index, layer.rest)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("source")


class TestSources:
    """Random and damaged files are checkpoints or SourceErrors, never a crash, and no range leaves its file."""

    @staticmethod
    def entries_fit(path: Path) -> None:
        with suppress(SourceError):
            for entry in read_safetensors(str(path)).values():
                assert 0 <= entry.offset <= entry.offset + entry.nbytes <= path.stat().st_size

    @given(st.binary(max_size=200))
    def test_any_bytes_as_safetensors(self, folder: Path, data: bytes) -> None:
        path = folder / "x.safetensors"
        path.write_bytes(data)
        self.entries_fit(path)

    @given(JSON, st.binary(max_size=16))
    def test_any_json_as_header(self, folder: Path, header: Any, data: bytes) -> None:
        path = folder / "x.safetensors"
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        self.entries_fit(path)

    INTEGERS = st.sampled_from([0, 1, 2, 4, 8, 16, -1, 1 << 40, 1 << 62, 1 << 64]) | st.integers() | st.booleans()
    ENTRY = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "U8", "BF16", "F4"]) | JSON,
            "shape": st.lists(INTEGERS, max_size=3) | JSON,
            "data_offsets": st.lists(INTEGERS, min_size=2, max_size=2) | JSON,
        }
    )

    @given(st.dictionaries(st.text(max_size=3), ENTRY, max_size=3), st.integers(0, 40))
    @settings(max_examples=200)
    def test_headers_that_are_nearly_right(self, folder: Path, header: Any, size: int) -> None:
        path = folder / "x.safetensors"
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
        self.entries_fit(path)

    @given(st.integers(0, 10**6), st.integers(0, 255))
    @settings(max_examples=200)
    def test_a_sound_file_with_one_byte_changed(self, folder: Path, place: int, value: int) -> None:
        data = bytearray(header_bytes(llama(layers=1)))
        data[place % (len(data) - 40_000 if len(data) > 50_000 else len(data))] = value
        path = folder / "x.safetensors"
        path.write_bytes(data)
        self.entries_fit(path)

    @given(st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()))
    def test_any_index_and_config(self, folder: Path, data: bytes) -> None:
        model = folder / "model"
        model.mkdir(exist_ok=True)
        (model / INDEX).write_bytes(data)
        (model / "config.json").write_bytes(data)
        with suppress(SourceError):
            read_folder(str(model))

    @given(st.dictionaries(st.text(max_size=4), st.text(max_size=8) | st.sampled_from(["a.safetensors", "../a"])))
    def test_any_weight_map(self, folder: Path, weight_map: dict[str, str]) -> None:
        model = folder / "mapped"
        model.mkdir(exist_ok=True)
        (model / "a.safetensors").write_bytes(header_bytes({"x": ("F32", (2,))}))
        write_json(model / INDEX, {"weight_map": weight_map})
        with suppress(SourceError):
            assert set(read_folder(str(model)).entries) == set(weight_map) == {"x"}

    WORDS = st.sampled_from(["peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias"])
    CONFIG = st.dictionaries(WORDS, JSON | st.just("LORA"), max_size=6)

    @given(st.binary(max_size=60) | CONFIG.map(lambda value: json.dumps({"peft_type": "LORA", **value}).encode()))
    @settings(max_examples=200)
    def test_any_adapter_config(self, folder: Path, data: bytes) -> None:
        adapter = folder / "adapter"
        adapter.mkdir(exist_ok=True)
        factors = {"m.q.lora_A.weight": ("F32", (2, 4)), "m.q.lora_B.weight": ("F32", (4, 2))}
        (adapter / "adapter_model.safetensors").write_bytes(header_bytes(factors))
        (adapter / "adapter_config.json").write_bytes(data)
        with suppress(SourceError):
            (pair,) = read_adapter(read_adapter_folder(str(adapter))).modules.values()
            assert abs(pair.scale) < 1e31
