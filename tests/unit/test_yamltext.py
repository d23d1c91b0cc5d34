"""Recipe text: plain data with the place of every part, and nothing that runs, loops or multiplies."""

from __future__ import annotations

import pytest

from kittybuild.errors import RecipeError
from kittybuild.recipe.yamltext import DEEPEST, Document, read_documents


def one(text: str) -> Document:
    (document,) = read_documents(text, "r.yml")
    return document


def refused(text: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        read_documents(text, "r.yml")
    assert caught.value.code == "KB101"
    return caught.value


def test_values_are_plain_data() -> None:
    assert one("a: [1, 2.5, yes, ~, word]\nb: {c: 'quoted'}").value == {
        "a": [1, 2.5, True, None, "word"],
        "b": {"c": "quoted"},
    }


def test_every_key_and_value_has_its_place() -> None:
    document = one("a: 1\nmodels:\n  - model: x\n    parameters: {weight: 0.5}\n")
    path = ("models", 0, "parameters", "weight")
    assert str(document.key_at(path)) == "r.yml:4:18"
    assert str(document.at(path)) == "r.yml:4:26"
    assert str(document.key_at(("models",))) == "r.yml:2:1"
    assert str(document.at(("models", 0))) == "r.yml:3:5"


def test_a_place_that_is_not_there_is_the_nearest_around_it() -> None:
    document = one("a:\n  b: 1\n")
    assert str(document.at(("a", "c", "d"))) == "r.yml:2:3"
    assert str(document.key_at(("a", "c"))) == "r.yml:2:3"


def test_the_places_of_a_later_document_count_from_the_top_of_the_file() -> None:
    _, second = read_documents("a: 1\n---\nb: 2\n", "r.yml")
    assert str(second.key_at(("b",))) == "r.yml:3:1"


@pytest.mark.parametrize("text", ["", "\n", "# only a comment\n", "---\n---\n", "--- ~\n"])
def test_empty_documents_are_left_out(text: str) -> None:
    assert read_documents(text, "r.yml") == ()


def test_a_byte_order_mark_is_no_part_of_the_first_key() -> None:
    assert one("\ufeffa: 1").value == {"a": 1}


def test_dates_and_sexagesimal_names_stay_what_was_written() -> None:
    assert one("revision: 2024-01-01").value == {"revision": "2024-01-01"}


def test_keys_are_text_whatever_they_look_like() -> None:
    assert one("1: a\n~: b\ntrue: c").value == {"1": "a", "~": "b", "true": "c"}


class TestMergeKeys:
    def test_own_keys_go_before_those_taken_over(self) -> None:
        document = one("base: &base {x: 1, y: 2}\nb: {<<: *base, y: 3, z: 4}")
        assert document.value["b"] == {"x": 1, "y": 3, "z": 4}

    def test_the_first_of_a_list_wins(self) -> None:
        document = one("a: &a {x: 1}\nb: &b {x: 2, y: 2}\nc: {<<: [*a, *b]}")
        assert document.value["c"] == {"x": 1, "y": 2}

    def test_a_key_taken_over_has_the_place_where_it_is_written(self) -> None:
        document = one("base: &base\n  x: 1\nb:\n  <<: *base\n")
        assert str(document.key_at(("b", "x"))) == "r.yml:2:3"

    @pytest.mark.parametrize("text", ["a: {<<: 3}", "a: {<<: [3]}"])
    def test_only_mappings_can_be_taken_over(self, text: str) -> None:
        assert "`<<` takes a mapping" in refused(text).message


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("a: 1\na: 2", "r.yml:2:1", "'a' stands here twice"),
        ("a: {b: 1, c: 2, b: 3}", "r.yml:1:17", "'b' stands here twice"),
        ("? [a, b]\n: 1", "r.yml:1:3", "not plain text"),
        ("a: b: c", "r.yml:1:5", "mapping values are not allowed"),
        ("a:\n\tb: 1", "r.yml:2:1", "cannot start any token"),
        ('a: "x', "r.yml:1:6", "unexpected end of stream"),
        ("a: *nobody", "r.yml:1:4", "undefined alias"),
        ("a: !!int x", "r.yml:1:4", "cannot read 'x'"),
        ("a: !word 3", "r.yml:1:4", "tag '!word'"),
        ("a: !word {b: 1}", "r.yml:1:4", "tag '!word'"),
        ("a: !!python/object/apply:os.system [ls]", "r.yml:1:4", "python/object/apply"),
        ("a: !!python/name:os.system", "r.yml:1:4", "python/name"),
        ("a: &a [*a]", "r.yml:1:4", "contains itself"),
        ("a: &a {<<: *a}", "r.yml:1:4", "contains itself"),
        ("a: x\x01", "r.yml", "control character '\\x01'"),
    ],
)
def test_what_is_not_plain_yaml_is_refused_with_its_place(text: str, place: str, words: str) -> None:
    error = refused(text)
    assert error.at == place
    assert words in error.message


def test_messages_hold_one_line_and_no_place_of_their_own() -> None:
    for text in ("a: !word 3", "a: x\x01", "a: " + "9" * 5000, "a: !!binary abc"):
        message = refused(text).message
        assert "\n" not in message
        assert "unicode string" not in message
        assert len(message) < 300


class TestBombs:
    """Small texts that would take all memory, all time or the whole process."""

    @pytest.mark.parametrize("unit", ["[", "{a: ", "- "])
    def test_deep_nesting(self, unit: str) -> None:
        assert f"more than {DEEPEST} values inside each other" in refused(unit * 100_000).message

    def test_nesting_through_aliases(self) -> None:
        chain = "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 3000))
        assert f"more than {DEEPEST} values inside each other" in refused(f"a0: &a0 1\n{chain}").message

    def test_aliases_that_multiply(self) -> None:
        chain = "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
        assert "more than 200000 values" in refused(f"a0: &a0 1\n{chain}").message

    def test_merge_keys_that_multiply(self) -> None:
        depth = 40
        text = "".join(f"{{<<: [&a{i} " for i in range(depth)) + "{x: 1}"
        text += "".join(f", *a{i}]}}" for i in range(depth - 1, -1, -1))
        assert "more than 200000 values" in refused(f"a: {text}").message
