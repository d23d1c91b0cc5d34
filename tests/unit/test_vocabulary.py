"""Merges of models with tokenizers as they are planned: which tables are gathered, from what, and what is told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from kittybuild.errors import KittybuildError, Problems
from kittybuild.model.derivation import Derivation, SourceTensor, StageTensor
from kittybuild.model.plan import Plan
from kittybuild.model.recipe import ModelRef
from kittybuild.planner.machine import Machine
from kittybuild.planner.views import open_all
from kittybuild.planner.vocabulary import table_rows, tables_stage
from tests.helpers import llama_config, write_json
from tests.planning import Header, llama, planned, step, write_header
from tests.tokenizers import Files, byte_level, files_of, write_files

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
FEW = files_of(byte_level(["Ġthe"], ["<s>", "</s>"]), {"eos_token": "</s>"})
MORE = files_of(byte_level(["Ġthe"], ["<s>", "</s>", "<im>"]), {"eos_token": "</s>"})
SIZES = {"few": (FEW, 261), "more": (MORE, 262)}
LINEAR = """
    merge_method: linear
    models:
      - {model: few, parameters: {weight: 0.5}}
      - {model: more, parameters: {weight: 0.5}}
"""


def made(folder: Path, text: str, models: Mapping[str, tuple[Files, int]] = SIZES, **headers: Header) -> Plan:
    """The plan for models with these tokenizers and numbers of rows; `headers` in place of a Llama's."""
    everything = {name: headers.get(name) or llama(vocab=rows) for name, (_, rows) in models.items()}
    for name, (files, _) in models.items():
        write_files(folder / name, files)
    return planned(folder, everything, text, machine=Machine("2.9.1", "2.3.0", "AVX2"))


def problems_of(
    folder: Path, text: str, models: Mapping[str, tuple[Files, int]] = SIZES, **headers: Header
) -> list[str]:
    """What is wrong, by code and first line."""
    with pytest.raises(KittybuildError) as caught:
        made(folder, text, models, **headers)
    errors = caught.value.errors if isinstance(caught.value, Problems) else (caught.value,)
    return [f"{error.code}: {error.message.splitlines()[0]}" for error in errors]


def test_only_tables_that_change_are_gathered_and_fused(tmp_path: Path) -> None:
    plan = made(tmp_path, f"{LINEAR}    tokenizer_source: union\n")
    assert list(plan.stages) == ["merge/tables of few", "merge"]
    tables = plan.stages[tables_stage("merge", ModelRef("few"))]
    assert (tables.keep, tables.kind, sorted(tables.steps)) == (False, "rows", [HEAD, EMBED])
    gathered = tables.derivations[EMBED]
    assert gathered.params == {"axis": 0, "rows": "261:0.0 1:1.261"}
    assert [(given.source, given.name) for given in gathered.inputs if isinstance(given, SourceTensor)] == [
        ("few", EMBED),
        ("more", EMBED),
    ]
    merged = step(plan, EMBED).inputs
    assert (merged[0], merged[1].spec.shape) == (StageTensor(tables.name, EMBED, gathered.output), (262, 32))
    assert isinstance(merged[1], SourceTensor)
    assert all(isinstance(given, SourceTensor) for given in step(plan, NORM).inputs)
    assert plan.stages["merge"].config == {**(plan.stages["merge"].config or {}), "vocab_size": 262}


def test_models_of_one_tokenizer_are_merged_as_they_are(tmp_path: Path) -> None:
    plan = made(tmp_path, f"{LINEAR}    tokenizer_source: base\n", {"few": (FEW, 264), "more": (FEW, 264)})
    assert list(plan.stages) == ["merge"]
    assert plan.stages["merge"].files == {}


def test_equal_files_are_never_looked_into(tmp_path: Path) -> None:
    broken = {"tokenizer.json": b"{"}
    assert made(tmp_path, LINEAR, {"few": (broken, 64), "more": (broken, 64)}).notes == ()


def test_a_tokenizer_that_cannot_be_read_is_a_note_where_nobody_asked_for_it(tmp_path: Path) -> None:
    models = {"few": (FEW, 261), "more": ({"tekken.json": b"{}"}, 261)}
    (note,) = made(tmp_path, LINEAR, models).notes
    assert "the tokenizer of more is not compared with others" in note
    assert problems_of(tmp_path, f"{LINEAR}    tokenizer_source: union\n", models)[0].startswith("KB241")


def test_unequal_tokens_are_one_problem_among_all(tmp_path: Path) -> None:
    header = {name: spec for name, spec in llama(vocab=262).items() if name != NORM}
    found = problems_of(tmp_path, LINEAR, more=header)
    assert [problem[:5] for problem in found] == ["KB330", "KB302"]


def test_tokens_without_rows_and_rows_without_tokens_are_no_difference(tmp_path: Path) -> None:
    assert list(made(tmp_path, LINEAR, {"few": (FEW, 261), "more": (MORE, 261)}).stages) == ["merge"]
    assert problems_of(tmp_path / "b", LINEAR, {"few": (FEW, 264), "more": (MORE, 264)})[0].startswith("KB330")


def test_without_any_tokenizer_only_truncate_and_base_have_a_meaning(tmp_path: Path) -> None:
    models: dict[str, tuple[Files, int]] = {"few": ({}, 64), "more": ({}, 80)}
    plan = made(tmp_path, f"{LINEAR}    tokenizer_source: truncate\n", models)
    assert plan.stages["merge/tables of more"].derivations[HEAD].params == {"axis": 0, "rows": "64:0.0"}
    for word in ("union", "base"):
        (found,) = problems_of(tmp_path, f"{LINEAR}    tokenizer_source: {word}\n", models)
        assert found == "KB332: few has no tokenizer"
    same = made(tmp_path / "same", f"{LINEAR}    tokenizer_source: base\n", {"few": ({}, 64), "more": ({}, 64)})
    assert list(same.stages) == ["merge"]


def test_a_bias_and_a_table_on_its_side_are_gathered_on_the_axis_of_the_tokens(tmp_path: Path) -> None:
    headers = {}
    for name, (_, rows) in SIZES.items():
        more = {"lm_head.bias": ("F32", (rows,)), "proj.weight": ("F32", (48, rows))}
        headers[name] = {**llama(vocab=rows), **more}
    plan = made(tmp_path, f"{LINEAR}    tokenizer_source: union\n", **headers)
    steps = plan.stages["merge/tables of few"].derivations
    assert {name: (drv.params["axis"], drv.output.shape) for name, drv in steps.items()} == {
        EMBED: (0, (262, 32)),
        HEAD: (0, (262, 32)),
        "lm_head.bias": (0, (262,)),
        "proj.weight": (1, (48, 262)),
    }


def test_tables_of_another_width_are_refused(tmp_path: Path) -> None:
    wide = {**llama(vocab=262), EMBED: ("BF16", (262, 48))}
    found = problems_of(tmp_path, f"{LINEAR}    tokenizer_source: union\n", more=wide)
    assert found[0] == f"KB301: {EMBED} of more is BF16[262, 48]: rows of it cannot go into BF16[261, 32]"


def test_a_config_that_is_wrong_about_its_rows_does_not_lead_astray(tmp_path: Path) -> None:
    write_header(
        tmp_path / "few", llama(vocab=261), llama_config(layers=2, width=16, vocab=300, tie=False, dtype="float32")
    )
    for name, (files, _) in SIZES.items():
        write_files(tmp_path / name, files)
    write_header(tmp_path / "more", llama(vocab=262))
    sources = open_all({name: str(tmp_path / name) for name in SIZES})
    assert [table_rows(sources.view(name)) for name in SIZES] == [261, 262]


def test_ids_follow_their_tokens_and_one_without_is_told(tmp_path: Path) -> None:
    write_files(tmp_path / "few", {})
    write_json(tmp_path / "few/generation_config.json", {"eos_token_id": 260, "bos_token_id": 259, "top_k": 5})
    other = files_of(byte_level(["Ġthe", "ing"], ["<b>", "</s>"]), {"eos_token": "</s>"})
    plan = made(tmp_path, f"{LINEAR}    tokenizer_source: more\n", {"few": (FEW, 261), "more": (other, 263)})
    generation = plan.stages["merge"].files["generation_config.json"]
    assert generation is not None
    assert json.loads(generation) == {"eos_token_id": 262, "bos_token_id": 259, "top_k": 5}
    assert [note for note in plan.notes if "bos_token_id is that of few, whose token the output lacks" in note]
    assert plan.stages["merge"].files["tokenizer.json"] == other["tokenizer.json"]


@pytest.mark.parametrize(("numerics", "code"), [("mergekit-0.1.5", "KB301"), ("kitty-1", "KB330")])
def test_in_a_peer_s_class_shapes_alone_decide(tmp_path: Path, numerics: str, code: str) -> None:
    assert problems_of(tmp_path, f"{LINEAR}    numerics: {numerics}\n")[0].startswith(code)


def test_every_gather_is_of_rows_of_its_inputs(tmp_path: Path) -> None:
    plan = made(tmp_path, f"{LINEAR}    tokenizer: {{source: union, pad_to_multiple_of: 100}}\n")
    for stage in (name for name in plan.stages if "/tables of " in name):
        for name, drv in plan.stages[stage].steps.items():
            assert isinstance(drv, Derivation)
            assert (drv.builder, drv.output.shape[0]) == ("rows", 300), name
