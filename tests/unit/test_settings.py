"""Parameter values: gradients, filters and the four levels, with the values that mergekit 0.1.5 gives."""

from __future__ import annotations

import pytest

from kittybuild.builders.registry import BUILTIN
from kittybuild.errors import RecipeError
from kittybuild.model.method import Param
from kittybuild.model.recipe import NOWHERE, Filtered, Given
from kittybuild.recipe.settings import Lookup, Resolved, entries, interpolate, parse_entry, taker, unused

NUMBER = Param("weight", float, "input", "", required=True)
Q_PROJ = "model.layers.3.self_attn.q_proj.weight"
MLP = "model.layers.3.mlp.up_proj.weight"


def given(value: object) -> Given:
    return Given(tuple(parse_entry(item, NOWHERE) for _, item in entries(value)))


def value(setting: object, tensor: str = Q_PROJ, t: float = 0.0, param: Param = NUMBER) -> object:
    found = Lookup(param, [given(setting)]).resolve(tensor, 3, t)
    return found and found.value


def takes(filter_text: str | None, tensor: str) -> bool:
    return taker(Filtered(1.0, filter_text))(tensor, None)


class TestGradients:
    def test_the_check_values_of_mergekit_over_eight_layers(self) -> None:
        values = [interpolate([0, 0.5, 0.3, 0.7, 1], layer / 7) for layer in range(8)]
        assert values == pytest.approx([0, 0.2857, 0.4714, 0.3571, 0.4143, 0.6429, 0.8286, 1], abs=5e-5)

    def test_the_bits_are_those_of_the_formula_in_doubles(self) -> None:
        s = 3 / 7 * 2
        assert interpolate([0.1, 0.7, 0.4], 3 / 7) == (1 - s) * 0.1 + s * 0.7

    @pytest.mark.parametrize(("t", "wanted"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
    def test_the_ends_and_the_middle(self, t: float, wanted: float) -> None:
        assert interpolate([0, 1], t) == wanted

    def test_one_value_is_that_value_everywhere(self) -> None:
        assert [interpolate([0.3], t) for t in (0.0, 0.5, 1.0)] == [0.3] * 3

    def test_words_and_truth_values_are_picked_and_not_mixed(self) -> None:
        assert [interpolate([True, False], t) for t in (0.0, 0.9, 1.0)] == [True, True, False]
        assert [interpolate(["a", "b", "c"], t) for t in (0.0, 0.6, 1.0)] == ["a", "b", "c"]

    def test_numbers_in_scientific_notation_are_texts_in_yaml_and_count_as_numbers(self) -> None:
        assert value("1e-4") == 1e-4
        assert value(["1e-4", "3e-4"], t=0.5) == pytest.approx(2e-4)
        assert value([0, "1e-4"], t=0.5) == pytest.approx(5e-5)

    def test_texts_of_a_truth_value_are_no_numbers(self) -> None:
        switch = Param("normalize", bool, "shared", "")
        assert [value(["1", "0"], t=t, param=switch) for t in (0.0, 0.5, 1.0)] == [True, True, False]

    def test_an_empty_gradient_gives_nothing(self) -> None:
        assert value([], t=0.5) is None

    def test_of_whole_numbers_the_nearest_counts(self) -> None:
        count = Param("k", int, "input", "", required=True)
        assert [value([1, 4], t=t, param=count) for t in (0.0, 0.1, 0.4, 0.9, 1.0)] == [1, 1, 2, 4, 4]
        assert type(value([1, 4], t=0.4, param=count)) is int

    def test_a_value_out_of_range_is_an_error_with_the_tensor(self) -> None:
        share = Param("k", float, "input", "", low=0.5)
        with pytest.raises(RecipeError, match=r"'k' comes out as 0.25 for .*q_proj.*: it must be at least 0.5"):
            value([0, 1], t=0.25, param=share)


class TestFilters:
    def test_a_filter_is_a_plain_part_of_the_name(self) -> None:
        assert takes("self_attn", Q_PROJ)
        assert not takes("Self_attn", Q_PROJ)
        assert not takes("layers.*.self", Q_PROJ)
        assert takes("layers.1", "model.layers.12.mlp.up_proj.weight")

    @pytest.mark.parametrize("everything", [None, "*"])
    def test_no_filter_and_a_star_take_all(self, everything: str | None) -> None:
        assert takes(everything, Q_PROJ)

    def test_behind_re_it_is_a_pattern_that_is_searched_in_the_name(self) -> None:
        assert takes(r"re:layers\.[0-3]\.", Q_PROJ)
        assert takes("re:^model.*weight$", Q_PROJ)
        assert not takes(r"re:layers\.\d\d", Q_PROJ)
        assert not takes("re:^layers", Q_PROJ)

    @pytest.mark.parametrize(
        ("layers", "wanted"), [("1..3", [1, 2]), ("2..", [2, 3, 4]), ("..2", [0, 1]), ("0..9", [0, 1, 2, 3, 4])]
    )
    def test_layers_are_a_range_without_its_end(self, layers: str, wanted: list[int]) -> None:
        entry = parse_entry({"value": 1, "layers": layers}, NOWHERE)
        assert [layer for layer in range(5) if taker(entry)(Q_PROJ, layer)] == wanted
        assert not taker(entry)("lm_head.weight", None)

    def test_layers_and_a_filter_must_both_match(self) -> None:
        both = taker(parse_entry({"value": 1, "layers": "2..4", "filter": "attn"}, NOWHERE))
        assert [both(name, layer) for name, layer in ((Q_PROJ, 3), (Q_PROJ, 4), (MLP, 3))] == [True, False, False]

    def test_the_first_that_matches_wins_even_if_a_later_one_is_closer(self) -> None:
        setting = [{"filter": "layers.3", "value": 1}, {"filter": "layers.3.self_attn.q_proj", "value": 2}]
        assert value(setting) == 1

    def test_the_order_counts(self) -> None:
        setting = [{"filter": "self_attn", "value": 0.1}, {"filter": "mlp", "value": 0.2}, {"value": 0.3}]
        names = (Q_PROJ, MLP, "model.norm.weight")
        assert [value(setting, name) for name in names] == [0.1, 0.2, 0.3]

    def test_a_filter_may_hold_a_gradient(self) -> None:
        setting = [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": [1, 0]}]
        assert value(setting, Q_PROJ, 0.75) == 0.75
        assert value(setting, MLP, 0.75) == 0.25

    def test_one_filter_needs_no_list(self) -> None:
        assert value({"value": 0.5, "filter": "mlp"}, MLP) == 0.5
        assert value({"value": 0.5}, MLP) == 0.5

    def test_what_no_filter_takes_falls_through(self) -> None:
        assert value([{"filter": "mlp", "value": 1}]) is None

    def test_values_that_no_tensor_takes_are_found(self) -> None:
        setting = given(
            [{"filter": "attn", "value": 1}, {"filter": "q_proj", "value": 2}, {"filter": "mpl", "value": 3}]
        )
        assert [item.filter for item in unused(setting, [(Q_PROJ, 3), (MLP, 3)])] == ["q_proj", "mpl"]
        assert unused(given(0.5), [(Q_PROJ, 3)]) == ()
        assert unused(given([{"value": 1}, {"value": 2}]), [(Q_PROJ, 3)]) == (Filtered(2, None),)
        beyond = given([{"value": 1, "layers": "9..", "filter": "mlp"}, {"value": 2, "layers": "3.."}])
        assert [str(item) for item in unused(beyond, [(Q_PROJ, 3)])] == ["the filter 'mlp' of layers 9.."]


class TestLevels:
    """Source, slice, whole merge, default: the first that says something for this tensor."""

    @staticmethod
    def at(*levels: object, param: Param = NUMBER) -> Resolved | None:
        settings = [None if level is None else given(level) for level in levels]
        return Lookup(param, settings).resolve(Q_PROJ, 3, 0.0)

    def test_the_nearest_level_wins(self) -> None:
        assert self.at(1, 2, 3) == Resolved(1, NOWHERE)
        assert self.at(None, 2, 3) == Resolved(2, NOWHERE)
        assert self.at(None, None, 3) == Resolved(3, NOWHERE)

    def test_a_level_whose_filters_do_not_match_is_passed_by(self) -> None:
        assert self.at([{"filter": "mlp", "value": 1}], [{"filter": "norm", "value": 2}], 3) == Resolved(3, NOWHERE)

    def test_zero_is_a_value(self) -> None:
        assert self.at(0, 1) == Resolved(0.0, NOWHERE)

    def test_without_any_it_is_the_default(self) -> None:
        assert self.at(None, param=Param("density", float, "input", "", default=1.0)) == Resolved(1.0, None)
        assert self.at(None, param=Param("scale", float, "input", "")) == Resolved(None, None)

    def test_a_required_one_that_nobody_gives_is_none_at_all(self) -> None:
        assert self.at(None, None) is None

    def test_only_filters_and_gradients_vary_from_tensor_to_tensor(self) -> None:
        def varies(*levels: object) -> bool:
            return Lookup(NUMBER, [None if level is None else given(level) for level in levels]).varies

        assert not varies(1, [{"filter": "mlp", "value": 2}])
        assert not varies(None, [{"value": 2, "filter": "*"}])
        assert not varies(None, None)
        assert varies([{"filter": "mlp", "value": 1}], 2)
        assert varies([{"layers": "1..2", "value": 1}], 2)
        assert varies([0, 1])


class TestTypes:
    @pytest.mark.parametrize("text", ["yes", "true", "on", "1", "True", 1, 1.0, True])
    def test_words_for_yes(self, text: object) -> None:
        assert value(text, param=Param("normalize", bool, "shared", "")) is True

    @pytest.mark.parametrize("text", ["no", "false", "off", "0", 0, 0.0, False])
    def test_words_for_no(self, text: object) -> None:
        assert value(text, param=Param("normalize", bool, "shared", "")) is False

    def test_whole_numbers_may_be_written_with_a_point(self) -> None:
        assert value(5.0, param=Param("k", int, "shared", "")) == 5
        assert value("5", param=Param("k", int, "shared", "")) == 5

    def test_numbers_come_out_as_numbers(self) -> None:
        assert [type(value(text)) for text in (1, True, "2", 0.5)] == [float] * 4

    @pytest.mark.parametrize(
        ("kind", "text", "words"),
        [
            (float, "much", "must be a number"),
            (float, ".nan", "must be a number"),
            (float, "nan", "must be a finite number"),
            (float, float("inf"), "must be a finite number"),
            (float, "1e999", "must be a finite number"),
            (float, 10**400, "must be a finite number"),
            (int, 0.5, "must be a whole number"),
            (int, "inf", "must be a finite number"),
            (bool, 2, "must be true or false"),
            (bool, "maybe", "must be true or false"),
        ],
    )
    def test_other_values_are_refused_with_what_is_wanted(self, kind: type, text: object, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            Param("p", kind, "shared", "").parse(text)  # type: ignore[arg-type]

    def test_ranges(self) -> None:
        def refusal(low: float | None, high: float | None) -> str:
            with pytest.raises(ValueError, match="must be") as caught:
                Param("p", float, "shared", "", low=low, high=high).parse(7)
            return str(caught.value)

        assert refusal(None, 1) == "must be at most 1"
        assert refusal(8, None) == "must be at least 8"
        assert refusal(0, 0.5) == "must be between 0 and 0.5"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"filter": "mlp"}, "needs a 'value'"),
        ({"value": 1, "filtr": "mlp"}, "not 'filtr'"),
        ([{"value": 1, "filter": 3}], "not 3: put it in quotes"),
        ([{"value": 1, "filter": "re:(mlp"}], r"'\(mlp' is no pattern: missing \), unterminated"),
        ({"value": 1, "layers": 3}, "such as 4..12 .*, not 3"),
        ({"value": 1, "layers": ".."}, "such as 4..12"),
        ({"value": 1, "layers": "4-12"}, "such as 4..12"),
        ({"value": 1, "layers": "4..4"}, "the layers 4..4 are none"),
        ({"value": 1, "layers": "..0"}, "the layers ..0 are none"),
        ([[1, 2]], r"not \[1, 2\]"),
        ({"value": {"value": 1}}, "a number, a word"),
        ([None], "not None"),
    ],
)
def test_what_is_no_setting_is_refused(setting: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        given(setting)


def test_every_default_is_a_value_that_its_parameter_takes() -> None:
    for method in BUILTIN.methods():
        for param in method.params:
            if param.default is not None:
                assert param.parse(param.default) == param.default, (method.name, param.name)
