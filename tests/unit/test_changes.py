"""Two texts of a recipe compared key by key, and two tellings of how a tensor was made."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kittybuild.model.made import Made, apart, first_cause, read_derivations
from kittybuild.recipe.changes import text_changes

BEFORE = """\
kittybuild: 1
defaults: {seed: 7}
stages:
  soup:
    merge_method: linear
    models:
      - {model: a, parameters: {weight: 0.5}}
      - {model: b, parameters: {weight: 0.5}}
"""


def changes(before: str, after: str) -> list[tuple[str, str | None, str | None, str]]:
    return [(one.path, one.was, one.now, str(one.at)) for one in text_changes(before, after, "r.yml")]


def test_equal_texts_and_other_layouts_have_no_changes() -> None:
    assert changes(BEFORE, BEFORE) == []
    other = BEFORE.replace("{seed: 7}", "\n  # a comment\n  seed: 7")
    assert changes(BEFORE, other) == []


def test_a_value_is_named_with_its_place_in_the_newer_text() -> None:
    after = BEFORE.replace("b, parameters: {weight: 0.5}", "b, parameters: {weight: 0.25}")
    assert changes(BEFORE, after) == [("models[1].parameters.weight", "0.5", "0.25", "r.yml:8:41")]
    (change,) = text_changes(BEFORE, after, "r.yml")
    assert (change.stage, change.top, change.of_parameters) == ("soup", "stages", True)


@pytest.mark.parametrize(
    ("after", "wanted"),
    [
        (BEFORE.replace("seed: 7", "seed: 8"), ("defaults.seed", "7", "8")),
        (BEFORE.replace("seed: 7", "seed: 7, dtype: float32"), ("defaults.dtype", None, "float32")),
        (BEFORE.replace("defaults: {seed: 7}\n", ""), ("defaults", '{"seed": 7}', None)),
        (BEFORE.replace("linear", "ties"), ("merge_method", "linear", "ties")),
        (BEFORE + "      - {model: c}\n", ("models[2]", None, '{"model": "c"}')),
        (
            BEFORE.replace("      - {model: a, parameters: {weight: 0.5}}\n", ""),
            ("models[0]", '{"model": "a", "parameters": {"weight": 0.5}}', None),
        ),
        (BEFORE.replace("- {model: a,", "- {model: c}\n      - {model: a,"), ("models[0]", None, '{"model": "c"}')),
        (BEFORE.replace("seed: 7", "seed: true"), ("defaults.seed", "7", "true")),
        (BEFORE.replace("seed: 7", "seed: 7.0"), ("defaults.seed", "7", "7.0")),
    ],
)
def test_one_change_is_one_change(after: str, wanted: tuple[str, str | None, str | None]) -> None:
    ((path, was, now, _),) = changes(BEFORE, after)
    assert (path, was, now) == wanted


def test_documents_of_a_mergekit_text_are_compared_one_by_one() -> None:
    before = "name: a\nmerge_method: linear\n---\nname: b\nmerge_method: ties\n"
    (change,) = text_changes(before, before.replace("ties", "sce"), "r.yml")
    assert (change.path, change.stage, change.top, str(change.at)) == ("merge_method", None, "", "r.yml:5:15")


def test_a_text_that_cannot_be_read_has_no_changes() -> None:
    assert changes(BEFORE, "a: [") == changes("a: [", BEFORE) == []


MADE = Made("linear", 1, "kitty-1", "k" * 64, (("a", "x", "1" * 64), ("glad", "x", "2" * 64)))


def test_what_made_a_tensor_is_read_as_it_was_written() -> None:
    assert Made.from_json(MADE.to_json()) == MADE
    assert read_derivations({"soup": {"x": MADE.to_json()}}) == {"soup": {"x": MADE}}


@pytest.mark.parametrize(
    "wrong", [None, [], ["linear", 1, "kitty-1", "k"], ["linear", 1, "kitty-1", "k", [["a", "x"]]]]
)
def test_what_is_none_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="not "):
        read_derivations({"soup": {"x": wrong}})


def test_two_tellings_differ_in_what_is_named() -> None:
    other = replace(MADE, key="o" * 64)
    assert apart(MADE, MADE) is None
    assert (found := apart(MADE, other)) is not None
    assert found.params
    found = apart(MADE, replace(other, version=2))
    assert found is not None
    assert (found.fields, found.params) == ((("version of linear", "1", "2"),), False)
    found = apart(MADE, replace(other, inputs=(MADE.inputs[0], ("glad", "x", None))))
    assert found is not None
    assert (found.contents, found.others) == ((("glad", "x"),), False)
    found = apart(MADE, replace(other, inputs=MADE.inputs[:1]))
    assert found is not None
    assert (found.contents, found.others) == ((), True)


def test_the_first_cause_is_the_deepest() -> None:
    glad = Made("lora", 1, "kitty-1", "g" * 64, (("base", "x", "3" * 64),))
    before = {"soup": {"x": MADE}, "glad": {"x": glad}}
    later = replace(MADE, key="o" * 64, inputs=(MADE.inputs[0], ("glad", "x", "4" * 64)))
    touched = replace(glad, key="h" * 64, inputs=(("base", "x", "5" * 64),))
    stages = ("soup", "soup")
    found = first_cause(before, {"soup": {"x": later}, "glad": {"x": touched}}, stages, "x")
    assert found == "the source base holds another x than the one that was merged"
    found = first_cause(before, {"soup": {"x": later}, "glad": {"x": replace(glad, key="h" * 64)}}, stages, "x")
    assert found == "x: its parameters are others"
    found = first_cause(before, {"soup": {"x": replace(later, version=3)}, "glad": {}}, stages, "x")
    assert found == "x: the version of linear was 1, now it is 3"
    assert first_cause(before, before, stages, "x") is None


def test_tellings_that_lead_in_a_circle_end() -> None:
    def circle(key: str) -> dict[str, dict[str, Made]]:
        round_ = Made("linear", 1, "kitty-1", key * 64, (("soup", "x", key * 64),))
        return {"soup": {"x": round_}}

    assert first_cause(circle("1"), circle("2"), ("soup", "soup"), "x") == "x: its parameters are others"
