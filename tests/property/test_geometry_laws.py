"""Laws of the methods that work on angles and statistics: their formulas, the cut of the work, what changes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kittybuild.builders.base import BLOCK
from kittybuild.builders.registry import BUILTIN
from kittybuild.builders.selection import IN_MEMORY
from tests.geometry import EXACT, NEAR, importance, least_important
from tests.jobs import bits, drawn, make, rounded

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WIDE = (torch.float64, torch.float32)
SHAPES = ((), (0,), (1,), (3, 0, 2), (2, 3), (40,), (5, 7), (3, 4, 5), (6, 1))
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Half a unit of the last place of numbers from 1 on."""


@dataclass(frozen=True)
class Case:
    """A builder with its inputs and parameters."""

    builder: str
    inputs: list[Tensor]
    params: dict[str, Any]

    def made(self, **options: Any) -> Tensor:
        """What the builder makes of them."""
        return make(self.builder, self.inputs, self.params, **options).tensor

    def working(self) -> list[np.ndarray[Any, Any]]:
        """The inputs in the working dtype."""
        wide = torch.float64 if torch.float64 in [t.dtype for t in self.inputs] else torch.float32
        return [t.to(wide).numpy() for t in self.inputs]


WEIGHTS = (0.3, 1.0, 2.5, 0.0, -0.4, 1 / 3)


@st.composite
def parameters(draw: st.DrawFn, builder: str, count: int, based: bool) -> dict[str, Any]:
    """Parameters for so many models, beside a base if it is based. (No weights cancel.)"""
    weights = draw(st.permutations(WEIGHTS))[:count]
    by_builder: Mapping[str, dict[str, Any]] = {
        "slerp": {"t": None, "weight": weights, "base": based},
        "nuslerp": {
            "weight": weights,
            "base": based,
            "nuslerp_flatten": draw(st.booleans()),
            "nuslerp_row_wise": draw(st.booleans()),
        },
        "multislerp": {"weight": weights, "base": based, "normalize_weights": draw(st.booleans()), "eps": 1e-8},
        "karcher": {"max_iter": draw(st.sampled_from([0, 1, 10])), "tol": draw(st.sampled_from([1e-5, 1e-9]))},
        "model_stock": {"filter_wise": draw(st.booleans())},
        "nearswap": {"t": draw(st.sampled_from([0.0, 1e-7, 0.01, 0.3, 2.0]))},
        "sce": {"select_topk": draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0, 3.0]))},
        "ram": {"epsilon": draw(st.sampled_from([0.0, 1e-5, 0.1, 0.5]))},
        "ramplus_tl": {
            "epsilon": draw(st.sampled_from([0.0, 1e-5, 0.1, 0.5])),
            "r": draw(st.sampled_from([0.1, 1.0, -0.5])),
            "alpha": draw(st.sampled_from([0.2, 0.0, 3.0])),
        },
        "arcee_fusion": {},
    }
    return by_builder[builder]


COUNTS = {"slerp": (2, 2), "nuslerp": (2, 2), "multislerp": (1, 4), "karcher": (1, 4), "model_stock": (2, 4)}
PAIRED = {"nearswap": (1, 1), "arcee_fusion": (1, 1)}
MANY = {"sce": (0, 3), "ram": (0, 3), "ramplus_tl": (0, 3)}
MODELS: Mapping[str, tuple[int, int]] = {**COUNTS, **PAIRED, **MANY}
"""How many models a method takes beside its base."""
OPTIONAL = ("slerp", "nuslerp", "multislerp")
BASED = tuple(name for name in MODELS if name not in (*OPTIONAL, "karcher"))


@st.composite
def cases(draw: st.DrawFn, builders: tuple[str, ...], shapes: tuple[tuple[int, ...], ...] = SHAPES) -> Case:
    """Any of these builders on any dtypes and shape, with zeros and equal models among the inputs."""
    builder = draw(st.sampled_from(builders))
    count = draw(st.integers(*MODELS[builder]))
    based = builder in BASED or (builder in OPTIONAL and draw(st.booleans()))
    shape = draw(st.sampled_from(shapes))
    dtypes = draw(st.sampled_from([[a] * 5 for a in FLOATS] + [[FLOATS[i] for i in (1, 3, 2, 0, 1)]]))
    inputs = []
    for index in range(count + based):
        seed = draw(st.integers(0, 30))
        tensor = drawn(f"geometry {seed}", *shape, dtype=dtypes[index])
        inputs.append(torch.zeros_like(tensor) if seed == 30 else tensor)
    return Case(builder, inputs, draw(parameters(builder, count, based)))


def assert_equal(found: Tensor, wanted: Tensor) -> None:
    """Equal numbers; zeros of either sign are equal, and so are all NaN."""
    assert found.dtype == wanted.dtype
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num()), (found, wanted)


def assert_near(found: Tensor, wanted: Any, size: Any, working: torch.dtype, units: int = 8) -> None:
    """Within so many half units of the working dtype in terms of this size, rounded once to the dtype found."""
    wanted, size = (torch.as_tensor(np.asarray(part)).double() for part in (wanted, size))
    allowed = (
        units * UNIT[working] * size + UNIT[found.dtype] * wanted.abs() + 2.0**-24 * (found.dtype is torch.float16)
    )
    assert ((found.double() - wanted).abs() <= allowed).all(), (found, wanted, allowed)


# ---- the formulas


@settings(max_examples=500)
@given(cases(tuple(NEAR)))
def test_a_method_of_angles_is_its_formula(case: Case) -> None:
    xs = case.working()
    assume(xs[0].size)
    wanted, size = NEAR[case.builder](xs, case.params)
    assert_near(case.made(), wanted, size, torch.from_numpy(xs[0].reshape(-1)).dtype, units=16)


@settings(max_examples=500)
@given(cases(tuple(EXACT)), st.sampled_from([None, *FLOATS]))
def test_a_method_of_elements_is_its_formula_in_single_steps(case: Case, dtype: torch.dtype | None) -> None:
    dtype = dtype or case.inputs[0].dtype
    wanted = torch.from_numpy(np.asarray(EXACT[case.builder](case.working(), case.params)))
    assert_equal(case.made(dtype=dtype), rounded(wanted, dtype))


@settings(max_examples=200)
@given(cases(("arcee_fusion",)))
def test_arcee_fusion_takes_what_is_important(case: Case) -> None:
    base, other = case.working()
    assume(base.size)
    found = importance(base, other)
    least = least_important(found)
    clear = torch.from_numpy(np.asarray((abs(found - least) > 1e-5 * abs(least)) | (found == least)))
    wanted = torch.from_numpy(np.asarray(base + (other - base) * (found >= least).astype(base.dtype)))
    made = case.made()
    assert_equal(made[clear], rounded(wanted, made.dtype)[clear])
    either = (made == rounded(torch.from_numpy(np.asarray(base)), made.dtype)) | (made == rounded(wanted, made.dtype))
    assert (either | ~clear).all()


def test_arcee_fusion_of_four_elements_has_the_least_as_its_first_quartile() -> None:
    """1.1 + 1.5 · (1.2 - 1) = 1.4: from 0 instead of the least it would be 2.9."""
    base = torch.zeros(4)
    other = torch.tensor([1.1, -2.0, 1.0, 1.2])
    assert make("arcee_fusion", [base, other]).tensor.tolist() == [0.0, -2.0, 0.0, 0.0]


def test_ram_by_hand() -> None:
    """The first element is of one model alone, the second of both; a model shares one element and has one alone."""
    base, one, other = torch.ones(3), torch.tensor([3.0, 5.0, 1.0]), torch.tensor([1.0, 3.0, -7.0])
    assert make("ram", [base, one, other], {"epsilon": 1.5}).tensor.tolist() == [3.0, 4.0, -7.0]
    plus = {"epsilon": 1.0, "r": 0.5, "alpha": 2.0}
    assert make("ramplus_tl", [base, one, other], plus).tensor.tolist() == [4.0, 4.0, -11.0]
    assert make("ramplus_tl", [base, one, other], {**plus, "alpha": 0.25}).tensor.tolist() == [3.25, 4.0, -8.0]
    third = make("ramplus_tl", [base, one, other], {**plus, "epsilon": 1.5}).tensor - torch.tensor([11 / 3, 4, -29 / 3])
    assert third.abs().max() < 1e-6


@settings(max_examples=150)
@given(cases(tuple(MODELS), ((0,), (3, 0, 2), (4, 0))))
def test_what_is_empty_stays_empty(case: Case) -> None:
    assert case.made().shape == case.inputs[0].shape


# ---- the cut of the work

SHAPE = (351, 400)  # more than two leaves, the last of them short; no leaf ends with a row
PARAMS: Mapping[str, tuple[int, list[dict[str, Any]]]] = {
    "slerp": (3, [{"t": None, "weight": [0.4, 0.7], "base": True}]),
    "nuslerp": (
        3,
        [
            {"weight": [0.4, 0.7], "base": True, "nuslerp_flatten": flat, "nuslerp_row_wise": columns}
            for flat, columns in ((True, False), (False, False), (False, True))
        ],
    ),
    "multislerp": (4, [{"weight": [0.4, 0.7, 0.1], "base": True, "normalize_weights": True, "eps": 1e-8}]),
    "karcher": (3, [{"max_iter": 10, "tol": 1e-5}]),
    "model_stock": (4, [{"filter_wise": False}, {"filter_wise": True}]),
    "nearswap": (2, [{"t": 0.01}]),
    "sce": (4, [{"select_topk": 0.3}, {"select_topk": 1.0}]),
    "ram": (3, [{"epsilon": 0.2}]),
    "ramplus_tl": (3, [{"epsilon": 0.2, "r": 0.1, "alpha": 0.2}]),
    "arcee_fusion": (2, [{}]),
}
EACH = [(name, params) for name, (_, several) in PARAMS.items() for params in several]


def apart(builder: str, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    """As many inputs as PARAMS has for a method, in all directions."""
    return [drawn(f"apart {index}", *shape, dtype=dtype) for index in range(PARAMS[builder][0])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("builder", "params"), EACH)
def test_the_block_size_changes_nothing(builder: str, params: dict[str, Any], dtype: torch.dtype) -> None:
    inputs = apart(builder, dtype)
    made = [make(builder, inputs, params, blocks=blocks, dtype=torch.float32) for blocks in (1, 2, 3, 64, 1000)]
    assert len({one.digest for one in made}) == 1


@pytest.mark.parametrize(("builder", "params"), [each for each in EACH if BUILTIN[each[0]].rows])
def test_a_block_may_begin_anywhere_between_rows(builder: str, params: dict[str, Any]) -> None:
    inputs = apart(builder, shape=(5, 7, 11))
    made = [make(builder, inputs, params, blocks=blocks) for blocks in (1, 2, 3, 10, 35)]
    assert len({one.digest for one in made}) == 1


@pytest.mark.parametrize("builder", ["arcee_fusion", "sce"])
def test_a_selection_among_millions_is_exact(builder: str) -> None:
    shape = (1100, 4000)
    assert math.prod(shape) > IN_MEMORY
    inputs = [drawn(f"millions {index}", *shape) for index in range(3 if builder == "sce" else 2)]
    case = Case(builder, inputs, {"select_topk": 0.3} if builder == "sce" else {})
    made = case.made(blocks=300 if builder == "arcee_fusion" else 16)
    if builder == "sce":
        changed = (made != inputs[0]).sum()
        assert 0.29 * made.numel() < changed <= 0.3 * made.numel()
        return
    base, other = case.working()
    found = importance(base, other)
    wanted = torch.from_numpy(base + (other - base) * (found >= least_important(found)).astype(base.dtype))
    assert int((made != wanted).sum()) <= 4


@pytest.mark.parametrize(
    ("builder", "params", "passes"),
    [
        ("slerp", {"t": 0.3}, 2),
        ("nuslerp", PARAMS["nuslerp"][1][0], 2),
        ("nuslerp", PARAMS["nuslerp"][1][1], 1),
        ("nuslerp", PARAMS["nuslerp"][1][2], 2),
        ("multislerp", PARAMS["multislerp"][1][0], 2),
        ("karcher", PARAMS["karcher"][1][0], 2),
        ("model_stock", {"filter_wise": False}, 2),
        ("model_stock", {"filter_wise": True}, 1),
        ("nearswap", {"t": 0.1}, 1),
        ("sce", {"select_topk": 1.0}, 2),
        ("sce", {"select_topk": 0.5}, 4),
        ("ram", {"epsilon": 0.1}, 1),
        ("ramplus_tl", PARAMS["ramplus_tl"][1][0], 2),
        ("arcee_fusion", {}, 3),
    ],
)
def test_how_often_inputs_are_read(builder: str, params: dict[str, Any], passes: int) -> None:
    inputs = apart(builder)[: 2 if params == {"t": 0.3} else None]
    assert make(builder, inputs, params, blocks=1).read == [passes * 4 * math.prod(SHAPE)] * len(inputs)


# ---- equal inputs


@settings(max_examples=300)
@given(cases((*BASED, *OPTIONAL)))
def test_models_equal_to_the_base_give_the_base_bit_for_bit(case: Case) -> None:
    assume(case.params.get("base", True) and case.builder != "nearswap")
    same = [case.inputs[0]] * len(case.inputs)
    assert_equal(make(case.builder, same, case.params).tensor, same[0])


@settings(max_examples=200)
@given(cases((*OPTIONAL, "karcher", "nearswap")))
def test_equal_models_give_that_model(case: Case) -> None:
    """Exactly where the output is shorter than the working dtype; else their shares, which are rounded, add up."""
    assume(not case.params.get("base") and case.params.get("normalize_weights", True))
    model = case.inputs[0]
    working = torch.float64 if model.dtype is torch.float64 else torch.float32
    assume(float(model.double().norm()) > 1e-3)
    found = make(case.builder, [model] * len(case.inputs), case.params).tensor
    shares = (
        max(1.0, sum(map(abs, case.params["weight"])) / abs(sum(case.params["weight"])))
        if "weight" in case.params
        else 1
    )
    if working is model.dtype:
        assert_near(found, model.numpy(), model.abs().numpy() * shares, working)
    else:
        assert_equal(found, model)


@settings(max_examples=60)
@given(st.sampled_from(FLOATS), st.integers(2, 5), st.booleans(), st.sampled_from(SHAPES))
def test_model_stock_of_equal_fine_tunes_is_that_fine_tune(
    dtype: torch.dtype, count: int, filter_wise: bool, shape: tuple[int, ...]
) -> None:
    base, tuned = drawn("base", *shape, dtype=dtype), drawn("tuned", *shape, dtype=dtype)
    found = make("model_stock", [base, *[tuned] * count], {"filter_wise": filter_wise}).tensor
    working = torch.float64 if dtype is torch.float64 else torch.float32
    assert_near(found, tuned.double().numpy(), (base.double().abs() + tuned.double().abs()).numpy(), working)


# ---- models that take no part


@settings(max_examples=150)
@given(cases(("multislerp",)), st.integers(0, 29), st.integers(0, 4))
def test_a_direction_of_weight_zero_changes_nothing(case: Case, seed: int, place: int) -> None:
    """Of two and more models: one alone is taken as it is, whatever its weight."""
    assume(len(case.params["weight"]) > 1)
    more = drawn(f"more {seed}", *case.inputs[0].shape, dtype=case.inputs[-1].dtype)
    weights, based = list(case.params["weight"]), case.params["base"]
    place = min(place, len(weights))
    inputs = [*case.inputs[: place + based], more, *case.inputs[place + based :]]
    weights.insert(place, 0.0)
    found = make("multislerp", inputs, {**case.params, "weight": weights}, dtype=case.inputs[0].dtype).tensor
    assert_equal(found, case.made())


@settings(max_examples=100)
@given(cases(("slerp", "nuslerp")), st.booleans())
def test_the_other_model_of_weight_zero_changes_nothing(case: Case, first: bool) -> None:
    """Without a base that is the model itself, else the base and its difference, added again."""
    params = {**case.params, "weight": [0.7, 0.0] if first else [0.0, 0.7]}
    found, xs = make(case.builder, case.inputs, params).tensor, case.working()
    alone = xs[-2 if first else -1]
    wanted = xs[0] + (alone - xs[0]) if params["base"] else alone
    assert_equal(found, rounded(torch.from_numpy(np.asarray(wanted)), found.dtype))


@settings(max_examples=60)
@given(cases(("nearswap", "sce")))
def test_what_takes_nothing_leaves_the_base(case: Case) -> None:
    nothing = {"nearswap": {"t": 0.0}, "sce": {"select_topk": 0.0}}[case.builder]
    assert_equal(make(case.builder, case.inputs, nothing).tensor, case.inputs[0])


@settings(max_examples=60)
@given(st.sampled_from(FLOATS), st.sampled_from(SHAPES))
def test_one_model_is_taken_as_it_is(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    base, model = drawn("base", *shape, dtype=dtype), drawn("model", *shape, dtype=dtype)
    params = {"weight": [0.3], "base": True, "normalize_weights": True, "eps": 1e-8}
    assert bits(make("multislerp", [base, model], params).tensor) == bits(model)
    assert_equal(make("karcher", [model], {"max_iter": 10, "tol": 1e-5}).tensor, model)


# ---- the order of models


@settings(max_examples=200)
@given(cases(("multislerp", "karcher", "model_stock", "sce", "ram", "ramplus_tl")))
def test_the_order_of_two_models_does_not_matter(case: Case) -> None:
    """Bit for bit; of more models sums are taken in another order."""
    based = case.builder in BASED or bool(case.params.get("base"))
    assume(len(case.inputs) == 2 + based and len({t.dtype for t in case.inputs}) == 1)
    swapped = [*case.inputs[:based], *reversed(case.inputs[based:])]
    params = {key: value[::-1] if isinstance(value, list) else value for key, value in case.params.items()}
    assert_equal(make(case.builder, swapped, params).tensor, case.made())


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(
    ("builder", "params"), [each for each in EACH if each[0] in ("multislerp", "karcher", "model_stock", "ram")]
)
def test_the_order_of_more_models_matters_as_much_as_rounding(
    builder: str, params: dict[str, Any], dtype: torch.dtype
) -> None:
    inputs = apart(builder, dtype, (40, 50))
    based = builder != "karcher"
    turned = [*inputs[:based], *inputs[based:][1:], inputs[based]]
    again = {key: [*value[1:], value[0]] if isinstance(value, list) else value for key, value in params.items()}
    size = sum(tensor.double().abs() for tensor in inputs)
    assert_near(make(builder, turned, again).tensor, make(builder, inputs, params).tensor, size, dtype, units=32)


@settings(max_examples=60)
@given(st.sampled_from(FLOATS), st.sampled_from(SHAPES), st.booleans(), st.booleans())
def test_nuslerp_of_swapped_models_is_nuslerp(
    dtype: torch.dtype, shape: tuple[int, ...], flat: bool, columns: bool
) -> None:
    a, b = drawn("a", *shape, dtype=dtype), drawn("b", *shape, dtype=dtype)
    params = {"base": False, "nuslerp_flatten": flat, "nuslerp_row_wise": columns}
    one, other = (
        make("nuslerp", models, {**params, "weight": weights}).tensor
        for models, weights in (([a, b], [0.75, 0.25]), ([b, a], [0.25, 0.75]))
    )
    assert bits(one) == bits(other)


# ---- one method is another


@settings(max_examples=100)
@given(st.integers(0, 99), st.sampled_from([0.0, 0.25, 0.5, 0.625, 1.0]), st.sampled_from(FLOATS[1:]))
def test_nuslerp_is_slerp_where_neither_is_straight(seed: int, t: float, dtype: torch.dtype) -> None:
    """Bit for bit: the angle's functions differ by less than decides a rounding to float32."""
    a, b = drawn(f"one {seed}", 5, 8, dtype=dtype), drawn(f"other {seed}", 5, 8, dtype=dtype)
    weights = {"weight": [1 - t, t], "base": False}
    flat = {**weights, "nuslerp_flatten": True, "nuslerp_row_wise": False}
    wanted = bits(make("slerp", [a, b], {"t": t}).tensor)
    assert bits(make("slerp", [a, b], {"t": None, **weights}).tensor) == wanted
    assert bits(make("nuslerp", [a, b], flat).tensor) == wanted


@settings(max_examples=60)
@given(st.sampled_from(FLOATS), st.booleans())
def test_rows_are_tensors_of_their_own(dtype: torch.dtype, based: bool) -> None:
    inputs = [drawn(f"rows {index}", 6, 50, dtype=dtype) for index in range(4)]
    flat = {"weight": [0.2, 0.5], "base": based, "nuslerp_flatten": True, "nuslerp_row_wise": False}
    rows = {**flat, "nuslerp_flatten": False}
    for builder, count, whole, apiece in (
        ("nuslerp", 2 + based, flat, rows),
        ("model_stock", 4, {"filter_wise": False}, {"filter_wise": True}),
    ):
        found = make(builder, inputs[:count], apiece).tensor
        for index, row in enumerate(found):
            assert bits(make(builder, [x[index] for x in inputs[:count]], whole).tensor) == bits(row.contiguous())


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("based", [True, False])
def test_columns_are_rows_of_the_transposed(dtype: torch.dtype, based: bool) -> None:
    """But for sums in another order."""
    inputs = [drawn(f"columns {index}", 60, 50, dtype=dtype) for index in range(2 + based)]
    params = {"weight": [0.2, 0.5], "base": based, "nuslerp_flatten": False, "nuslerp_row_wise": True}
    found = make("nuslerp", inputs, params).tensor
    wanted = make("nuslerp", [x.T.contiguous() for x in inputs], {**params, "nuslerp_row_wise": False}).tensor.T
    assert_near(found, wanted, sum(x.double().abs() for x in inputs), dtype)


@settings(max_examples=60)
@given(st.integers(0, 99), st.sampled_from(WIDE))
def test_the_karcher_mean_of_two_is_the_middle_of_their_arc(seed: int, dtype: torch.dtype) -> None:
    """Of two models of one length; else its length is the mean of theirs."""
    one = drawn(f"middle {seed}", 64, dtype=dtype)
    other = one.flip(0)
    found = make("karcher", [one, other], {"max_iter": 10, "tol": 1e-9}).tensor
    size = one.double().abs() + other.double().abs()
    assert_near(found, make("slerp", [one, other], {"t": 0.5}).tensor, size, dtype)
    longer = make("karcher", [one, other * 4], {"max_iter": 10, "tol": 1e-9}).tensor
    assert_near(longer, found.double() * 2.5, size * 2.5, dtype)


@pytest.mark.parametrize(
    ("builder", "params"),
    [each for each in EACH if each[0] in ("slerp", "nuslerp", "karcher", "model_stock", "sce")],
)
def test_models_twice_as_large_give_twice_as_much(builder: str, params: dict[str, Any]) -> None:
    inputs = apart(builder, shape=(30, 40))
    assert bits(make(builder, [x * 2 for x in inputs], params).tensor) == bits(make(builder, inputs, params).tensor * 2)


# ---- zeros, opposites, numbers that are none


@pytest.mark.parametrize(("builder", "params"), EACH)
def test_zeros_give_zeros(builder: str, params: dict[str, Any]) -> None:
    found = make(builder, [torch.zeros(3, 5)] * PARAMS[builder][0], params).tensor
    assert_equal(found, torch.zeros(3, 5))


@pytest.mark.parametrize("dtype", FLOATS)
def test_opposites_have_a_mean_of_their_own(dtype: torch.dtype) -> None:
    """No way between them is the shortest: what is straight is zero in the middle, the Karcher mean is the first."""
    one = drawn("opposites", 3, 5, dtype=dtype)
    half = {"weight": [0.5, 0.5], "base": False}
    nuslerp = {**half, "nuslerp_flatten": True, "nuslerp_row_wise": False}
    multislerp = {**half, "normalize_weights": True, "eps": 1e-8}
    for builder, params in (("slerp", {"t": None, **half}), ("nuslerp", nuslerp), ("multislerp", multislerp)):
        assert_equal(make(builder, [one, -one], params).tensor, torch.zeros_like(one))
    assert_equal(make("karcher", [one, -one], {"max_iter": 10, "tol": 1e-5}).tensor, one)
    assert_equal(make("model_stock", [torch.zeros_like(one), one, -one], {"filter_wise": False}).tensor, one * 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("builder", "params"), EACH)
def test_what_is_not_finite_is_never_lost(builder: str, params: dict[str, Any], bad: float) -> None:
    """Wherever it is in the last model, the output is not finite there. (SCE selects it first.)"""
    for row, column in ((0, 0), (17, 3), (39, 29)):
        inputs = apart(builder, shape=(40, 30))
        inputs[-1][row, column] = bad
        made = make(builder, inputs, params)
        assert not made.tensor[row, column].isfinite()
        assert made.nonfinite >= 1


def test_sce_selects_what_is_not_a_number_first() -> None:
    inputs = apart("sce", shape=(40, 30))
    inputs[2][3, 4] = math.nan
    assert make("sce", inputs, {"select_topk": 0.01}).tensor[3, 4].isnan()


def test_leaves_are_what_the_tests_take_them_for() -> None:
    assert 2 * BLOCK < math.prod(SHAPE) < 3 * BLOCK
    assert BLOCK % SHAPE[1]
