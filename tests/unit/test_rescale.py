"""The words of `rescale`, the parameters that do not go together, and norms that no cut changes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from kittybuild.builders.base import BLOCK
from kittybuild.builders.norms import Order, norm
from kittybuild.builders.registry import BUILTIN
from kittybuild.model.method import Method, Param
from tests.jobs import drawn, halved


def method(name: str) -> Method:
    found = BUILTIN[name].method
    assert found is not None
    return found


def rescale(name: str) -> Param:
    found = method(name).param("rescale")
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("given", "means"),
    [
        *((word, word) for word in ("none", "l1", "l2", "linf", "density", "probability")),
        *((word, "l1") for word in (True, 1, "true", "yes")),
        *((word, "none") for word in (False, 0, "false", "off")),
    ],
)
def test_rescale_takes_our_words_and_the_peers(given: Any, means: str) -> None:
    assert rescale("ties").parse(given) == means


@pytest.mark.parametrize("given", ["l3", "L1", "", 2, 0.5])
def test_rescale_takes_no_other(given: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^must be one of none, l1, l2, linf, density, probability, or true or false$"
    ):
        rescale("ties").parse(given)


def test_a_choice_without_booleans_takes_none() -> None:
    param = Param("mode", str, "shared", "", choices=("a", "true"))
    assert param.parse("true") == "true"
    with pytest.raises(ValueError, match=r"^must be one of a, true$"):
        param.parse(True)
    assert Param("name", str, "shared", "").parse("any") == "any"


def test_the_defaults_are_mergekits() -> None:
    names = ("ties", "dare_ties", "dare_linear", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear")
    values = {
        name: [getattr(method(name).param(param), "default", None) for param in ("normalize", "rescale")]
        for name in names
    }
    assert values == {
        "ties": [True, "none"],
        "dare_ties": [False, "l1"],
        "dare_linear": [False, "l1"],
        "breadcrumbs": [False, "none"],
        "breadcrumbs_ties": [False, "none"],
        "della": [True, "l1"],
        "della_linear": [False, "l1"],
    }


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "breadcrumbs_ties", "consensus_ties"])
def test_only_chance_has_probabilities(name: str) -> None:
    assert method(name).check({"rescale": "density"}) is None
    complaint = method(name).check({"rescale": "probability"})
    assert complaint is not None
    assert "kept by chance" in complaint
    assert method("dare_ties").check({"rescale": "probability", "density": [0.5]}) is None


@pytest.mark.parametrize("name", ["della", "della_linear"])
@pytest.mark.parametrize(
    ("density", "epsilon", "fits"),
    [
        (0.5, 0.15, True),
        (0.5, 0.499, True),
        (0.5, 0.5, False),
        (0.1, 0.15, False),
        (0.9, 0.15, False),
        (0.9, 0.05, True),
        (1.0, 0.15, True),
        (1.2, 0.15, True),
        (0.0, 0.15, True),
    ],
)
def test_della_says_where_epsilon_leaves_no_probabilities(
    name: str, density: float, epsilon: float, fits: bool
) -> None:
    params = {"density": [0.5, density], "epsilon": [0.1, epsilon], "rescale": "l1"}
    complaint = method(name).check(params)
    assert (complaint is None) == fits
    if complaint:
        assert f"density {density:g} and epsilon {epsilon:g}" in complaint


# ---- norms


def by_definition(values: np.ndarray, order: Order, leaf: int) -> float:
    wide = abs(values.astype(np.float64))
    if order == "linf":
        return float(wide.max()) if len(wide) else 0.0
    wide = wide * wide if order == "l2" else wide
    total = 0.0
    for part in cut(wide, leaf):
        total += halved(part.tolist())
    return math.sqrt(total) if order == "l2" else total


def cut(values: np.ndarray, size: int) -> list[np.ndarray]:
    return [values[start : start + size] for start in range(0, len(values), size)]


@pytest.mark.parametrize("order", ["l1", "l2", "linf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("leaf", [1, 7, 900, BLOCK, 100_000])
def test_a_norm_is_the_fixed_tree_of_its_leaves(order: Order, dtype: torch.dtype, leaf: int) -> None:
    for leaves in (0, 1, 3, 200) if leaf < BLOCK else (0, 1, 3):
        values = drawn("norm", leaf * leaves + (999 if leaf == BLOCK else 0), dtype=dtype).numpy()
        wanted = by_definition(values, order, leaf)
        for several in (1, 2, 150):
            found, before = norm(order, leaf), values.copy()
            for part in cut(values, several * leaf):
                found.add(part)
            assert found.value() == wanted
            assert np.array_equal(values, before)


@pytest.mark.parametrize("order", ["l1", "l2", "linf"])
def test_a_norm_of_nan_is_nan(order: Order) -> None:
    found = norm(order, 2)
    for part in ([1.0, float("nan")], [2.0, 3.0]):
        found.add(np.array(part))
    assert math.isnan(found.value())
