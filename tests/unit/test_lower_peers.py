"""Merges in a peer's class of arithmetic: what is lowered otherwise than in kitty-1, and what is told of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kittybuild.builders.base import Builder, Builders
from kittybuild.builders.registry import BUILTIN
from kittybuild.model.derivation import KITTY_1, Derivation, SourceTensor
from kittybuild.model.method import Param
from kittybuild.model.plan import Plan
from kittybuild.planner.lower import lower
from kittybuild.planner.machine import Machine
from kittybuild.planner.peers import rules_of
from kittybuild.planner.shortcut import stage_keys
from kittybuild.planner.targets import targets
from kittybuild.planner.views import locate, open_all, source_names
from kittybuild.recipe.parse import parse_recipe
from kittybuild.tensors import DType, TensorSpec
from tests.planning import Header, errors_of, llama, prints_of, step, write_header

B, A, K = "mergekit-0.1.5", "mergekit-0.1.4", "mergekitty-0.3"
HERE = Machine("2.9.1+cpu", "2.3.0", "AVX2")
Q0 = "model.layers.0.self_attn.q_proj.weight"
EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
MODELS = {"a": llama(), "b": llama(), "base": llama()}


def peers() -> Iterator[Builder]:
    """Builders of each class whose methods are ours; only how they are lowered is looked at here."""
    weight = Param("weight", float, "input", "")
    for numerics in (A, B, K):
        for name in ("linear", "ties", "task_arithmetic", "passthrough", "dare_ties"):
            ours = BUILTIN[name]
            assert ours.method is not None
            method = replace(ours.method, random=name == "dare_ties")
            yield replace(ours, numerics=numerics, streamed=0, method=method)
        slerp = BUILTIN["slerp"].method
        assert slerp is not None
        t = Param("t", float, "shared", "", required=numerics != K)
        method = replace(slerp, params=(t,), base="required", most=1, check=lambda params: None)
        if numerics == K:
            method = replace(method, params=(t, weight), base="optional", most=2)
        yield replace(BUILTIN["slerp"], numerics=numerics, streamed=0, method=method)


BUILDERS = Builders.of(*(b for b in BUILTIN.by_class.values() if b.numerics == KITTY_1), *peers())


def planned(folder: Path, text: str, models: dict[str, Header] = MODELS) -> Plan:
    for name, header in models.items():
        write_header(folder / name, header)
    recipe = parse_recipe(text, f"{folder}/recipe.yml", BUILDERS.catalogue())
    sources = open_all(locate(recipe, source_names(recipe)))
    return lower(recipe, targets(recipe, ()), sources, BUILDERS, HERE)


def merge(method: str, numerics: str, more: str = "", models: str = "[{model: a}, {model: b}]") -> str:
    lines = [f"merge_method: {method}", f"numerics: {numerics}", "parameters: {weight: 0.5}", f"models: {models}", more]
    return "\n".join(lines)


def sources(made: Derivation) -> list[str]:
    return [given.source for given in made.inputs if isinstance(given, SourceTensor)]


class TestIdentity:
    def test_the_class_names_the_machine(self, tmp_path: Path) -> None:
        made = step(planned(tmp_path, merge("linear", B)), Q0)
        assert made.numerics == "mergekit-0.1.5;torch 2.9.1+cpu AVX2"
        assert BUILDERS.behind(made).numerics == B

    def test_numpy_is_named_where_it_computes(self, tmp_path: Path) -> None:
        text = merge("slerp", A, "base_model: base", "[{model: a}]").replace("weight: 0.5", "t: 0.5")
        assert step(planned(tmp_path, text), Q0).numerics == "mergekit-0.1.4;torch 2.9.1+cpu numpy 2.3.0 AVX2"
        assert step(planned(tmp_path, text.replace(A, B)), Q0).numerics == "mergekit-0.1.5;torch 2.9.1+cpu AVX2"

    def test_ours_names_none(self, tmp_path: Path) -> None:
        made = step(planned(tmp_path, merge("linear", KITTY_1)), Q0)
        assert made.numerics == KITTY_1
        assert "dtype" not in made.params

    def test_each_stage_has_its_own(self, tmp_path: Path) -> None:
        text = f"""
kittybuild: 1
numerics: {B}
stages:
  one: {{merge_method: linear, parameters: {{weight: 1}}, models: [{{model: a}}, {{model: b}}]}}
  two: {{merge_method: linear, numerics: kitty-1, parameters: {{weight: 1}}, models: [{{model: one}}, {{model: base}}]}}
"""
        plan = planned(tmp_path, text)
        assert [step(plan, Q0, stage).numerics.partition(";")[0] for stage in ("one", "two")] == [B, KITTY_1]

    def test_the_key_of_a_stage_holds_the_machine_in_a_peers_class_only(self) -> None:
        def key(numerics: str, machine: Machine) -> Any:
            recipe = parse_recipe(merge("linear", numerics), "recipe.yml", BUILDERS.catalogue())
            return stage_keys(recipe, ["merge"], prints_of(recipe), BUILDERS, machine)["merge"]

        others = [replace(HERE, instructions="AVX512"), replace(HERE, torch="2.9.2"), replace(HERE, numpy="2.3.1")]
        assert len({key(B, machine) for machine in (HERE, *others)}) == 4
        assert len({key(KITTY_1, machine) for machine in (HERE, *others)}) == 1
        assert key(A, HERE) != key(B, HERE)


class TestDtypes:
    MIXED: dict[str, Header] = {"a": llama("F16"), "b": llama("BF16"), "base": llama("F16")}  # noqa: RUF012

    @staticmethod
    def dtypes(plan: Plan) -> tuple[DType, object]:
        made = step(plan, Q0)
        return made.output.dtype, made.params["dtype"]

    def test_inputs_are_cast_as_they_are_loaded(self, tmp_path: Path) -> None:
        text = merge("linear", B, "dtype: bfloat16\nout_dtype: float32")
        assert self.dtypes(planned(tmp_path, text, self.MIXED)) == (DType.F32, "bfloat16")
        text = merge("linear", B, "dtype: bfloat16")
        assert self.dtypes(planned(tmp_path, text, self.MIXED)) == (DType.BF16, "bfloat16")

    @pytest.mark.parametrize(
        ("numerics", "method", "wanted"),
        [(B, "linear", DType.F32), (B, "ties", DType.F32), (A, "linear", DType.F32), (A, "ties", DType.F16)],
    )
    def test_without_a_dtype_it_is_what_torch_promotes_to_or_the_bases(
        self, numerics: str, method: str, wanted: DType, tmp_path: Path
    ) -> None:
        text = merge(method, numerics, "base_model: base")
        assert self.dtypes(planned(tmp_path, text, self.MIXED)) == (wanted, None)

    @pytest.mark.parametrize(
        ("given", "wanted"),
        [("BF16 BF16", "BF16"), ("F16 BF16", "F32"), ("F16 F32", "F32"), ("BF16 F64", "F64"), ("F32 F64", "F64")],
    )
    def test_promotion_is_torchs(self, given: str, wanted: str) -> None:
        import torch

        dtypes = [DType(word) for word in given.split()]
        torchs = [getattr(torch, dtype.torch_name) for dtype in dtypes]
        assert str(torch.promote_types(*torchs)) == f"torch.{DType(wanted).torch_name}"
        specs = [TensorSpec(dtype, (2,)) for dtype in dtypes]
        assert rules_of(B).promoted("linear", specs, None) is DType(wanted)

    def test_a_model_taken_over_is_cast_as_often_as_there(self, tmp_path: Path) -> None:
        def one(more: str) -> Plan:
            return planned(tmp_path, merge("passthrough", B, more, "[{model: a}]").replace("weight: 0.5", ""))

        assert one("").stages["merge"].derivations == {}
        assert one("dtype: bfloat16").stages["merge"].derivations == {}
        made = step(one("dtype: float16\nout_dtype: bfloat16"), Q0)
        assert (made.builder, made.params) == ("passthrough", {"scale": [None], "dtype": "float16"})
        assert made.output.dtype is DType.BF16


class TestOrder:
    def test_the_base_goes_first(self, tmp_path: Path) -> None:
        text = merge("ties", A, "base_model: base", "[{model: b}, {model: base}, {model: a}]")
        assert sources(step(planned(tmp_path, text), Q0)) == ["base", "b", "a"]

    @pytest.mark.parametrize(
        ("numerics", "models", "wanted"),
        [(B, "ab", "ba"), (A, "ab", "ba"), (K, "ab", "ab"), (K, "ba", "ba"), (K, "a", "ab")],
    )
    def test_slerp_with_t_takes_models_as_listed_in_mergekitty(
        self, numerics: str, models: str, wanted: str, tmp_path: Path
    ) -> None:
        listed = ", ".join(f"{{model: {name}}}" for name in models)
        text = merge("slerp", numerics, "base_model: b", f"[{listed}]").replace("weight: 0.5", "t: 0.25")
        made = step(planned(tmp_path, text), Q0)
        assert sources(made) == list(wanted)
        assert made.params.get("base") is (False if numerics == K else None)

    def test_with_weights_it_works_on_differences(self, tmp_path: Path) -> None:
        made = step(planned(tmp_path, merge("slerp", K, "base_model: base")), Q0)
        assert (sources(made), made.params["base"], made.params["weight"]) == (["base", "a", "b"], True, [0.5, 0.5])
        made = step(planned(tmp_path, merge("slerp", K)), Q0)
        assert (sources(made), made.params["base"]) == (["a", "b"], False)

    @pytest.mark.parametrize(("numerics", "tail"), [(KITTY_1, 0.0), (A, 0.0), (B, 0.0), (K, 1.0)])
    def test_where_in_a_gradient_stands_what_follows_the_layers(
        self, numerics: str, tail: float, tmp_path: Path
    ) -> None:
        text = merge("linear", numerics).replace("0.5", "[0.0, 1.0]")
        plan = planned(tmp_path, text)
        assert [step(plan, name).params["weight"][0] for name in (EMBED, NORM, HEAD)] == [0.0, tail, tail]

    def test_a_model_stands_once_in_a_slice(self, tmp_path: Path) -> None:
        models = "[{model: a, layer_range: [0, 1]}, {model: a, layer_range: [1, 2]}]"
        text = f"merge_method: linear\nnumerics: {B}\nparameters: {{weight: 1}}\nslices: [{{sources: {models}}}]"
        (error,) = errors_of(planned, tmp_path, text)
        assert (error.code, error.hint) == ("KB308", f"{B} cannot do that: leave `numerics` out")


class TestShapes:
    def wide(self, **names: int) -> dict[str, Header]:
        return {name: llama(vocab=vocab) for name, vocab in names.items()}

    @pytest.mark.parametrize("numerics", [A, K])
    def test_vocabularies_are_cut_to_what_all_have(self, numerics: str, tmp_path: Path) -> None:
        plan = planned(tmp_path, merge("linear", numerics), self.wide(a=70, b=64))
        made = step(plan, EMBED)
        assert made.output == TensorSpec(DType.BF16, (64, 32))
        assert [given.spec.shape for given in made.inputs] == [(70, 32), (64, 32)]
        assert plan.notes == (f"{tmp_path}/recipe.yml:1:1: {numerics} cuts the vocabulary of a:\n  {EMBED}\n  {HEAD}",)

    @pytest.mark.parametrize("numerics", [A, K])
    def test_of_differences_to_what_the_base_has(self, numerics: str, tmp_path: Path) -> None:
        text = merge("ties", numerics, "base_model: base")
        made = step(planned(tmp_path, text, self.wide(a=70, b=72, base=66)), EMBED)
        assert made.output.shape == (66, 32)
        (error,) = errors_of(planned, tmp_path, text, self.wide(a=70, b=60, base=66))
        assert error.code == "KB301"

    @pytest.mark.parametrize("numerics", [B, KITTY_1])
    def test_elsewhere_they_are_refused(self, numerics: str, tmp_path: Path) -> None:
        (error,) = errors_of(planned, tmp_path, merge("linear", numerics), self.wide(a=70, b=64))
        assert error.code == "KB301"

    @pytest.mark.parametrize("numerics", [A, K])
    def test_a_model_is_left_out_of_tensors_of_another_shape_with_a_note(self, numerics: str, tmp_path: Path) -> None:
        text = f"""
merge_method: ties
numerics: {numerics}
base_model: base
models:
  - {{model: a, parameters: {{weight: 0.25, density: 0.5}}}}
  - {{model: b, parameters: {{weight: 0.75, density: 0.25}}}}
"""
        models = {**MODELS, "a": {**llama(), Q0: ("BF16", (48, 32))}}
        plan = planned(tmp_path, text, models)
        made = step(plan, Q0)
        assert (sources(made), made.output.shape) == (["base", "b"], (32, 32))
        assert (made.params["weight"], made.params["density"]) == ([0.75], [0.25])
        told = f"{numerics} leaves a out of tensors that have another shape there:\n  {Q0}"
        assert plan.notes == (f"{tmp_path}/recipe.yml:2:1: {told}",)
        (error,) = errors_of(planned, tmp_path, merge("linear", numerics), models)
        assert error.code == "KB301"

    def test_a_model_that_is_left_out_of_all_is_an_error(self, tmp_path: Path) -> None:
        models: dict[str, Header] = {"a": {"x": ("F32", (3,))}, "b": {"x": ("F32", (2,))}, "base": {"x": ("F32", (2,))}}
        (error,) = errors_of(planned, tmp_path, merge("ties", A, "base_model: base"), models)
        assert (error.code, error.message) == ("KB312", "a takes no part: no tensor is made of it")

    def test_integers_are_taken_over_with_a_note_where_the_tool_computes_with_them(self, tmp_path: Path) -> None:
        ids: Header = {"ids": ("I64", (2,)), "x": ("F32", (2,))}
        models = {"a": ids, "b": ids}
        for numerics, count in ((A, 1), (K, 1), (B, 0)):
            plan = planned(tmp_path, merge("linear", numerics), models)
            made = step(plan, "ids")
            assert (made.builder, made.numerics) == ("same", KITTY_1)
            assert len(plan.notes) == count


class TestRandom:
    def test_that_only_the_distribution_is_reproduced_is_told_once(self, tmp_path: Path) -> None:
        plan = planned(tmp_path, merge("dare_ties", B, "base_model: base"))
        assert plan.notes == (
            f"{tmp_path}/recipe.yml:1:1: dare_ties draws random numbers, which mergekit-0.1.5 takes from one stream in"
            " the order of its work: its distribution is reproduced here, not its bits",
        )
        made = step(plan, Q0)
        assert (made.params["seed"], made.params["tensor"]) == (0, Q0)
        assert planned(tmp_path, merge("dare_ties", KITTY_1, "base_model: base")).notes == ()
