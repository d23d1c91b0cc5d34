"""References to models: one line of text or a mapping, as mergekit writes them."""

from __future__ import annotations

import pytest

from kittybuild.errors import KittybuildError
from kittybuild.model.recipe import NOWHERE, ModelRef
from kittybuild.recipe.reference import parse_reference


def parsed(value: object) -> ModelRef:
    problems: list[KittybuildError] = []
    reference = parse_reference(value, NOWHERE, problems)
    assert problems == []
    assert reference is not None
    return reference


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("base", ModelRef("base")),
        ("org/name", ModelRef("org/name")),
        ("org/name@main", ModelRef("org/name", "main")),
        ("../models/base", ModelRef("../models/base")),
        ("base+happy", ModelRef("base", None, "happy")),
        ("org/name@v1+org/lora@v2", ModelRef("org/name", "v1", "org/lora", "v2")),
        ("  base \n", ModelRef("base")),
        ({"model": "base"}, ModelRef("base")),
        ({"model": "base@v1", "lora": "happy@v2"}, ModelRef("base", "v1", "happy", "v2")),
        ({"model": {"path": "a+b@c"}}, ModelRef("a+b@c")),
        ({"model": {"path": "base", "revision": 7}, "lora": None}, ModelRef("base", "7")),
        ({"model": "base", "lora": {"path": "happy", "revision": "main"}}, ModelRef("base", None, "happy", "main")),
    ],
)
def test_what_is_a_reference(value: object, wanted: ModelRef) -> None:
    assert parsed(value) == wanted


@pytest.mark.parametrize("text", ["base", "org/name@v1", "base+happy", "org/name@v1+org/lora@v2"])
def test_a_reference_prints_as_it_is_written(text: str) -> None:
    assert str(parsed(text)) == text
    assert parsed(str(parsed(text))) == parsed(text)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "  ",
        "@main",
        "base@",
        "base@a@b",
        "base+",
        "+happy",
        "a+b+c",
        "base+happy@",
        {},
        {"path": "base"},
        {"model": "base", "adapter": "happy"},
        {"model": {"path": 3}},
        {"model": {"revision": "main"}},
        {"model": {"path": ""}},
        {"model": {"path": "base", "subfolder": "x"}},
        {"model": ""},
        {"model": "base", "lora": ["happy"]},
        {"model": "base", "override_architecture": "Other"},
        ["base"],
        3,
    ],
)
def test_what_is_none_is_noted_with_the_way_out(value: object) -> None:
    problems: list[KittybuildError] = []
    assert parse_reference(value, NOWHERE, problems) is None
    (problem,) = problems
    assert (problem.code, problem.at) == ("KB111", "<recipe>:0:0")
    assert problem.hint == "write NAME, PATH, org/name@revision or MODEL+ADAPTER"


def test_the_parts_of_a_reference() -> None:
    reference = parsed("org/name@v1+org/lora@v2")
    assert (reference.base_text, reference.adapter_text) == ("org/name@v1", "org/lora@v2")
    assert parsed("base").adapter_text is None


def test_paths_with_our_signs_in_them_are_told_apart() -> None:
    odd = parsed({"model": {"path": "a+b"}, "lora": {"path": "c@d"}})
    assert str(odd) == "'a+b'+'c@d'"
    assert str(parsed({"model": {"path": "a+b"}})) != str(parsed("a+b"))
