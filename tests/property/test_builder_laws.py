"""Laws of the builders: the formula in single IEEE steps, for any block size, dtype and shape; what changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kittybuild.builders.base import BLOCK
from kittybuild.errors import BuildError
from tests.jobs import bits, drawn, make, rounded

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((), (0,), (1,), (3, 0, 2), (2, 3), (40,), (5, 7))


# ---- the formulas, step by step in numpy: numpy rounds after each operation, in the working dtype


def working(tensors: list[Tensor]) -> list[np.ndarray]:
    wide = torch.float64 if torch.float64 in [t.dtype for t in tensors] else torch.float32
    return [t.to(wide).reshape(-1).numpy() for t in tensors]


def in_dtype(numbers: list[float], like: np.ndarray) -> list[Any]:
    return [like.dtype.type(number) for number in numbers]


def summed(parts: list[Any]) -> Any:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def linear(xs: list[np.ndarray], p: Mapping[str, Any]) -> np.ndarray:
    weights = in_dtype(p["weight"], xs[0])
    result = summed([x * w for x, w in zip(xs, weights, strict=True)])
    return result / summed(weights) if p["normalize"] else result


def passthrough(xs: list[np.ndarray], p: Mapping[str, Any]) -> np.ndarray:
    return xs[0] * xs[0].dtype.type(p["scale"][0])


FORMULAS: Mapping[str, Callable[[list[np.ndarray], Mapping[str, Any]], np.ndarray]] = {
    "linear": linear,
    "passthrough": passthrough,
    "cast": lambda xs, p: xs[0],
}


@dataclass(frozen=True)
class Case:
    """A builder with its inputs and parameters."""

    builder: str
    inputs: list[Tensor]
    params: dict[str, Any]

    def made(self, **options: Any) -> Tensor:
        """What the builder makes of them."""
        return make(self.builder, self.inputs, self.params, **options).tensor


def params_of(builder: str, count: int, draw: st.DrawFn) -> dict[str, Any]:
    """Parameters for `count` inputs."""
    number = st.sampled_from([0.0, 1.0, -1.0, 0.5, 0.3, 1 / 3, 2.5, -0.7, 1e-9])
    weights = [draw(number) for _ in range(count)]
    if builder == "linear":
        return {"weight": weights, "normalize": draw(st.booleans())}
    return {"scale": weights[:1]} if builder == "passthrough" else {}


@st.composite
def cases(
    draw: st.DrawFn, builders: tuple[str, ...] = tuple(FORMULAS), models: tuple[int, int] = (1, 4), mixed: bool = True
) -> Case:
    """Any builder on any dtypes and shape, with zeros, equal values and equal models among the inputs."""
    builder = draw(st.sampled_from(builders))
    single = builder in ("passthrough", "cast")
    count = 1 if single else draw(st.integers(*models))
    shape = draw(st.sampled_from(SHAPES))
    every = [[FLOATS[1], FLOATS[3], FLOATS[2], FLOATS[0]]] if mixed else []
    dtypes = draw(st.sampled_from([[a] * 4 for a in FLOATS] + every))
    inputs = []
    for index in range(count):
        seed = draw(st.integers(0, 30))
        tensor = drawn(f"laws {seed}", *shape, dtype=dtypes[index])
        inputs.append(torch.round(tensor * 4) if seed % 3 == 0 else tensor)
    return Case(builder, inputs, params_of(builder, count, draw))


def assert_equal(found: Tensor, wanted: Tensor) -> None:
    """Equal numbers; zeros of either sign are equal, and so are all NaN."""
    assert found.dtype == wanted.dtype
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num()), (found, wanted)


@settings(max_examples=400)
@given(cases(), st.sampled_from([None, *FLOATS]))
def test_a_builder_is_its_formula_in_single_steps(case: Case, dtype: torch.dtype | None) -> None:
    dtype = dtype or case.inputs[0].dtype
    with np.errstate(all="ignore"):
        wanted = torch.from_numpy(FORMULAS[case.builder](working(case.inputs), case.params))
    assert_equal(case.made(dtype=dtype).reshape(-1), rounded(wanted, dtype))


def test_the_sum_of_the_weights_is_rounded_at_each_step() -> None:
    weights = [0.1, 0.2, 0.4]
    single = [np.float32(weight) for weight in weights]
    assert summed(single) not in (np.float32(sum(weights)), np.float32(sum(map(float, single))))
    models = [drawn(f"sum {index}", 500) for index in range(len(weights))]
    params = {"weight": weights, "normalize": True}
    assert_equal(make("linear", models, params).tensor, torch.from_numpy(linear(working(models), params)))


# ---- slerp, whose factors have no single steps


def slerp(base: np.ndarray, other: np.ndarray, t: float) -> np.ndarray:
    x, y = base.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    norms = [norm if norm > 1e-8 else 1.0 for norm in (np.sqrt(x @ x), np.sqrt(y @ y))]
    cosine = x @ y / norms[0] / norms[1]
    near, far = 1 - t, t
    if abs(cosine) <= 0.9995:
        theta = np.arccos(cosine)
        near, far = np.sin((1 - t) * theta) / np.sin(theta), np.sin(t * theta) / np.sin(theta)
    return (x * near + y * far).reshape(base.shape)


@settings(max_examples=150)
@given(st.integers(0, 40), st.integers(0, 40), st.floats(0, 1), st.sampled_from(FLOATS), st.sampled_from(SHAPES))
def test_slerp_is_its_formula(a: int, b: int, t: float, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    base, other = drawn(f"base {a}", *shape, dtype=dtype), drawn(f"base {b}", *shape, dtype=dtype)
    if a % 5 == 0:
        other = base * 2 if a % 2 else -other
    found = make("slerp", [base, other], {"t": t}).tensor
    wanted = torch.from_numpy(np.asarray(slerp(base.double().numpy(), other.double().numpy(), t)))
    step = {torch.float64: 2.0**-50, torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    size = base.double().abs() + other.double().abs()
    assert ((found.double() - wanted).abs() <= step * size + 2.0**-24 * (dtype is torch.float16)).all()


@settings(max_examples=60)
@given(st.sampled_from(FLOATS), st.sampled_from(SHAPES), st.sampled_from([0.25, 0.5, 0.625]))
def test_slerp_of_swapped_models_is_slerp_from_the_other_end(
    dtype: torch.dtype, shape: tuple[int, ...], t: float
) -> None:
    a, b = drawn("a", *shape, dtype=dtype), drawn("b", *shape, dtype=dtype)
    assert bits(make("slerp", [a, b], {"t": t}).tensor) == bits(make("slerp", [b, a], {"t": 1 - t}).tensor)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("spread", "parallel"), [(0.0306, True), (0.0326, False)])
def test_slerp_is_linear_where_the_cosine_is_beyond_its_limit(spread: float, sign: int, parallel: bool) -> None:
    base = drawn("narrow", 4000, dtype=torch.float64)
    aside = drawn("aside", 4000, dtype=torch.float64)
    aside -= base * ((aside @ base) / (base @ base))
    other = (sign * (base + aside * (spread * base.norm() / aside.norm()))).float()
    base = base.float()
    cosine = torch.nn.functional.cosine_similarity(base.double(), other.double(), dim=0)
    assert (abs(float(cosine)) > 0.9995) == parallel
    straight = base * 0.7 + other * torch.tensor(0.3)
    found = make("slerp", [base, other], {"t": 0.3}).tensor
    assert torch.equal(found, straight) == parallel
    wanted = torch.from_numpy(slerp(base.numpy(), other.numpy(), 0.3))
    factor = 1 if sign == 1 else 1 / 0.03  # between opposites, what is added is so many times larger
    assert ((found - wanted).abs() <= 2.0**-22 * factor * (base.abs() + other.abs())).all()


@given(st.integers(0, 40), st.sampled_from(FLOATS))
def test_slerp_ends_are_the_models(seed: int, dtype: torch.dtype) -> None:
    a, b = drawn(f"a {seed}", 40, dtype=dtype), drawn(f"b {seed}", 40, dtype=dtype)
    assert_equal(make("slerp", [a, b], {"t": 0.0}).tensor, a)
    assert_equal(make("slerp", [a, b], {"t": 1.0}).tensor, b)
    assert_equal(make("slerp", [a, a], {"t": 0.5}).tensor, a)


# ---- blocks

LONG = 2 * BLOCK + 12_345
LONG_PARAMS: Mapping[str, tuple[int, dict[str, Any]]] = {
    "linear": (3, {"weight": [0.3, 0.5, -0.1], "normalize": True}),
    "slerp": (2, {"t": 0.3}),
    "passthrough": (1, {"scale": [0.3]}),
    "cast": (1, {}),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("builder", LONG_PARAMS)
def test_the_block_size_changes_nothing(builder: str, dtype: torch.dtype) -> None:
    count, params = LONG_PARAMS[builder]
    inputs = [drawn(f"long {index}", LONG, dtype=dtype) for index in range(count)]
    made = [make(builder, inputs, params, blocks=blocks, dtype=torch.float32) for blocks in (1, 2, 3, 64)]
    assert len({one.digest for one in made}) == 1


def test_inputs_are_read_once() -> None:
    inputs = [drawn(f"long {index}", LONG) for index in range(3)]
    assert make("linear", inputs, LONG_PARAMS["linear"][1], blocks=1).read == [4 * LONG] * 3


# ---- what changes nothing


@given(st.integers(0, 99), st.sampled_from([0.5, 1.0, 2.0, 0.3, 1e-9]), st.sampled_from(FLOATS))
def test_two_equal_models_of_equal_weight_average_to_themselves(seed: int, weight: float, dtype: torch.dtype) -> None:
    model = drawn(f"equal {seed}", 40, dtype=dtype)
    found = make("linear", [model, model], {"weight": [weight, weight], "normalize": True}).tensor
    power = float(np.frexp(weight)[0]) == 0.5  # other weights round: within a unit of the last place
    if power or dtype in (torch.bfloat16, torch.float16):
        assert_equal(found, model)
    else:
        assert ((found - model).abs() <= model.abs() * torch.finfo(dtype).eps).all()


@settings(max_examples=150)
@given(cases(("linear",)), st.integers(0, 30))
def test_a_model_of_weight_zero_changes_nothing(case: Case, seed: int) -> None:
    first = case.inputs[0]
    more = [*case.inputs, drawn(f"more {seed}", *first.shape, dtype=first.dtype)]
    params = {**case.params, "weight": [*case.params["weight"], 0.0]}
    assert_equal(make(case.builder, more, params).tensor, case.made())


@settings(max_examples=100)
@given(cases(("linear",), models=(2, 2), mixed=False))
def test_the_order_of_two_models_does_not_matter(case: Case) -> None:
    params = {**case.params, "weight": case.params["weight"][::-1]}
    assert_equal(make("linear", case.inputs[::-1], params).tensor, case.made())


@settings(max_examples=100)
@given(cases(), st.integers(0, 39))
def test_a_nan_is_never_lost(case: Case, place: int) -> None:
    spoiled = case.inputs[-1].clone().reshape(-1)
    if place < len(spoiled):
        spoiled[place] = float("nan")
    inputs = [*case.inputs[:-1], spoiled.reshape(case.inputs[-1].shape)]
    found = make(case.builder, inputs, case.params).tensor
    assert found.isnan().reshape(-1)[place : place + 1].all()


# ---- copies


@given(st.sampled_from([torch.int64, torch.int32, torch.uint16, torch.uint8, torch.bool]), st.sampled_from(SHAPES))
def test_equal_integers_are_copied_and_others_refused(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    buffer = torch.round(drawn("integers", *shape) * 3).abs().to(torch.uint8).to(dtype)
    assert bits(make("same", [buffer] * 3).tensor) == bits(buffer)
    if buffer.numel():
        other = buffer.clone()
        other.view(-1).view(torch.uint8)[-1] ^= 1
        with pytest.raises(BuildError, match="KB503"):
            make("same", [buffer, buffer, other])


def test_integers_of_another_size_are_refused_even_if_equal() -> None:
    with pytest.raises(BuildError, match="KB503"):
        make("same", [torch.ones(4, dtype=torch.int64), torch.ones(4, dtype=torch.int32)])
