"""Parameters on their way into derivations: filters by layer, methods by slice, doubtful weights, complaints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kittybuild.builders.base import Builders
from kittybuild.builders.registry import BUILTIN
from kittybuild.model.derivation import SourceTensor
from kittybuild.model.method import Method, Param
from kittybuild.model.plan import Plan
from kittybuild.planner.merge_params import doubtful
from tests.planning import errors_of, found, llama, planned, step

FIVE = {name: llama(layers=5) for name in ("a", "b", "base")}
HEAD = "lm_head.weight"


def up(layer: int) -> str:
    return f"model.layers.{layer}.mlp.up_proj.weight"


def weights(plan: Plan, *names: str) -> list[list[float]]:
    return [step(plan, name).params["weight"] for name in names]


def notes(folder: Path, plan: Plan) -> list[str]:
    return [note.removeprefix(f"{folder}/") for note in plan.notes]


class TestFilters:
    def test_layers_and_patterns(self, tmp_path: Path) -> None:
        text = r"""
        merge_method: linear
        parameters:
          weight:
            - {layers: 1..3, filter: 're:mlp\.(up|down)', value: 0.25}
            - {layers: "3..", value: [0.5, 1.0]}
            - {value: 0.125}
        models: [{model: a}]
        """
        plan = planned(tmp_path, FIVE, text.replace("\\\\", "\\"))
        assert weights(plan, *map(up, range(5)), HEAD) == [[0.125], [0.25], [0.25], [0.875], [1.0], [0.125]]
        assert weights(plan, up(1).replace("up", "gate")) == [[0.125]]
        assert plan.notes == ()

    def test_layers_count_as_the_model_has_them_for_its_own_and_as_the_output_for_shared(self, tmp_path: Path) -> None:
        text = """\
        merge_method: linear
        parameters: {normalize: [{layers: ..1, value: false}]}
        slices:
          - sources:
              - {model: a, layer_range: [0, 2], parameters: {weight: [{layers: 0..1, value: 1}, {value: 2}]}}
              - {model: b, layer_range: [3, 5], parameters: {weight: [{layers: 3..4, value: 3}, {value: 4}]}}
        """
        plan = planned(tmp_path, FIVE, text)
        assert weights(plan, up(0), up(1)) == [[1.0, 3.0], [2.0, 4.0]]
        assert [step(plan, up(layer)).params["normalize"] for layer in (0, 1)] == [False, True]

    def test_an_entry_of_layers_that_takes_nothing_is_noted(self, tmp_path: Path) -> None:
        text = (
            "merge_method: linear\nparameters: {weight: [{layers: '5..', value: 2}, {value: 1}]}\nmodels: [{model: a}]"
        )
        assert notes(tmp_path, planned(tmp_path, FIVE, text)) == [
            "recipe.yml:2:23: layers 5.. of 'weight' takes no tensor"
        ]

    def test_a_gradient_works_for_whole_numbers(self, tmp_path: Path) -> None:
        rounds = Param("rounds", int, "shared", "", default=1)
        method = Method("steps", "Steps", "", (rounds,), "ordinary")
        builders = BUILTIN.plus(replace(BUILTIN["linear"], name="steps", method=method))
        text = "merge_method: steps\nparameters: {rounds: [1, 4]}\nmodels: [{model: a}]"
        plan = planned(tmp_path, FIVE, text, builders=builders)
        assert [step(plan, up(layer)).params["rounds"] for layer in range(5)] == [1, 2, 2, 3, 4]


class TestSlices:
    def test_a_slice_may_have_a_method_of_its_own(self, tmp_path: Path) -> None:
        text = """\
        merge_method: linear
        base_model: base
        parameters: {weight: 0.5, density: 0.25, normalize: false}
        slices:
          - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
          - merge_method: ties
            parameters: {lambda: 0.5}
            sources: [{model: base, layer_range: [2, 4]}, {model: a, layer_range: [2, 4]}]
        """
        plan = planned(tmp_path, FIVE, text)
        first, second = step(plan, up(1)), step(plan, up(2))
        assert (first.builder, first.params) == ("linear", {"weight": [0.5, 0.5], "normalize": False})
        assert (second.builder, second.params["density"], second.params["lambda"]) == ("ties", [0.25], 0.5)
        assert second.params["normalize"] is False
        assert [given.source for given in second.inputs if isinstance(given, SourceTensor)] == ["base", "a"]
        assert step(plan, HEAD).builder == "ties"
        assert step(plan, "model.embed_tokens.weight").builder == "linear"

    def test_a_slice_may_use_a_model_twice(self, tmp_path: Path) -> None:
        text = """\
        merge_method: linear
        slices:
          - sources:
              - {model: a, layer_range: [0, 2], parameters: {weight: 0.25}}
              - {model: a, layer_range: [3, 5], parameters: {weight: 0.75}}
        """
        plan = planned(tmp_path, FIVE, text)
        made = step(plan, up(1))
        assert [given.name for given in made.inputs] == [up(1), up(4)]
        assert made.params["weight"] == [0.25, 0.75]
        assert [given.name for given in step(plan, HEAD).inputs] == [HEAD, HEAD]

    def test_of_a_base_that_stands_there_twice_the_first_is_the_base(self, tmp_path: Path) -> None:
        text = """\
        merge_method: task_arithmetic
        base_model: a
        slices:
          - sources:
              - {model: a, layer_range: [1, 2]}
              - {model: a, layer_range: [3, 4], parameters: {weight: 0.75}}
        """
        made = step(planned(tmp_path, FIVE, text), up(0))
        assert ([given.name for given in made.inputs], made.params["weight"]) == ([up(1), up(3)], [0.75])

    def test_the_same_layers_twice_are_refused(self, tmp_path: Path) -> None:
        source = "{model: a, layer_range: [0, 2]}"
        text = f"merge_method: linear\nparameters: {{weight: 1}}\nslices: [{{sources: [{source}, {source}]}}]"
        assert found(planned, tmp_path, FIVE, text) == [("KB308", f"{tmp_path}/recipe.yml:3:10")]


class TestWeights:
    @staticmethod
    def of(folder: Path, a: object, b: object, method: str = "linear", more: str = "") -> list[str]:
        text = f"""\
        merge_method: {method}
        base_model: base
        parameters: {{{more}}}
        models:
          - {{model: a, parameters: {{weight: {a}}}}}
          - {{model: b, parameters: {{weight: {b}}}}}
          {"- {model: base, parameters: {weight: 1}}" if method == "linear" else ""}
        """
        return notes(folder, planned(folder, FIVE, text))

    def test_a_zero_weight_is_a_note(self, tmp_path: Path) -> None:
        assert self.of(tmp_path, 0, 1) == [
            "recipe.yml:5:5: the weight of a is 0 for every tensor: it changes nothing",
        ]
        assert self.of(tmp_path, "[{layers: 1..2, value: 1}, {value: 0}]", 1) == []

    def test_a_zero_density_is_a_note(self, tmp_path: Path) -> None:
        assert self.of(tmp_path, 1, 1, "ties", "density: 0") == [
            "recipe.yml:5:5: the density of a is 0 for every tensor: it changes nothing",
            "recipe.yml:6:5: the density of b is 0 for every tensor: it changes nothing",
        ]

    def test_a_division_by_almost_nothing_is_a_note_with_a_tensor(self, tmp_path: Path) -> None:
        one, other = self.of(tmp_path, 1, [1, -1], "task_arithmetic", "normalize: true")
        assert one.endswith(f"and of 1, -0.5 not all are positive (so for {up(3).replace('mlp.up', 'self_attn.q')})")
        assert other.endswith(f"and that of 1, -1 is 0 (so for {up(4).replace('mlp.up', 'self_attn.q')})")
        (note,) = self.of(tmp_path, 0.5, -0.5, "task_arithmetic", "normalize: true")
        assert note == (
            "recipe.yml:1:1: task_arithmetic divides by the sum of the weights, and that of 0.5, -0.5 is 0"
            " (so for model.embed_tokens.weight)"
        )

    def test_where_nothing_is_divided_signs_are_no_news(self, tmp_path: Path) -> None:
        assert self.of(tmp_path, 0.5, -0.5, "task_arithmetic", "normalize: false") == []

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ([1.0, 1.0], None),
            ([1.0, -0.9999], "that of 1, -0.9999 is 0.0001"),
            ([1.0, -0.5], "of 1, -0.5 not all are positive"),
            ([0.0, 0.0], "that of 0, 0 is 0"),
            ([None, None], None),
        ],
    )
    def test_which_sums_are_doubtful(self, values: list[Any], words: str | None) -> None:
        def told(**params: object) -> tuple[str, str] | None:
            method = BUILTIN["linear"].method
            assert method is not None
            return doubtful(method, {"weight": values, **params})

        note = told(normalize=True)
        assert (note is None) == (words is None)
        assert words is None or (note or ("", ""))[1].endswith(words)
        assert told(normalize_weights=True) == note
        assert told(normalize=False) is None


def complaining() -> Builders:
    """A method that takes no two weights that differ."""

    def check(params: Any) -> str | None:
        several = sorted(set(params["weight"]))
        return None if len(several) < 2 else f"the weight must be the same for all, not {several}"

    param = Param("weight", float, "input", "", required=True)
    method = Method("even", "Even", "", (param,), "ordinary", check=check)
    return BUILTIN.plus(replace(BUILTIN["linear"], name="even", method=method))


class TestComplaints:
    TEXT = """\
    merge_method: even
    models:
      - {model: a, parameters: {weight: [{layers: 1..3, value: 0.5}, {value: 1}]}}
      - {model: b, parameters: {weight: 1}}
    """

    def test_a_method_may_refuse_parameters_together_and_is_heard_once(self, tmp_path: Path) -> None:
        (error,) = errors_of(planned, tmp_path, FIVE, self.TEXT, (), complaining())
        assert (error.code, str(error.at)) == ("KB116", f"{tmp_path}/recipe.yml:3:38")
        first = "model.layers.1.self_attn.q_proj.weight"
        assert error.message == f"even, for {first}: the weight must be the same for all, not [0.5, 1.0]"
        assert error.hint == "see `kittybuild methods even`"

    def test_what_is_missing_is_no_complaint_of_the_method(self, tmp_path: Path) -> None:
        text = self.TEXT.replace("parameters: {weight: 1}", "parameters: {}")
        assert [code for code, _ in found(planned, tmp_path, FIVE, text, (), complaining())] == ["KB115"]


def test_tensors_with_equal_parameters_are_looked_at_once(tmp_path: Path) -> None:
    asked = []

    def check(params: Any) -> None:
        asked.append(params["weight"])

    known = complaining()["even"].method
    assert known is not None
    method = replace(known, check=check)
    builders = BUILTIN.plus(replace(BUILTIN["linear"], name="even", method=method))
    planned(tmp_path, FIVE, TestComplaints.TEXT, builders=builders)
    assert sorted(asked) == [[0.5, 1.0], [1.0, 1.0]]
