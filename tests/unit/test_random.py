"""The integers that masks are drawn with: those of the paper's generator, evenly spread, of no two inputs alike."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kittybuild.builders.random import Draws, limit, limits
from kittybuild.digest import tagged

MANY = 1 << 20
BOUND = 5.0
"""Standard deviations: by chance, one of two million such counts lies further off."""


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 by its definition: Salmon, Moraes, Dror, Shaw 2011, section 3.3 and its constants."""
    key = list(key)
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        low = (1 << 64) - 1
        counter = [second >> 64 ^ counter[1] ^ key[0], second & low, first >> 64 ^ counter[3] ^ key[1], first & low]
        key = [(part + step) & low for part, step in zip(key, (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B), strict=True)]
    return counter


def by_definition(seed: int, tensor: str, index: int, place: int) -> int:
    """The integer of one element, from the docstring of builders/random.py."""
    number = int(tagged("kittybuild.mask.v1", [seed, tensor, index]).hex[:32], 16)
    words = philox([place // 8 + 1, 0, 0, 0], [number & (1 << 64) - 1, number >> 64])
    half = words[place % 8 // 2] >> 32 * (place % 2) & (1 << 32) - 1
    return half - (half >> 31 << 32)


def test_the_generator_of_this_test_is_the_papers() -> None:
    """The known answers that Random123, the paper's own code, is tested with."""
    every = (1 << 64) - 1
    assert philox([0] * 4, [0] * 2) == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox([every] * 4, [every] * 2) == [
        *(0x87B092C3013FE90B, 0x438C3C67BE8D0224),
        *(0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
    ]
    pi = [0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89]
    assert philox(pi, [0x452821E638D01377, 0xBE5466CF34E90C6C]) == [
        *(0xA528F45403E61D95, 0x38C72DBD566E9788),
        *(0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
    ]


@given(st.integers(0, 2**63), st.text(max_size=5), st.integers(0, 9), st.integers(0, 2**40), st.integers(1, 40))
@example(7, "model.layers.0.mlp.up_proj.weight", 0, 0, 16)
@example(0, "", 0, 2**33 - 5, 10)
def test_every_integer_is_that_of_the_definition(seed: int, tensor: str, index: int, start: int, count: int) -> None:
    found = Draws(seed, tensor, index).integers(start, count)
    assert found.dtype == np.int32
    assert found.tolist() == [by_definition(seed, tensor, index, place) for place in range(start, start + count)]


def test_they_are_the_same_for_ever() -> None:
    found = Draws(7, "model.layers.0.mlp.up_proj.weight", 0).integers(0, 4).tolist()
    assert found == [-1221308562, 1494575913, 178173377, 2072246609]


@given(st.lists(st.integers(0, 3000), max_size=6))
def test_any_cut_gives_the_same(cuts: list[int]) -> None:
    draws = Draws(1, "cut", 2)
    places = sorted({0, 3000, *cuts})
    parts = [draws.integers(start, end - start) for start, end in itertools.pairwise(places)]
    assert np.array_equal(np.concatenate(parts), draws.integers(0, 3000))
    assert draws.integers(5, 0).tolist() == []


# ---- probabilities


@given(st.floats(0, 1, exclude_min=True))
@example(1.0)
@example(2.0**-40)
@example(1 - 2.0**-53)
@example(0.3)
def test_the_limit_keeps_as_many_of_all_integers_as_the_probability_says(probability: float) -> None:
    kept = limit(probability) + 2**31 + 1  # of the 2^32 integers, from the lowest on
    assert kept == math.ceil(Fraction(probability) * 2**32)
    assert 1 <= kept <= 2**32
    assert limits(np.array([probability])).tolist() == [limit(probability)]


def off(count: int, probability: float, of: int = MANY) -> float:
    """How many standard deviations a count of hits lies from what it should be."""
    return abs(count - probability * of) / math.sqrt(of * probability * (1 - probability))


def mask(probability: float, *key: int | str) -> np.ndarray:
    """Which of many elements are kept."""
    seed, tensor, index = key or (3, "rates", 1)
    return Draws(int(seed), str(tensor), int(index)).integers(0, MANY) <= limit(probability)


@pytest.mark.parametrize("probability", [1e-5, 0.01, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_elements_are_kept_at_the_rate(probability: float) -> None:
    kept = mask(probability)
    assert off(int(kept.sum()), probability) < BOUND
    for part in kept.reshape(16, -1):  # everywhere
        assert off(int(part.sum()), probability, MANY // 16) < BOUND
    for part in kept.reshape(-1, 8).T:  # in each place of a counter
        assert off(int(part.sum()), probability, MANY // 8) < BOUND


def test_every_bit_is_set_in_half_of_them() -> None:
    integers = Draws(3, "bits", 0).integers(0, MANY)
    for bit in range(32):
        assert off(int((integers >> bit & 1).sum()), 0.5) < BOUND


APART: dict[str, Callable[[int], tuple[int, str, int]]] = {
    "inputs": lambda n: (3, "apart", n),
    "seeds": lambda n: (n, "apart", 1),
    "tensors": lambda n: (3, f"model.layers.{n}.weight", 1),
}


@pytest.mark.parametrize(("one", "other"), [(0.5, 0.5), (0.1, 0.1), (0.3, 0.9)])
@pytest.mark.parametrize("what", APART)
def test_masks_of_different_inputs_seeds_or_tensors_are_independent(what: str, one: float, other: float) -> None:
    for a, b in itertools.combinations(range(4), 2):
        both = mask(one, *APART[what](a)) & mask(other, *APART[what](b))
        assert off(int(both.sum()), one * other) < BOUND


@pytest.mark.parametrize("step", [1, 2, 3, 4, 7, 8, 64, 4096, 65_536])
def test_elements_are_independent_of_those_before(step: int) -> None:
    kept = mask(0.3)
    both = kept[step:] & kept[:-step]
    assert off(int(both.sum()), 0.09, MANY - step) < BOUND * 1.2  # pairs overlap: their counts spread a little wider


def test_no_two_of_many_keys_give_the_same_integers() -> None:
    keys = itertools.product((0, 1, 2**40), ("a", "b", "a.b", "0"), range(5))
    found = [tuple(Draws(*key).integers(0, 8).tolist()) for key in keys]
    assert len(set(found)) == len(found) == 60
    assert np.unique(found).size == 60 * 8
