"""Merge stages lowered to derivations: which inputs, which parameters, which names; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kittybuild.model.derivation import Derivation, SourceTensor
from kittybuild.tensors import DType, TensorSpec
from tests.helpers import llama_config
from tests.planning import Header, errors_of, found, llama, planned, step, write_header

Q0 = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
EMBED = "model.embed_tokens.weight"
AB = {"a": llama(), "b": llama()}
ABBASE = {**AB, "base": llama()}


def sources(made: Derivation) -> list[str]:
    return [given.source for given in made.inputs if isinstance(given, SourceTensor)]


def names(made: Derivation) -> list[str]:
    return [given.name for given in made.inputs]


class TestModels:
    """`models:` are one slice of all layers of each."""

    def test_every_tensor_of_the_model_is_made(self, tmp_path: Path) -> None:
        plan = planned(
            tmp_path, AB, "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 0.5}"
        )
        stage = plan.stages["merge"]
        assert list(stage.steps)[:2] == [HEAD, EMBED]
        assert set(stage.steps) == set(llama())
        made = step(plan, Q0)
        assert (made.builder, sources(made), names(made)) == ("linear", ["a", "b"], [Q0, Q0])
        assert made.params == {"weight": [0.5, 0.5], "normalize": True}
        assert made.output == TensorSpec(DType.BF16, (32, 32))
        assert plan.notes == ()

    def test_a_base_that_is_not_listed_is_appended(self, tmp_path: Path) -> None:
        text = "merge_method: linear\nbase_model: base\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}"
        assert sources(step(planned(tmp_path, ABBASE, text), Q0)) == ["a", "b", "base"]

    def test_a_base_that_is_listed_stays_where_it_stands(self, tmp_path: Path) -> None:
        text = "merge_method: linear\nbase_model: base\nmodels: [{model: base}, {model: a}]\nparameters: {weight: 1}"
        assert sources(step(planned(tmp_path, ABBASE, text), Q0)) == ["base", "a"]

    def test_methods_on_differences_take_the_base_first_and_its_weight_never(self, tmp_path: Path) -> None:
        text = """\
        merge_method: ties
        base_model: base
        models:
          - {model: b, parameters: {weight: 0.2, density: 0.5}}
          - {model: base}
          - {model: a, parameters: {weight: 0.1}}
        """
        made = step(planned(tmp_path, ABBASE, text), Q0)
        assert sources(made) == ["base", "b", "a"]
        shared = {"normalize": True, "lambda": 1.0, "rescale": "none"}
        assert made.params == {"weight": [0.2, 0.1], "density": [0.5, 1.0], **shared}

    def test_the_base_is_where_slerp_begins(self, tmp_path: Path) -> None:
        text = "merge_method: slerp\nbase_model: b\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.25}"
        made = step(planned(tmp_path, AB, text), Q0)
        assert (sources(made), made.params) == (["b", "a"], {"t": 0.25, "weight": [None], "base": True})

    def test_without_models_of_its_own_the_base_comes_out(self, tmp_path: Path) -> None:
        text = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: base}]"
        made = step(planned(tmp_path, ABBASE, text), Q0)
        assert (sources(made), made.params["weight"]) == (["base"], [])


class TestPositions:
    """Gradients run over the layers of a slice; what stands outside the layers is at 0, as in mergekit 0.1.5."""

    TEXT = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: [0, 0.5, 1]}"

    def test_over_the_whole_model(self, tmp_path: Path) -> None:
        plan = planned(tmp_path, {"a": llama(layers=5), "b": llama(layers=5)}, self.TEXT)
        ts = [step(plan, f"model.layers.{layer}.mlp.up_proj.weight").params["t"] for layer in range(5)]
        assert ts == [0.0, 0.25, 0.5, 0.75, 1.0]
        assert [step(plan, name).params["t"] for name in (EMBED, NORM, HEAD)] == [0.0, 0.0, 0.0]

    def test_a_single_layer_is_the_last(self, tmp_path: Path) -> None:
        plan = planned(tmp_path, {"a": llama(layers=1), "b": llama(layers=1)}, self.TEXT)
        assert step(plan, Q0).params["t"] == 1.0

    def test_each_slice_counts_for_itself(self, tmp_path: Path) -> None:
        text = """\
        merge_method: slerp
        base_model: a
        parameters: {t: [0, 1]}
        slices:
          - sources: [{model: a, layer_range: [0, 3]}, {model: b, layer_range: [0, 3]}]
          - sources: [{model: a, layer_range: [3, 4]}, {model: b, layer_range: [3, 4]}]
        """
        plan = planned(tmp_path, {"a": llama(layers=4), "b": llama(layers=4)}, text)
        ts = [step(plan, f"model.layers.{layer}.mlp.up_proj.weight").params["t"] for layer in range(4)]
        assert ts == [0.0, 0.5, 1.0, 1.0]

    def test_each_stack_counts_for_itself(self, tmp_path: Path) -> None:
        header: Header = {
            f"{stack}.{layer}.w": ("F32", (2,)) for stack, n in (("enc", 2), ("dec", 3)) for layer in range(n)
        }
        plan = planned(tmp_path, {"a": header, "b": header}, self.TEXT)
        assert [step(plan, name).params["t"] for name in ("enc.0.w", "enc.1.w", "dec.1.w")] == [0.0, 1.0, 0.5]


class TestParameters:
    def test_the_four_levels(self, tmp_path: Path) -> None:
        text = """\
        merge_method: linear
        parameters: {weight: 4}
        slices:
          - sources:
              - {model: a, layer_range: [0, 2], parameters: {weight: [{filter: q_proj, value: 1}]}}
              - {model: b, layer_range: [0, 2]}
            parameters: {weight: [{filter: layers.1, value: 2}], normalize: false}
        """
        plan = planned(tmp_path, AB, text)
        assert step(plan, Q0).params == {"weight": [1.0, 4.0], "normalize": False}
        assert step(plan, Q0.replace("layers.0", "layers.1")).params["weight"] == [1.0, 2.0]
        assert step(plan, NORM).params == {"weight": [4.0, 4.0], "normalize": False}

    def test_filters_see_a_models_own_names_for_its_parameters_and_the_outputs_for_shared_ones(
        self, tmp_path: Path
    ) -> None:
        text = """\
        merge_method: linear
        parameters:
          weight: [{filter: layers.0.mlp, value: 2}, {value: 1}]
          normalize: [{filter: layers.3.mlp, value: false}]
        slices:
          - sources: [{model: a, layer_range: [0, 2]}]
          - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [1, 3]}]
        """
        plan = planned(tmp_path, {"a": llama(layers=3), "b": llama(layers=3)}, text)
        params = [step(plan, f"model.layers.{layer}.mlp.up_proj.weight").params for layer in range(4)]
        assert [(found["weight"], found["normalize"]) for found in params] == [
            ([2.0], True),
            ([1.0], True),
            ([2.0, 1.0], True),
            ([1.0, 1.0], False),
        ]
        assert plan.notes == ()

    def test_values_are_of_their_parameters_type(self, tmp_path: Path) -> None:
        text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\nparameters: {normalize: 'no'}"
        params = step(planned(tmp_path, AB, text), Q0).params
        assert params == {"weight": [1.0], "normalize": False}
        assert type(params["weight"][0]) is float

    def test_words_without_effect_take_no_part(self, tmp_path: Path) -> None:
        text = """\
        merge_method: task_arithmetic
        base_model: base
        parameters: {int8_mask: true}
        models: [{model: a, parameters: {weight: 1, density: 0.5}}]
        """
        plan = planned(tmp_path, ABBASE, text)
        assert set(step(plan, Q0).params) == {"weight", "normalize", "lambda"}
        assert len(plan.notes) == 2

    def test_a_filter_that_takes_nothing_is_noted(self, tmp_path: Path) -> None:
        text = """\
        merge_method: linear
        models:
          - {model: a, parameters: {weight: [{filter: self_atn, value: 0}, {value: 1}]}}
          - {model: b, parameters: {weight: [{filter: attn, value: 0}, {filter: q_proj, value: 2}, {value: 1}]}}
        parameters: {normalize: [{filter: mpl, value: false}]}
        """
        notes = [note.removeprefix(f"{tmp_path}/") for note in planned(tmp_path, AB, text).notes]
        assert notes == [
            "recipe.yml:5:26: the filter 'mpl' of 'normalize' takes no tensor",
            "recipe.yml:3:38: the filter 'self_atn' of 'weight' takes no tensor",
            "recipe.yml:4:64: the filter 'q_proj' of 'weight' takes no tensor",
        ]

    def test_a_missing_weight_is_told_once_for_each_model(self, tmp_path: Path) -> None:
        text = (
            "merge_method: linear\nbase_model: base\nmodels:\n  - {model: a}\n  - {model: b, parameters: {weight: 1}}"
        )
        errors = errors_of(planned, tmp_path, ABBASE, text)
        assert [(error.code, error.message) for error in errors] == [
            ("KB115", "linear needs the parameter 'weight' of a"),
            ("KB115", "linear needs the parameter 'weight' of base"),
        ]

    def test_a_missing_shared_parameter_is_told_once(self, tmp_path: Path) -> None:
        text = "merge_method: nearswap\nbase_model: a\nmodels: [{model: b}]"
        (error,) = errors_of(planned, tmp_path, AB, text)
        assert (error.code, error.message) == ("KB115", "nearswap needs the parameter 't'")


class TestSlices:
    STACKED = """\
    merge_method: passthrough
    slices:
      - sources: [{model: a, layer_range: [0, 2]}]
      - sources: [{model: b, layer_range: [1, 3]}]
      - sources: [{model: a, layer_range: [0, 1]}]
    """

    def test_layers_are_numbered_on_and_the_ends_come_from_the_ends(self, tmp_path: Path) -> None:
        steps = planned(tmp_path, {"a": llama(layers=3), "b": llama(layers=3)}, self.STACKED).stages["merge"].steps
        taken = [steps[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(5)]
        assert [(given.source, given.name.split(".")[2]) for given in taken if isinstance(given, SourceTensor)] == [
            ("a", "0"),
            ("a", "1"),
            ("b", "1"),
            ("b", "2"),
            ("a", "0"),
        ]
        assert len(steps) == 5 * 9 + 3
        outer = [steps[name] for name in (EMBED, NORM, HEAD)]
        assert [given.source for given in outer if isinstance(given, SourceTensor)] == ["a", "a", "a"]

    def test_embeddings_come_from_the_first_slice_and_the_head_from_the_last(self, tmp_path: Path) -> None:
        text = """\
        merge_method: passthrough
        slices:
          - sources: [{model: a, layer_range: [0, 1]}]
          - sources: [{model: b, layer_range: [1, 2]}]
        """
        steps = planned(tmp_path, AB, text).stages["merge"].steps
        taken = {name: steps[name] for name in (EMBED, NORM, HEAD)}
        assert {name: given.source for name, given in taken.items() if isinstance(given, SourceTensor)} == {
            EMBED: "a",
            NORM: "b",
            HEAD: "b",
        }

    def test_the_config_follows(self, tmp_path: Path) -> None:
        plan = planned(tmp_path, {"a": llama(layers=3), "b": llama(layers=3)}, self.STACKED)
        config = plan.stages["merge"].config
        assert config is not None
        assert config["num_hidden_layers"] == 5

    def test_a_config_without_a_number_to_change_is_noted(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            write_header(tmp_path / name, llama(layers=3), {"blocks": 3})
        note = planned(tmp_path, {}, self.STACKED).notes[-1].partition(": ")[2]
        assert note == ("the config.json of a names no number of 3 layers that could become 5: change it by hand")

    def test_shifted_ranges_pair_layer_with_layer(self, tmp_path: Path) -> None:
        text = """\
        merge_method: linear
        parameters: {weight: 1}
        slices:
          - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [1, 3]}]
        """
        plan = planned(tmp_path, {"a": llama(layers=3), "b": llama(layers=3)}, text)
        assert names(step(plan, "model.layers.1.mlp.up_proj.weight")) == [
            "model.layers.1.mlp.up_proj.weight",
            "model.layers.2.mlp.up_proj.weight",
        ]
        assert "model.layers.2.mlp.up_proj.weight" not in plan.stages["merge"].steps

    def test_a_slice_may_have_its_own_base(self, tmp_path: Path) -> None:
        text = """\
        merge_method: slerp
        base_model: a
        parameters: {t: 0.5}
        slices:
          - sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]
          - base_model: b
            sources: [{model: a, layer_range: [1, 2]}, {model: b, layer_range: [1, 2]}]
        """
        plan = planned(tmp_path, AB, text)
        assert sources(step(plan, Q0)) == ["a", "b"]
        assert sources(step(plan, Q0.replace("layers.0", "layers.1"))) == ["b", "a"]

    @pytest.mark.parametrize(
        ("ranges", "code"),
        [("[0, 3]", "KB303"), ("[2, 3]", "KB303"), ("[0, 1000000000000]", "KB303")],
    )
    def test_a_range_past_the_end_is_refused(self, tmp_path: Path, ranges: str, code: str) -> None:
        text = f"merge_method: passthrough\nslices: [{{sources: [{{model: a, layer_range: {ranges}}}]}}]"
        assert found(planned, tmp_path, AB, text) == [(code, f"{tmp_path}/recipe.yml:2:21")]

    def test_a_layer_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        late: Header = {"model.layers.1.w": ("F32", (2,)), "model.layers.2.w": ("F32", (2,))}
        text = "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 2]}]}]"
        (error,) = errors_of(planned, tmp_path, {"a": late}, text)
        assert (error.code, error.message) == ("KB303", "a has no tensor of layer 0")

    def test_a_model_of_several_stacks_is_not_sliced(self, tmp_path: Path) -> None:
        header: Header = {f"{stack}.{layer}.w": ("F32", (2,)) for stack in ("enc", "dec") for layer in range(2)}
        text = "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]"
        (error,) = errors_of(planned, tmp_path, {"a": header}, text)
        assert error.code == "KB304"
        assert "has 2 stacks of layers (enc, dec)" in error.message

    @pytest.mark.parametrize("first", ["a", "b"])
    def test_a_tensor_that_only_one_source_of_a_slice_has_is_not_lost(self, tmp_path: Path, first: str) -> None:
        bias = {"model.layers.0.self_attn.q_proj.bias": ("BF16", (32,))}
        second = "ab".replace(first, "")
        text = f"""\
        merge_method: linear
        parameters: {{weight: 1}}
        slices: [{{sources: [{{model: {first}, layer_range: [0, 1]}}, {{model: {second}, layer_range: [0, 1]}}]}}]
        """
        (error,) = errors_of(planned, tmp_path, {"a": llama(), "b": {**llama(), **bias}}, text)
        assert error.code == "KB302"
        assert error.message.startswith("a lacks 1 tensor that b has:\n  model.layers.0.self_attn.q_proj.bias")

    def test_a_head_that_only_one_end_has_is_not_lost(self, tmp_path: Path) -> None:
        text = """\
        merge_method: passthrough
        slices:
          - sources: [{model: b, layer_range: [0, 1]}]
          - sources: [{model: a, layer_range: [1, 2]}]
        """
        (error,) = errors_of(planned, tmp_path, {"a": llama(), "b": llama(tie=True)}, text)
        assert error.code == "KB302"
        assert error.message == "b lacks 1 tensor that a has:\n  lm_head.weight"


class TestFit:
    """Models that do not fit each other are an error, with all tensors of a kind in one."""

    LINEAR = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]"

    @pytest.mark.parametrize(("a", "b", "lacking"), [(2, 3, "a"), (3, 2, "b")])
    def test_missing_layers(self, tmp_path: Path, a: int, b: int, lacking: str) -> None:
        (error,) = errors_of(planned, tmp_path, {"a": llama(layers=a), "b": llama(layers=b)}, self.LINEAR)
        assert error.code == "KB302"
        assert error.message.startswith(f"{lacking} lacks 9 tensors that {'b' if lacking == 'a' else 'a'} has:")
        assert error.message.endswith("and 3 more")

    def test_the_base_says_what_must_be_there(self, tmp_path: Path) -> None:
        text = "merge_method: ties\nbase_model: base\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]"
        lame = {name: spec for name, spec in llama().items() if name != "model.norm.weight"}
        models = {"a": lame, "b": llama(), "base": llama()}
        (error,) = errors_of(planned, tmp_path, models, text)
        assert error.message == "a lacks 1 tensor that base has:\n  model.norm.weight"

    def test_one_missing_name_has_its_nearest_beside_it(self, tmp_path: Path) -> None:
        b = {name.replace("model.norm.weight", "model.norms.weight"): spec for name, spec in llama().items()}
        errors = errors_of(planned, tmp_path, {"a": llama(), "b": b}, self.LINEAR)
        assert [error.hint for error in errors] == [
            "did you mean 'model.norm.weight'?",
            "did you mean 'model.norms.weight'?",
        ]

    def test_unequal_shapes(self, tmp_path: Path) -> None:
        (error,) = errors_of(planned, tmp_path, {"a": llama(), "b": llama(vocab=70)}, self.LINEAR)
        assert error.code == "KB301"
        assert f"{HEAD}: a BF16[64, 32], b BF16[70, 32]" in error.message
        assert "vocabularies" in str(error.hint)

    @pytest.mark.parametrize(("one", "other"), [("F32", "I64"), ("I64", "I32"), ("U8", "BOOL")])
    def test_numbers_of_unequal_kinds(self, tmp_path: Path, one: str, other: str) -> None:
        models: dict[str, Header] = {"a": {"x": (one, (2,))}, "b": {"x": (other, (2,))}}
        (error,) = errors_of(planned, tmp_path, models, self.LINEAR)
        assert error.code == "KB301"
        assert "integers are only taken over" in str(error.hint)

    def test_floats_of_unequal_widths_fit(self, tmp_path: Path) -> None:
        models: dict[str, Header] = {"a": {"x": ("F16", (2,))}, "b": {"x": ("F32", (2,))}}
        assert step(planned(tmp_path, models, self.LINEAR), "x").output.dtype is DType.F16

    def test_integers_are_taken_over_where_they_are_the_same(self, tmp_path: Path) -> None:
        models: dict[str, Header] = {"a": {"x": ("I64", (2,))}, "b": {"x": ("I64", (2,))}}
        made = step(planned(tmp_path, models, self.LINEAR + "\ndtype: float16"), "x")
        assert (made.builder, made.params, made.output.dtype) == ("same", {}, DType.I64)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            (
                "merge_method: nearswap\nbase_model: a\nmodels: [{model: a}]",
                "exactly one model beside its base model, here are 0",
            ),
            ("merge_method: passthrough\nmodels: [{model: a}, {model: b}]", "exactly one model, here are 2"),
            ("merge_method: passthrough\nbase_model: b\nmodels: [{model: a}]", "exactly one model, here are 2"),
        ],
    )
    def test_too_many_or_too_few(self, tmp_path: Path, text: str, words: str) -> None:
        (error,) = errors_of(planned, tmp_path, AB, text)
        assert error.code == "KB309"
        assert words in error.message
        assert error.hint

    def test_a_model_twice(self, tmp_path: Path) -> None:
        text = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}, {model: a}]"
        assert found(planned, tmp_path, AB, text) == [("KB308", f"{tmp_path}/recipe.yml:1:1")]


class TestDtypes:
    @staticmethod
    def dtype(tmp_path: Path, words: str) -> DType:
        text = f"merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{{model: a}}, {{model: b}}]\n{words}"
        return step(planned(tmp_path, {"a": llama("F16"), "b": llama("F32")}, text), Q0).output.dtype

    @pytest.mark.parametrize(
        ("words", "wanted"),
        [
            ("", DType.F16),
            ("base_model: b", DType.F32),
            ("dtype: bfloat16", DType.BF16),
            ("out_dtype: torch.bfloat16", DType.BF16),
            ("dtype: float32\nout_dtype: bfloat16", DType.BF16),
        ],
    )
    def test_out_dtype_then_dtype_then_the_bases_then_the_firsts(
        self, tmp_path: Path, words: str, wanted: DType
    ) -> None:
        assert self.dtype(tmp_path, words) is wanted

    def test_the_config_says_so(self, tmp_path: Path) -> None:
        def config(words: str) -> Any:
            text = f"merge_method: passthrough\nmodels: [{{model: a}}]\n{words}"
            found = planned(tmp_path, {"a": llama("BF16")}, text).stages["merge"].config
            assert found is not None
            return found

        assert config("dtype: float16")["torch_dtype"] == "float16"
        assert config("") == llama_config(layers=2, width=32, vocab=64, tie=False, dtype="bfloat16")

    def test_a_model_taken_over_in_its_own_dtype_is_not_computed(self, tmp_path: Path) -> None:
        plan = planned(tmp_path, AB, "merge_method: passthrough\nmodels: [{model: a}]\ndtype: bfloat16")
        assert plan.stages["merge"].derivations == {}

    def test_taken_over_in_another_it_is_cast(self, tmp_path: Path) -> None:
        plan = planned(tmp_path, AB, "merge_method: passthrough\nmodels: [{model: a}]\nout_dtype: float32")
        assert {made.builder for made in plan.stages["merge"].derivations.values()} == {"cast"}
