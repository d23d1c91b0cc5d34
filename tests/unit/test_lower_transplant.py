"""What a transplant is lowered to: a derivation a table, what its key is made of, and the config of the output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kittybuild.builders.registry import BUILTIN
from kittybuild.model.derivation import KITTY_1, Derivation
from kittybuild.model.plan import StagePlan
from kittybuild.model.rows import RowMap
from kittybuild.planner.lower import lower
from kittybuild.planner.machine import Machine
from kittybuild.planner.targets import targets
from kittybuild.planner.views import locate, open_all, source_names
from tests.helpers import load_tensors, save_tensors
from tests.planning import found, parse
from tests.surgery import EMBEDDING, HEAD, tokenizers, write
from tests.tokenizers import files_of, word_level

MACHINE = Machine("2.0", "1.26", "AVX2")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        write(tmp_path, name, tokenizers()[name])
    return tmp_path


def planned(folder: Path, machine: Machine | None = MACHINE, **options: Any) -> StagePlan:
    """The plan of a stage with these options."""
    given = {"model": folder / "one", "donor": folder / "two", "approximation_method": "mean", **options}
    lines = "".join(f", {key}: {value}" for key, value in given.items())
    recipe = parse(f"{{kittybuild: 1, stages: {{out: {{kind: transplant_tokenizer{lines}}}}}}}")
    sources = open_all(locate(recipe, source_names(recipe)))
    return lower(recipe, targets(recipe, ()), sources, BUILTIN, machine).stages["out"]


def table(plan: StagePlan, name: str = EMBEDDING) -> Derivation:
    step = plan.steps[name]
    assert isinstance(step, Derivation)
    return step


def test_only_tables_are_made_and_with_the_other_rows(models: Path) -> None:
    plan = planned(models)
    assert set(plan.derivations) == {EMBEDDING, HEAD}
    assert {step.spec.shape for step in plan.derivations.values()} == {(279, 32)}
    assert RowMap.parse(table(plan).params["rows"]).count == 279


@pytest.mark.parametrize(
    ("options", "builder", "numerics", "inputs"),
    [
        ({"approximation_method": "mean"}, "mean", KITTY_1, 1),
        ({"approximation_method": "mean", "magikarp": "true"}, "mean", KITTY_1, 2),
        ({"approximation_method": "common_interpolation"}, "common_interpolation", KITTY_1, 2),
        ({"approximation_method": "omp"}, "omp", "kitty-1;numpy 1.26 AVX2", 2),
        (
            {"approximation_method": "common_interpolation", "weight_scheme": "barycentric"},
            "fitted_interpolation",
            "kitty-1;numpy 1.26 AVX2",
            2,
        ),
    ],
)
def test_a_key_names_the_machine_where_bits_depend_on_it(
    models: Path, options: dict[str, str], builder: str, numerics: str, inputs: int
) -> None:
    drv = table(planned(models, **options))
    assert (drv.builder, drv.numerics, len(drv.inputs)) == (f"transplant_{builder}", numerics, inputs)


def test_a_key_holds_only_what_changes_the_bits(models: Path) -> None:
    plain = table(planned(models)).params
    assert set(plain) == {"rows", "anchors"}
    assert table(planned(models, k=7, subword_method="sum", cosine_similarity="true")).params == plain
    assert set(table(planned(models, new_vocab_noise=0.1)).params) == {"rows", "anchors", "noise", "seed", "tensor"}
    many = table(planned(models, approximation_method="omp", k=100_000)).params
    assert many["k"] == len(list(RowMap.parse(many["anchors"]).rows()))


def test_matches_are_for_the_side_that_is_named(models: Path) -> None:
    plain = planned(models)
    for side, name in (("embed", EMBEDDING), ("lm_head", HEAD)):
        changed = planned(models, prefix_match=side)
        differing = [n for n in (EMBEDDING, HEAD) if table(changed, n).params["rows"] != table(plain, n).params["rows"]]
        assert differing == [name]
        assert table(changed, name).params["anchors"] == table(plain, name).params["anchors"]
    assert all(
        table(planned(models, prefix_match="yes"), n).params["rows"] != table(plain, n).params["rows"]
        for n in (EMBEDDING, HEAD)
    )


def test_a_biass_known_rows_are_copied_and_the_others_zero(models: Path) -> None:
    tensors = load_tensors(models / "one")
    save_tensors(models / "one" / "model.safetensors", {**tensors, "lm_head.bias": torch.ones(len(tensors[HEAD]))})
    drv = table(planned(models), "lm_head.bias")
    assert (drv.builder, drv.spec.shape) == ("rows", (279,))
    assert () in set(RowMap.parse(drv.params["rows"]).rows())


def test_the_config_is_the_models_but_for_rows_and_special_tokens(tmp_path: Path) -> None:
    nested = {"text_config": {"eos_token_id": 5, "width": 7}, "image_token_id": 9}
    ours = write(tmp_path, "one", tokenizers()["one"], **nested)
    theirs = write(tmp_path, "two", tokenizers()["two"])
    config = planned(tmp_path).config
    assert config is not None
    assert ours.rows != theirs.rows == config["vocab_size"]
    assert config["eos_token_id"] == config["text_config"]["eos_token_id"] == theirs.ids["<end>"]
    assert (config["text_config"]["width"], config["image_token_id"], config["pad_token_id"]) == (7, 9, None)


def test_tokenizers_without_a_common_token_are_an_error_where_it_matters(models: Path) -> None:
    write(models, "two", files_of(word_level(["eins", "zwei"], ["<mm>"])))
    assert [code for code, _ in found(lambda: planned(models, approximation_method="omp"))] == ["KB341"]
    assert table(planned(models, approximation_method="subword")).params["anchors"] == ""


def test_rows_are_turned_as_both_configs_say(models: Path) -> None:
    write(models, "two", tokenizers()["two"], rope_theta=None, rope_parameters={"rope_theta": 500.0})
    params = table(planned(models, approximation_method="mp_rope")).params
    assert (params["heads"], params["bases"]) == ([4, 4], [500.0, 10_000.0])
    write(models, "two", tokenizers()["two"], num_attention_heads=5)
    problems = found(lambda: planned(models, approximation_method="mp_rope"))
    assert [code for code, _ in problems] == ["KB342"]
