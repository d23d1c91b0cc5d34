"""The peers' classes beside their bits (tests/golden/peers): parameters, chance, refusals, how tensors come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kittybuild.builders.base import BLOCK
from kittybuild.builders.registry import BUILTIN
from kittybuild.errors import BuildError
from tests.jobs import Made, bits, drawn, make

B, A, K = "mergekit-0.1.5", "mergekit-0.1.4", "mergekitty-0.3"
PEERS = (B, A, K)

WEIGHT = {"weight": None}
PLAIN: dict[str, dict[str, Any]] = {
    "linear": {**WEIGHT, "normalize": True},
    "multislerp": {**WEIGHT, "normalize_weights": True, "eps": 1e-8},
    "nearswap": {"t": None},
    "model_stock": {"filter_wise": False},
    "passthrough": {"scale": None},
    "sce": {"select_topk": 1.0, "int8_mask": False},
}
MERGEKIT: dict[str, dict[str, Any]] = {
    "slerp": {"t": None},
    "nuslerp": {**WEIGHT, "nuslerp_flatten": True, "nuslerp_row_wise": False},
    "karcher": {"max_iter": 10, "tol": 1e-5},
    "arcee_fusion": {},
}
RAM: dict[str, dict[str, Any]] = {"ram": {"epsilon": 1e-5}, "ramplus_tl": {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}}


def family(**lambdas: float) -> dict[str, dict[str, Any]]:
    """Task arithmetic and its family, and the factor of all."""
    names = {
        "task_arithmetic": (False, False, {}),
        "ties": (True, False, {}),
        "dare_ties": (False, True, {}),
        "dare_linear": (False, True, {}),
        "breadcrumbs": (False, False, {"gamma": 0.01}),
        "breadcrumbs_ties": (False, False, {"gamma": 0.01}),
        "della": (True, True, {"epsilon": 0.15}),
        "della_linear": (False, True, {"epsilon": 0.15}),
    }
    shared = {**WEIGHT, "density": 1.0, "int8_mask": False, **lambdas}
    return {name: {**shared, "normalize": n, "rescale": r, **more} for name, (n, r, more) in names.items()}


KITTY = family()
for name in ("della", "della_linear"):
    KITTY[name]["lambda"] = 1.0
for name, normalize in (("consensus_ta", False), ("consensus_ties", True)):
    KITTY[name] = {**KITTY["ties"], "normalize": normalize, "k": 1.0, "lambda": 1.0}
KITTY["slerp"] = {"t": None, "weight": None, "nuslerp_flatten": True, "nuslerp_row_wise": False}
CATALOGUE = {
    B: {**PLAIN, **MERGEKIT, **RAM, **family(**{"lambda": 1.0})},
    A: {**PLAIN, **MERGEKIT, **family(**{"lambda": 1.0})},
    K: {**PLAIN, **KITTY},
}


@pytest.mark.parametrize("numerics", PEERS)
def test_the_methods_and_defaults_are_the_peers(numerics: str) -> None:
    found = {m.name: {param.name: param.default for param in m.params} for m in BUILTIN.methods(numerics)}
    assert found == CATALOGUE[numerics]


@pytest.mark.parametrize("numerics", PEERS)
def test_whole_tensors_come_once_and_go_out_in_blocks(numerics: str) -> None:
    inputs = [drawn(f"{numerics} {index}", 3 * BLOCK + 77, dtype=torch.bfloat16) for index in range(3)]
    params = {"weight": [0.3, 0.2, 0.1], "normalize": True, "dtype": None}
    whole = make("linear", inputs, params, numerics=numerics, blocks=100)
    cut = make("linear", inputs, params, numerics=numerics, blocks=1)
    assert bits(whole.tensor) == bits(cut.tensor)
    assert whole.digest == cut.digest
    assert cut.read == [tensor.numel() * 2 for tensor in inputs]


@pytest.mark.parametrize("numerics", PEERS)
@pytest.mark.parametrize("shape", [(0,), (4, 0)])
def test_an_empty_tensor_stays_empty(numerics: str, shape: tuple[int, ...]) -> None:
    made = make("nearswap", [torch.empty(shape)] * 2, {"t": 0.5, "dtype": None}, numerics=numerics)
    assert made.tensor.shape == shape


@pytest.mark.parametrize("numerics", [A, K])
def test_larger_inputs_are_cut_to_the_output(numerics: str) -> None:
    inputs = [drawn("a", 6, 4), drawn("b", 5, 4)]
    params = {"weight": [0.5, 0.25], "normalize": False, "dtype": None}
    made = make("linear", inputs, params, numerics=numerics, shape=(5, 4))
    assert torch.equal(made.tensor, inputs[0][:5] * 0.5 + inputs[1] * 0.25)


@pytest.mark.parametrize("numerics", PEERS)
def test_inputs_are_cast_before_the_merge(numerics: str) -> None:
    a, b = drawn("a", 40), drawn("b", 40)
    params = {"weight": [1.0, 1.0], "normalize": False, "dtype": "float16"}
    made = make("linear", [a, b], params, numerics=numerics, dtype=torch.float16)
    assert torch.equal(made.tensor, a.half() + b.half())


@pytest.mark.parametrize("numerics", PEERS)
def test_without_models_there_is_the_base(numerics: str) -> None:
    base = drawn("base", 30)
    params = {"weight": [], "density": [], "normalize": True, "rescale": True, "lambda": 1.0, "dtype": None}
    assert bits(make("ties", [base], params, numerics=numerics).tensor) == bits(base)


def test_where_nothing_varies_sce_gives_the_base() -> None:
    base = drawn("base", 30)
    for numerics in PEERS:
        params = {"select_topk": 0.5, "dtype": None}
        assert torch.equal(make("sce", [base, base + 1], params, numerics=numerics).tensor, base)


def test_only_mergekit_0_1_5_keeps_the_middle_where_no_outlier_is_left_out() -> None:
    base, model = torch.zeros(50), drawn("model", 50)
    params = {"weight": [1.0], "density": [0.5], "gamma": [0.001], "normalize": False, "rescale": False}
    params |= {"lambda": 1.0, "dtype": None}
    kept = {n: int(make("breadcrumbs", [base, model], params, numerics=n).tensor.count_nonzero()) for n in PEERS}
    assert kept == {B: 25, A: 0, K: 0}


# ---- where the peer fails


@pytest.mark.parametrize("numerics", [A, K])
def test_a_density_that_keeps_nothing_is_refused(numerics: str) -> None:
    params = {"weight": [1.0], "density": [0.01], "normalize": True, "rescale": False, "lambda": 1.0, "dtype": None}
    with pytest.raises(BuildError) as caught:
        make("ties", [drawn("base", 50), drawn("model", 50)], params, numerics=numerics)
    assert caught.value.code == "KB510"
    assert "density 0.01 keeps none of 50 elements" in caught.value.message


@pytest.mark.parametrize("numerics", PEERS)
def test_directions_that_cancel_out_are_refused_but_for_two(numerics: str) -> None:
    one, up = torch.ones(8), torch.arange(8.0)
    params = {"weight": [1.0, 1.0, 0.0], "normalize_weights": False, "eps": 1e-8, "base": False, "dtype": None}
    with pytest.raises(BuildError, match="cancel out"):
        make("multislerp", [up, -up, one], params, numerics=numerics)
    made = make("multislerp", [up, -up], {**params, "weight": [1.0, 1.0]}, numerics=numerics)
    assert torch.equal(made.tensor, torch.zeros(8))


def test_mergekitty_says_what_its_slerp_needs() -> None:
    method = BUILTIN.get("slerp", K)
    assert method is not None
    assert method.method is not None
    assert "either 't'" in str(method.method.check({"t": None, "weight": [0.5, None]}))
    assert method.method.check({"t": 0.5, "weight": [None]}) is None


# ---- chance

WIDTH = 200


def by_chance(
    numerics: str,
    method: str,
    *,
    seed: int = 0,
    name: str = "a.weight",
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> tuple[Tensor, Made]:
    """A difference, and what a random method keeps of it."""
    delta = drawn("delta", 300, WIDTH, dtype=dtype)
    params = {"weight": [1.0], "density": [0.6], "epsilon": [0.1], "normalize": False, "rescale": False}
    params |= {"lambda": [1.0] if numerics == K else 1.0, "dtype": None, "seed": seed, "tensor": name, **more}
    return delta, make(method, [torch.zeros_like(delta), delta], params, numerics=numerics)


@pytest.mark.parametrize("numerics", PEERS)
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della_linear", "della"])
def test_as_much_is_kept_as_is_asked_for(numerics: str, method: str) -> None:
    delta, made = by_chance(numerics, method)
    kept = made.tensor != 0
    assert torch.equal(made.tensor[kept], delta[kept])
    assert abs(kept.double().mean() - 0.6) < 0.01  # five standard deviations
    assert bits(made.tensor) == bits(by_chance(numerics, method)[1].tensor)
    assert bits(made.tensor) != bits(by_chance(numerics, method, seed=1)[1].tensor)
    assert bits(made.tensor) != bits(by_chance(numerics, method, name="b.weight")[1].tensor)


@pytest.mark.parametrize("numerics", PEERS)
def test_della_keeps_the_larger_more_often(numerics: str) -> None:
    delta, made = by_chance(numerics, "della_linear", density=[0.5], epsilon=[0.4])
    rank = delta.abs().argsort(dim=1).argsort(dim=1)
    kept = (made.tensor != 0).double()
    for low, high in ((0, 50), (75, 125), (150, 200)):
        part = (rank >= low) & (rank < high)
        wanted = 0.1 + 0.8 * ((low + high - 1) / 2) / (WIDTH - 1)
        assert abs(kept[part].mean() - wanted) < 0.02


def test_mergekit_rescales_to_the_same_norm() -> None:
    for numerics in (A, B):
        for method in ("dare_linear", "della_linear"):
            delta, made = by_chance(numerics, method, rescale=True)
            torch.testing.assert_close(made.tensor.abs().sum(), delta.abs().sum())


def test_mergekitty_divides_by_the_probability() -> None:
    delta, made = by_chance(K, "dare_linear", rescale=True)
    kept = made.tensor != 0
    assert torch.equal(made.tensor[kept], (delta / 0.6)[kept])
    delta, made = by_chance(K, "della_linear", rescale=True)
    kept = made.tensor != 0
    ratio = (delta / made.tensor)[kept]
    assert 0.49 < float(ratio.min()) < 0.51
    assert 0.69 < float(ratio.max()) < 0.71


@pytest.mark.parametrize("numerics", PEERS)
def test_the_one_element_of_a_row_has_the_density_as_its_chance(numerics: str) -> None:
    delta = torch.ones(20_000, 1)
    params = {"weight": [1.0], "density": [0.3], "epsilon": [0.1], "normalize": False, "rescale": False}
    params |= {"lambda": [1.0] if numerics == K else 1.0, "dtype": None, "seed": 0, "tensor": "a"}
    made = make("della_linear", [torch.zeros_like(delta), delta], params, numerics=numerics)
    assert abs(float(made.tensor.mean()) - 0.3) < 0.02


@pytest.mark.parametrize("numerics", [A, B])
def test_the_threshold_of_a_large_fusion_comes_from_a_sample(numerics: str) -> None:
    base = drawn("base", 1100, 1000)
    model = base + drawn("model", 1100, 1000, scale=0.1)
    params = {"dtype": None, "seed": 0, "tensor": "a"}
    made = make("arcee_fusion", [base, model], params, numerics=numerics).tensor
    other = make("arcee_fusion", [base, model], {**params, "seed": 1}, numerics=numerics).tensor
    taken = float((made != base).double().mean())
    assert 0.02 < taken < 0.2
    assert abs(taken - float((other != base).double().mean())) < 0.005
    assert not torch.equal(made, other)
