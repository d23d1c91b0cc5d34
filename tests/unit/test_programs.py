"""The programs of mergekit as recipes: what their arguments become, before anything is built."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import yaml

from kittybuild.builders.registry import BUILTIN
from kittybuild.model.recipe import (
    ApplyLoraStage,
    Decomposition,
    ExtractLoraStage,
    MergeStage,
    Rank,
    Recipe,
    TransplantStage,
)
from kittybuild.recipe.parse import parse_recipe
from kittybuild.recipe.programs import (
    PLAIN,
    Extract,
    Legacy,
    Settings,
    apply_lora_text,
    extract_lora_text,
    merge_text,
    multi_text,
    peer_size,
    pytorch_text,
    shuffled,
    transplant_text,
)

TEXT = """# a soup
merge_method: linear
models:
  - {model: a, parameters: {weight: 0.5, t: 1}}
  - {model: b, parameters: {weight: 0.5}}
"""
CONFIG = yaml.safe_load(TEXT)


def read(text: str) -> Recipe:
    return parse_recipe(text, "soup.recipe", BUILTIN.catalogue())


def test_a_configuration_is_its_own_recipe() -> None:
    assert merge_text(TEXT, CONFIG, "out", PLAIN) == TEXT


def test_an_option_that_counts_stands_in_the_recipe() -> None:
    recipe = read(merge_text(TEXT, CONFIG, "out", Settings(seed=7, shard_size=5000)))
    assert (recipe.seed, recipe.outputs["merge"].folder, recipe.outputs["merge"].shard_size) == (7, "out", 5000)


def test_the_merge_is_the_same_with_and_without_options() -> None:
    plain, lowered = read(TEXT), read(merge_text(TEXT, CONFIG, "out", Settings(seed=7)))
    assert lowered.stages["merge"] == plain.stages["merge"]
    assert any("'t'" in note for note in lowered.notes), "a word without effect stays a note"


def test_vocabularies_are_cut_only_where_no_tokenizer_is_named() -> None:
    cut = Settings(truncate=True)
    assert yaml.safe_load(merge_text(TEXT, CONFIG, "out", cut))["stages"]["merge"]["tokenizer_source"] == "truncate"
    union = CONFIG | {"tokenizer": {"source": "union"}}
    assert "truncate" not in merge_text(TEXT, union, "out", cut)


@pytest.mark.parametrize(("text", "size"), [("5B", 5_000_000_000), ("500m", 500_000_000), ("20K", 20_000), ("7", 7)])
def test_sizes_are_the_peers(text: str, size: int) -> None:
    assert peer_size(text) == size


@pytest.mark.parametrize("text", ["", "B", "-1", "0", "5 parsecs"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        peer_size(text)


def test_documents_become_stages_that_name_each_other() -> None:
    second = {"merge_method": "slerp", "base_model": "c", "models": [{"model": "one"}], "parameters": {"t": 0.5}}
    recipe = read(multi_text([CONFIG | {"name": "one"}, second], {"one": "mid/one", "merge": "out"}, PLAIN))
    assert list(recipe.stages) == ["one", "merge"]
    assert {name: out.folder for name, out in recipe.outputs.items()} == {"one": "mid/one", "merge": "out"}


@pytest.mark.parametrize("tensors", ["same", "intersection", "union"])
def test_files_of_tensors_are_a_state_dict(tensors: str) -> None:
    stage = read(pytorch_text(CONFIG, tensors, "out", PLAIN)).stages["merge"]
    assert isinstance(stage, MergeStage)
    assert (stage.kind, stage.tensors) == ("state_dict", tensors)


def test_a_transplant_has_the_options_that_are_given() -> None:
    stage = read(transplant_text("a", "b", {"k": 8, "magikarp": True}, "out", PLAIN)).stages["transplant"]
    assert isinstance(stage, TransplantStage)
    assert (stage.approximation.k, stage.approximation.magikarp) == (8, True)
    assert stage.approximation.approximation_method == "omp"


def test_an_adapter_is_applied_once() -> None:
    stage = read(apply_lora_text("a", "lora", "out", PLAIN)).stages["applied"]
    assert isinstance(stage, ApplyLoraStage)
    assert [(use.adapter.model, use.weight) for use in stage.adapters] == [("lora", 1.0)]


def extraction(**given: Any) -> ExtractLoraStage:
    stage = read(extract_lora_text(Extract("tuned", "base", 16, **given), "out", PLAIN)).stages["extracted"]
    assert isinstance(stage, ExtractLoraStage)
    return stage


def test_an_extraction_takes_what_each_matrix_has() -> None:
    plain = extraction()
    assert (plain.model.model, plain.base.model, plain.embeddings, plain.others) == ("tuned", "base", "save", "save")
    assert plain.decomposition == Decomposition(Rank(16, exact=False))


def test_an_extraction_has_the_options_that_are_given() -> None:
    told = extraction(
        epsilon=0.5,
        svd="randomized",
        distribute_scale=False,
        embed_lora=True,
        saved=("lm_head",),
        include=("mlp", "attn"),
        exclude=("down",),
        skip_undecomposable=True,
    )
    assert told.decomposition.rank == Rank(16, exact=False, threshold=0.5)
    assert told.decomposition.iterations is not None
    assert not told.decomposition.distribute
    assert (told.include, told.exclude, told.saved) == (("mlp", "attn"), ("down",), ("lm_head",))
    assert (told.embeddings, told.others) == ("lora", "leave")


# ---- legacy


def parameters(**given: Any) -> list[Any]:
    return [use.get("parameters") for use in Legacy(("a", "b"), base="c", **given).config()["models"]]


def test_weights_and_densities_go_by_position_and_one_counts_for_all() -> None:
    found = parameters(weights=(0.25, 0.75), densities=(0.5,))
    assert found == [{"density": 0.5, "weight": 0.25}, {"density": 0.5, "weight": 0.75}]
    assert parameters() == [None, None]


def test_numbers_that_do_not_go_by_the_models_are_refused() -> None:
    with pytest.raises(ValueError, match="3 values of weight for 2 models"):
        parameters(weights=(1.0, 2.0, 3.0))


def test_the_weight_of_slerp_is_its_t() -> None:
    config = Legacy(("a",), "slerp", "c", weights=(0.3,)).config()
    assert config["parameters"] == {"t": 0.3}
    assert "parameters" not in config["models"][0]


@pytest.mark.parametrize("method", ["ties", "linear", "slerp", "task_arithmetic"])
def test_a_legacy_configuration_is_a_recipe(method: str) -> None:
    config = Legacy(("a",), method, "c", (0.5,), (0.7,), normalize=False, int8_mask=True, bfloat16=True).config()
    stage = read(multi_text([config], {"merge": "out"}, PLAIN)).stages["merge"]
    assert isinstance(stage, MergeStage)
    assert stage.dtype is not None
    assert stage.dtype.torch_name == "bfloat16"


# ---- layershuffle


def layers(config: dict[str, Any]) -> list[tuple[str, int]]:
    return [
        (source["model"], layer)
        for part in config["slices"]
        for source in part["sources"]
        for layer in range(*source["layer_range"])
    ]


def test_layers_stay_in_their_place_and_only_their_model_is_drawn() -> None:
    found = layers(shuffled({"a": 40, "b": 40}, [1, 3], 5, full=False))
    assert [layer for _, layer in found] == list(range(40))
    assert 20 < Counter(model for model, _ in found)["b"] < 40


def test_the_seed_decides() -> None:
    models = {"a": 40, "b": 40}
    assert shuffled(models, [1, 1], 5, full=True) == shuffled(models, [1, 1], 5, full=True)
    assert shuffled(models, [1, 1], 5, full=True) != shuffled(models, [1, 1], 6, full=True)


def test_neighbours_of_one_model_are_one_slice() -> None:
    config = shuffled({"a": 6, "b": 6}, [1, 0], 1, full=False)
    assert config["slices"] == [{"sources": [{"model": "a", "layer_range": [0, 6]}]}]
    drawn = shuffled({"a": 40, "b": 40}, [1, 1], 5, full=False)["slices"]
    assert all(a["sources"][0]["model"] != b["sources"][0]["model"] for a, b in pairwise(drawn))


def test_a_layer_that_only_one_model_has_is_taken_from_it() -> None:
    assert layers(shuffled({"a": 2, "b": 5}, [9, 1], 1, full=False))[2:] == [("b", 2), ("b", 3), ("b", 4)]


def test_full_random_takes_each_models_part_of_its_layers_once() -> None:
    found = layers(shuffled({"a": 10, "b": 20}, [0.5, 0.25], 3, full=True))
    assert Counter(model for model, _ in found) == {"a": 5, "b": 5}
    assert len(set(found)) == 10
    assert found != sorted(found)
    assert max(layer for model, layer in found if model == "b") > 5, "of all its layers"


@pytest.mark.parametrize("weights", [[1], [1, -1], [0, 0]])
def test_weights_that_draw_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="--weight"):
        shuffled({"a": 2, "b": 2}, weights, 1, full=False)
