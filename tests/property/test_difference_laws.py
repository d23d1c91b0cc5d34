"""Laws of the methods on differences: the formula in single IEEE steps, whatever the blocks; what changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kittybuild.builders.base import BLOCK
from kittybuild.builders.random import Draws
from kittybuild.builders.registry import BUILTIN
from tests.jobs import bits, drawn, halved, make, rounded

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((), (0,), (1,), (3, 0, 2), (2, 3), (40,), (7, 1), (5, 7), (2, 3, 5))
DARE, DELLA = ("dare_ties", "dare_linear"), ("della", "della_linear")
CRUMBS, TALL = ("breadcrumbs", "breadcrumbs_ties"), ("consensus_ta", "consensus_ties")
ELECTING = ("ties", "dare_ties", "breadcrumbs_ties", "della", "consensus_ties")
DENSE = ("task_arithmetic", "consensus_ta")
METHODS = ("task_arithmetic", "ties", *DARE, *CRUMBS, *DELLA, *TALL)
FORMS = ("none", "l1", "l2", "linf", "density")
LONG = (301, 700)  # leaves begin within rows

Array = np.ndarray
Params = Mapping[str, Any]


# ---- the formulas, step by step in numpy: numpy rounds after each operation, in the working dtype


def kept(method: str, delta: Array, index: int, p: Params, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Which elements of a flat difference are kept, and each one's probability."""
    density, size = p["density"][index], delta.size
    if density >= 1 or density <= 0:
        return np.full(size, density >= 1), np.ones(size)
    falling = np.argsort(-abs(delta), kind="stable")
    keep, probability = np.zeros(size, bool), np.full(size, density)
    if method in ("ties", "consensus_ties"):
        keep[falling[: max(1, int(density * size))]] = True
    elif method in CRUMBS:
        target, top = int(density * size), int(p["gamma"][index] * size)
        least = max(0, size - target - top)  # ranks by rising magnitude: from this on so many are kept
        keep[falling[::-1][least : least + target]] = True
    else:
        if method in DELLA:
            probability = della_probabilities(delta, density, p["epsilon"][index], shape[-1] if shape else 1)
        integers = Draws(p["seed"], p["tensor"], index).integers(0, size)
        keep = (integers.astype(np.int64) + 2**31) / 2.0**32 < probability
    return keep, probability


def della_probabilities(delta: Array, density: float, epsilon: float, width: int) -> Array:
    result = np.empty_like(delta, np.float64).reshape(-1, width) if delta.size else np.empty((0, 1))
    for row, found in zip(delta.reshape(result.shape), result, strict=True):
        for rank, place in enumerate(np.argsort(abs(row), kind="stable")):
            spread = rank / (width - 1) * (2 * epsilon) if width > 1 else epsilon
            found[place] = spread + (density - epsilon) if width > 1 else density
    return result.ravel()


def norm(delta: Array, form: str, leaf: int) -> float:
    wide = abs(delta).astype(np.float64)
    if form == "linf":
        return float(wide.max(initial=0.0))
    wide = wide * wide if form == "l2" else wide
    total = 0.0
    for start in range(0, wide.size, max(1, leaf)):
        total += halved(wide[start : start + leaf].tolist())
    return math.sqrt(total) if form == "l2" else total


def sparse(method: str, delta: Array, index: int, p: Params, shape: tuple[int, ...]) -> Array:
    """A difference trimmed and rescaled."""
    if method in DENSE:
        return delta
    keep, probability = kept(method, delta, index, p, shape)
    part, form, number = np.where(keep, delta, 0).astype(delta.dtype), p["rescale"], delta.dtype.type
    if form == "density":
        return part / number(p["density"][index]) if 0 < p["density"][index] < 1 else part
    if form == "probability":
        return part / probability.astype(delta.dtype)
    if form == "none":
        return part
    leaf = BLOCK if method not in DELLA else shape[-1] if shape else 1
    before, after = norm(delta, form, leaf), norm(part, form, leaf)
    return part * number(before / after if min(before, after) >= 1e-7 else 1)


def summed(parts: list[Any]) -> Any:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def mixed(method: str, parts: list[Array], weights: list[Any], normalize: bool) -> Array:
    if method not in ELECTING:
        total = summed(weights)
        return summed(parts) / total if normalize and abs(total) >= 1e-8 else summed(parts)
    sign = np.where(summed(parts) >= 0, 1, -1)
    agrees = [np.sign(part) == sign for part in parts]
    mix = summed([np.where(yes, part, 0).astype(part.dtype) for yes, part in zip(agrees, parts, strict=True)])
    if not normalize:
        return mix
    divisor = summed([np.where(yes, w, 0).astype(mix.dtype) for yes, w in zip(agrees, weights, strict=True)])
    return mix / np.where(divisor == 0, 1, divisor).astype(mix.dtype)


def formula(method: str, inputs: list[Tensor], p: Params) -> Tensor:
    """What a method is, in the working dtype and flat."""
    wide = torch.float64 if torch.float64 in [t.dtype for t in inputs] else torch.float32
    shape = tuple(inputs[0].shape)
    base, *models = [t.to(wide).reshape(-1).numpy() for t in inputs]
    if not models:
        return torch.from_numpy(base)
    number = base.dtype.type
    weights, deltas = [number(weight) for weight in p["weight"]], [model - base for model in models]
    parts = [sparse(method, delta, index, p, shape) * weights[index] for index, delta in enumerate(deltas)]
    mix = mixed(method, parts, weights, p["normalize"])
    if method not in TALL:
        return torch.from_numpy(base + mix * number(p["lambda"]))
    votes = [abs(d) > number(factor) * abs(mix - d) for d, factor in zip(deltas, p["lambda"], strict=True)]
    return torch.from_numpy(base + np.where(summed([vote.astype(int) for vote in votes]) >= p["k"], mix, 0))


# ---- cases


@dataclass(frozen=True)
class Case:
    """A method with its inputs and parameters."""

    method: str
    inputs: list[Tensor]
    params: dict[str, Any]

    def made(self, **options: Any) -> Tensor:
        """What the builder makes of them."""
        return make(self.method, self.inputs, self.params, **options).tensor

    def but(self, **params: Any) -> Case:
        """The same with other parameters."""
        return replace(self, params={**self.params, **params})

    def every(self, name: str, value: float) -> Case:
        """The same with one value of a parameter for each model."""
        return self.but(**{name: [value] * (len(self.inputs) - 1)})


def params_of(method: str, count: int, draw: Callable[..., Any]) -> dict[str, Any]:
    """Parameters for `count` models."""
    number = st.sampled_from([0.0, 1.0, -1.0, 0.5, 0.3, 1 / 3, 2.5, -0.7, 1e-9])

    def each(values: Any) -> list[float]:
        return [draw(values) for _ in range(count)]

    chance = method in (*DARE, *DELLA)
    params: dict[str, Any] = {"weight": each(number), "normalize": draw(st.booleans()), "lambda": draw(number)}
    if method not in DENSE:
        forms = [*FORMS, *(["probability"] if chance else [])]
        params["rescale"] = draw(st.sampled_from(forms))
        densities = [0.0, 0.16, 0.2, 0.5, 0.84, 1.0, 1.5] if method in DELLA else [0.0, 0.01, 0.2, 0.5, 0.9, 1.0, 1.5]
        params["density"] = each(st.sampled_from(densities))
    if method in DELLA:
        params["epsilon"] = each(st.sampled_from([0.0, 0.1, 0.15]))
    if method in CRUMBS:
        params["gamma"] = each(st.sampled_from([0.0, 0.01, 0.1, 0.6, 1.0]))
    if method in TALL:
        params |= {"lambda": each(st.sampled_from([0.0, 0.2, 0.5, 1.0, 3.0])), "k": draw(st.integers(0, 4))}
    if chance:
        params |= {"seed": draw(st.integers(0, 5)), "tensor": "model.layers.3.mlp.up_proj.weight"}
    return params


@st.composite
def cases(draw: Any, methods: tuple[str, ...] = METHODS, models: tuple[int, int] = (0, 3), mixed: bool = True) -> Case:
    """A method on any dtypes and shape, with zeros, equal values and equal models among the inputs."""
    method, count = draw(st.sampled_from(methods)), draw(st.integers(*models))
    shape = draw(st.sampled_from(SHAPES))
    every = [[FLOATS[1], FLOATS[3], FLOATS[2], FLOATS[0]]] if mixed else []
    dtypes = draw(st.sampled_from([[a] * 4 for a in FLOATS] + every))
    inputs = []
    for index in range(count + 1):
        seed = draw(st.integers(0, 30))
        tensor = drawn(f"differences {seed}", *shape, dtype=dtypes[index])
        inputs.append(torch.round(tensor * 4) if seed % 3 == 0 else tensor)
    return Case(method, inputs, params_of(method, count, draw))


def plain(method: str, count: int = 2, **changed: Any) -> dict[str, Any]:
    """Parameters as a recipe would have them."""
    params = {
        "weight": [0.7, 0.4, -0.2][:count],
        "density": [0.3, 0.6, 0.5][:count],
        "gamma": [0.01, 0.2, 0.0][:count],
        "epsilon": [0.15, 0.1, 0.2][:count],
        "lambda": [0.4, 0.9, 0.6][:count] if method in TALL else 0.9,
        **{"normalize": True, "rescale": "none", "k": 1, "seed": 7, "tensor": "lm_head.weight", **changed},
    }
    known = BUILTIN[method].method
    assert known is not None
    taken = {param.name for param in known.params if not param.accepted}
    return {name: value for name, value in params.items() if name in taken or name in ("seed", "tensor")}


def assert_equal(found: Tensor, wanted: Tensor) -> None:
    """Equal numbers; zeros of either sign are equal, and so are all NaN."""
    assert found.dtype == wanted.dtype
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num()), (found, wanted)


def siblings(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A base and models near it."""
    base = drawn("base", *shape, dtype=torch.float64)
    models = [base + drawn(f"model {index}", *shape, dtype=torch.float64, scale=0.02) for index in range(count)]
    return [tensor.to(dtype) for tensor in (base, *models)]


# ---- the formula


@settings(max_examples=600)
@given(cases(), st.sampled_from([None, *FLOATS]))
def test_a_method_is_its_formula_in_single_steps(case: Case, dtype: torch.dtype | None) -> None:
    dtype = dtype or case.inputs[0].dtype
    with np.errstate(all="ignore"):
        wanted = formula(case.method, case.inputs, case.params)
    assert_equal(case.made(dtype=dtype, blocks=1).reshape(-1), rounded(wanted, dtype))


@pytest.mark.parametrize(
    ("method", "form"),
    [(method, form) for method in METHODS for form in FORMS] + [(m, "probability") for m in (*DARE, *DELLA)],
)
def test_large_tensors_are_the_formula_too(method: str, form: str) -> None:
    inputs, params = siblings(3, *LONG, dtype=torch.bfloat16), plain(method, 3, rescale=form)
    found = make(method, inputs, params, dtype=torch.float32, blocks=1).tensor
    assert_equal(found.reshape(-1), formula(method, inputs, params))


@pytest.mark.parametrize("method", ["task_arithmetic", "breadcrumbs"])
def test_the_sum_of_the_weights_is_rounded_at_each_step(method: str) -> None:
    weights = [0.1, 0.2, 0.4]
    assert summed([np.float32(weight) for weight in weights]) != np.float32(sum(weights))
    inputs, params = siblings(3, 500), plain(method, 3, weight=weights)
    assert_equal(make(method, inputs, params).tensor, formula(method, inputs, params))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["none", "l1", "linf"])
@pytest.mark.parametrize("method", METHODS)
def test_the_block_size_changes_nothing(method: str, form: str, dtype: torch.dtype) -> None:
    inputs, params = siblings(2, *LONG, dtype=dtype), plain(method, rescale=form)
    made = [make(method, inputs, params, blocks=blocks, dtype=torch.float32) for blocks in (1, 2, 3, 200, 400)]
    assert len({one.digest for one in made}) == 1


@pytest.mark.parametrize("method", METHODS)
def test_what_is_remembered_changes_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, params, draws = siblings(2, *LONG), plain(method, rescale="l1"), []

    def counted(self: Draws, start: int, count: int) -> Array:
        draws.append(count)
        return integers(self, start, count)

    integers = Draws.integers
    monkeypatch.setattr(Draws, "integers", counted)
    remembered, once = make(method, inputs, params, blocks=2), len(draws)
    monkeypatch.setattr("kittybuild.builders.merge.rescale.ROOM", 0)
    assert make(method, inputs, params, blocks=2).digest == remembered.digest
    assert len(draws) - once == 2 * once
    assert (once > 0) == (method in (*DARE, *DELLA))


@pytest.mark.parametrize("form", ["none", "l1"])
@pytest.mark.parametrize("method", METHODS)
def test_how_often_inputs_are_read(method: str, form: str) -> None:
    inputs, params = siblings(2, *LONG), plain(method, rescale=form)
    passes = 1 + (method in ("ties", "consensus_ties", *CRUMBS)) + (form == "l1" and method not in DENSE)
    assert make(method, inputs, params, blocks=1).read == [passes * inputs[0].nbytes] * 3
    if "density" in params:
        dense = make(method, inputs, {**params, "density": [1.0, 1.0]}, blocks=1)
        assert dense.read == [inputs[0].nbytes] * 3


# ---- rescaling


@pytest.mark.parametrize("form", ["l1", "l2", "linf"])
@pytest.mark.parametrize("method", ["ties", *DARE, *CRUMBS, *DELLA])
def test_the_kept_part_gets_its_norm_back(method: str, form: str) -> None:
    zero, delta = torch.zeros(*LONG), drawn("whole", *LONG)
    found = make(method, [zero, delta], plain(method, 1, rescale=form, weight=[1.0], **{"lambda": 1.0})).tensor
    order = {"l1": 1, "l2": 2, "linf": math.inf}[form]
    before, after = (float(torch.linalg.vector_norm(t.double(), ord=order)) for t in (delta, found))
    assert abs(after / before - 1) < 2.0**-22
    kept = found != 0
    factors = (found / delta)[kept]
    assert 0.2 < float(kept.float().mean()) < 0.4
    assert float(factors.max() / factors.min()) - 1 < 2.0**-21
    assert form == "linf" or float(factors.min()) > 1


@pytest.mark.parametrize(
    ("method", "form"), [*((m, "density") for m in DARE), *((m, "probability") for m in (*DARE, *DELLA))]
)
def test_by_density_and_by_probability_the_expectation_is_the_whole(method: str, form: str) -> None:
    zero, delta = torch.zeros(*LONG), drawn("whole", *LONG).abs()
    params = plain(method, 1, rescale=form, weight=[1.0], **{"lambda": 1.0})
    found = make(method, [zero, delta], params).tensor.double()
    probability = np.full(delta.numel(), 0.3)
    if method in DELLA:
        probability = della_probabilities(delta.reshape(-1).numpy(), 0.3, 0.15, LONG[-1])
    spread = math.sqrt(float((delta.double().reshape(-1).numpy() ** 2 * (1 - probability) / probability).sum()))
    assert abs(float(found.sum() - delta.double().sum())) < 5 * spread


# ---- what is kept


def test_dare_keeps_at_the_rate_and_inputs_apart() -> None:
    inputs = [torch.zeros(1 << 20), torch.ones(1 << 20), torch.ones(1 << 20) * 2]
    params = plain("dare_linear", weight=[1.0, 1.0], normalize=False, density=[0.3, 0.6], **{"lambda": 1.0})
    found = make("dare_linear", inputs, params).tensor
    for value, rate in ((0, 0.7 * 0.4), (1, 0.3 * 0.4), (2, 0.7 * 0.6), (3, 0.3 * 0.6)):
        count = int((found == value).sum())
        assert abs(count - rate * (1 << 20)) < 5 * math.sqrt((1 << 20) * rate * (1 - rate))


def test_della_keeps_the_larger_of_a_row_more_often() -> None:
    rows, width = 4000, 200
    delta = drawn("ranks", rows, width)
    params = plain("della_linear", 1, density=[0.4], epsilon=[0.3], weight=[1.0], normalize=False, **{"lambda": 1.0})
    found = make("della_linear", [torch.zeros(rows, width), delta], params, blocks=100).tensor
    by_rank = (found != 0).gather(1, delta.abs().argsort(dim=1)).double().sum(0)
    wanted = torch.linspace(0.1, 0.7, width, dtype=torch.float64)
    spread = (rows * wanted * (1 - wanted)).sqrt()
    assert ((by_rank - rows * wanted).abs() < 5 * spread).all()
    assert abs(float(by_rank.sum()) - 0.4 * rows * width) < 5 * float(spread.square().sum().sqrt())


@pytest.mark.parametrize("method", [*DARE, *DELLA])
def test_another_seed_tensor_or_place_among_the_models_gives_other_bits(method: str) -> None:
    base, model, _ = siblings(2, *LONG)
    params = plain(method, weight=[0.5, 0.5], density=[0.5, 0.5], epsilon=[0.1, 0.1])
    changed = [{}, {"seed": 8}, {"tensor": "model.norm.weight"}, {"density": [0.0, 0.5]}, {"density": [0.5, 0.0]}]
    digests = [make(method, [base, model, model], {**params, **change}).digest for change in changed]
    assert len(set(digests)) == len(changed)
    assert make(method, [base, model, model], params, blocks=3).digest == digests[0]


@settings(max_examples=200)
@given(cases(("breadcrumbs_ties",), models=(1, 3)), st.sampled_from([0.0, 1e-6, 0.02]))
def test_breadcrumbs_without_outliers_keep_the_largest_as_ties_does(case: Case, gamma: float) -> None:
    assume(all(int(density * case.inputs[0].numel()) > 0 for density in case.params["density"]))
    without = {name: value for name, value in case.params.items() if name != "gamma"}
    assert_equal(case.every("gamma", gamma).made(), make("ties", case.inputs, without).tensor)


def test_ties_with_equals_across_blocks_keeps_the_first() -> None:
    base, model = torch.zeros(2 * BLOCK + 12_345), torch.ones(2 * BLOCK + 12_345)
    params = plain("ties", 1, weight=[1.0], density=[0.7], normalize=False, **{"lambda": 1.0})
    for blocks in (1, 2, 4):
        found = make("ties", [base, model], params, blocks=blocks).tensor
        assert int(found.sum()) == int(0.7 * len(base))
        assert found[: int(0.7 * len(base))].all()


def test_a_tensor_of_one_element_is_kept_by_ties_and_by_chance() -> None:
    inputs = [torch.zeros(1), torch.ones(1)]
    assert make("ties", inputs, plain("ties", 1, density=[0.01], weight=[1.0], **{"lambda": 1.0})).tensor == 1
    found = [
        float(make("della_linear", inputs, plain("della_linear", 1, density=[0.5], seed=seed)).tensor) != 0
        for seed in range(200)
    ]
    assert 60 < sum(found) < 140


def test_breadcrumbs_leave_out_the_largest_and_keep_the_next() -> None:
    delta = torch.tensor([5.0, -9.0, 1.0, 9.0, -3.0, 3.0, 0.0, 3.0, 7.0, 2.0])
    made = {}
    for density, gamma in ((0.3, 0.2), (0.3, 0.1), (0.4, 0.0), (0.9, 0.3), (0.09, 0.5)):
        params = plain("breadcrumbs", 1, density=[density], gamma=[gamma], weight=[1.0], **{"lambda": 1.0})
        made[density, gamma] = make("breadcrumbs", [torch.zeros(10), delta], params).tensor.tolist()
    assert made[0.3, 0.2] == [5.0, 0, 0, 0, -3.0, 0, 0, 0, 7.0, 0]  # of equals the first
    assert made[0.3, 0.1] == [5.0, 0, 0, 9.0, 0, 0, 0, 0, 7.0, 0]  # of equals the first is the outlier
    assert made[0.4, 0.0] == [5.0, -9.0, 0, 9.0, 0, 0, 0, 0, 7.0, 0]
    assert made[0.9, 0.3] == [5.0, 0, 1.0, 9.0, -3.0, 3.0, 0, 3.0, 7.0, 2.0]  # the density goes before
    assert made[0.09, 0.5] == [0] * 10


# ---- what changes nothing


@settings(max_examples=300)
@given(cases())
def test_models_equal_to_the_base_give_the_base(case: Case) -> None:
    same = [case.inputs[0]] * len(case.inputs)
    assert_equal(replace(case, inputs=same).made(), same[0])


SAME_WHEN_WHOLE = {
    **dict.fromkeys(("dare_linear", "breadcrumbs", "della_linear"), "task_arithmetic"),
    **dict.fromkeys(("dare_ties", "breadcrumbs_ties", "della"), "ties"),
}


@settings(max_examples=300)
@given(cases(tuple(SAME_WHEN_WHOLE)), st.sampled_from([1.0, 1.5]))
def test_density_one_is_the_dense_method(case: Case, density: float) -> None:
    whole = case.every("density", density)
    assert bits(whole.made()) == bits(make(SAME_WHEN_WHOLE[case.method], case.inputs, whole.params).tensor)


@settings(max_examples=200)
@given(cases(tuple(method for method in METHODS if method not in DENSE)))
def test_density_zero_drops_a_model(case: Case) -> None:
    assert_equal(case.every("density", 0.0).made(), case.inputs[0])


@settings(max_examples=300)
@given(cases(tuple(method for method in METHODS if method not in TALL), models=(1, 3)), st.integers(0, 30))
def test_a_model_of_weight_zero_changes_nothing(case: Case, seed: int) -> None:
    first = case.inputs[0]
    more = [*case.inputs, drawn(f"more {seed}", *first.shape, dtype=first.dtype)]
    added = {"weight": 0.0, "density": 0.5, "epsilon": 0.1, "gamma": 0.1}
    params = {name: [*value, added[name]] if isinstance(value, list) else value for name, value in case.params.items()}
    assert_equal(make(case.method, more, params).tensor, case.made())


@settings(max_examples=200)
@given(cases(tuple(m for m in METHODS if m not in (*DARE, *DELLA)), (2, 2), mixed=False))
def test_the_order_of_two_models_does_not_matter(case: Case) -> None:
    swapped = [case.inputs[0], *reversed(case.inputs[1:])]
    params = {name: value[::-1] if isinstance(value, list) else value for name, value in case.params.items()}
    assert_equal(make(case.method, swapped, params).tensor, case.made())


@settings(max_examples=100)
@given(cases(TALL, models=(1, 3)))
def test_more_votes_than_models_leave_the_base_and_none_leave_the_mix(case: Case) -> None:
    assert_equal(case.but(k=4).made(), case.inputs[0])
    plain_method = {"consensus_ta": "task_arithmetic", "consensus_ties": "ties"}[case.method]
    dense = {**case.params, "lambda": 1.0}
    assert_equal(case.but(k=0).made(), make(plain_method, case.inputs, dense).tensor)


@settings(max_examples=100)
@given(cases(models=(1, 3)), st.integers(0, 39))
def test_a_nan_is_never_lost(case: Case, place: int) -> None:
    case = case if "density" not in case.params else case.every("density", 1.0)
    spoiled = case.inputs[-1].clone().reshape(-1)
    if place < len(spoiled):
        spoiled[place] = float("nan")
    inputs = [*case.inputs[:-1], spoiled.reshape(case.inputs[-1].shape)]
    found = make(case.method, inputs, case.params).tensor
    assert found.isnan().reshape(-1)[place : place + 1].all()
