"""Tables of another tokenizer: each method against its definition, in plain numpy, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kittybuild.builders.normals import normals
from kittybuild.builders.random import Draws
from kittybuild.builders.registry import TRANSPLANTS
from kittybuild.builders.transplant.neighbours import nearest
from kittybuild.builders.transplant.pursuit import Atoms, pursued
from kittybuild.builders.transplant.table import Shared
from kittybuild.builders.transplant.undertrained import row_products, undertrained
from kittybuild.model.rows import RowMap, Sources
from tests.jobs import bits, drawn, make

MODEL, DONOR, SHARED, FRESH, WIDTH = 50, 60, 40, 15, 12
DRAWN = {"seed": 3, "tensor": "embed"}
EACH = [builder.name for builder in TRANSPLANTS]
PARAMS: dict[str, dict[str, Any]] = {
    "transplant_common_interpolation": {"k": 5, "cosine_similarity": False, "weight_scheme": "distance_proportional"},
    "transplant_fitted_interpolation": {"k": 5, "cosine_similarity": False, "weight_scheme": "barycentric"},
    "transplant_omp": {"k": 5},
    "transplant_stb": {"k": 5},
    "transplant_mp_rope": {"k": 5, "heads": [2, 3], "bases": [10_000.0, 500.0]},
    "transplant_randn": DRAWN,
    "transplant_john_hewitt": DRAWN,
    "transplant_subword": {
        "subword_method": "mean",
        "pieces": str(RowMap.of([((0, n % MODEL), (0, 3)) for n in range(DONOR)])),
    },
}
NUMBER = range(FRESH)


def tables(dtype: torch.dtype = torch.float32, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """The model's table and the donor's."""
    return drawn("model", MODEL, WIDTH, dtype=dtype), drawn("donor", DONOR, width, dtype=dtype)


def transplanted(builder: str, given: tuple[Tensor, ...], blocks: int = 4, **params: Any) -> Tensor:
    """What a builder makes: the donor's first tokens are new, then come shared ones in turned order, then fillers."""
    rows: list[Sources] = [((1, n),) for n in NUMBER]
    rows += [((0, SHARED - n),) for n in range(SHARED)] + [()] * (DONOR - SHARED - FRESH)
    pairs: list[Sources] = [((0, SHARED - n), (1, FRESH + n)) for n in range(SHARED)]
    maps = {"rows": str(RowMap.of(rows)), "anchors": str(RowMap.of(pairs))}
    shape = (DONOR, given[0].shape[1])
    return make(builder, given, {**maps, **PARAMS.get(builder, {}), **params}, shape=shape, blocks=blocks).tensor


def arrays(given: tuple[Tensor, Tensor]) -> tuple[Any, Any, Any, Any]:
    """The model's and the donor's rows of shared tokens, the donor's new rows, and the model's table."""
    model, donor = (table.double().numpy() for table in given)
    return model[SHARED:0:-1], donor[FRESH : FRESH + SHARED], donor[:FRESH], model


def alone(table: Any) -> Shared:
    """A table that is the model's and the donor's, and of which all tokens are shared."""
    places = np.arange(len(table))
    return Shared(table, table, places, places, places[:0])


def close(made: Tensor, wanted: Any) -> None:
    np.testing.assert_allclose(made[:FRESH].double().numpy(), wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("builder", EACH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shared_rows_are_copied_and_fillers_are_zero(builder: str, dtype: torch.dtype) -> None:
    given = tables(dtype)
    made = transplanted(builder, given)
    assert bits(made[FRESH : FRESH + SHARED]) == bits(given[0][1 : SHARED + 1].flip(0).contiguous())
    assert not made[FRESH + SHARED :].any()
    assert torch.isfinite(made).all()


@pytest.mark.parametrize("builder", EACH)
def test_blocks_of_any_size_make_the_same_table(builder: str) -> None:
    wide = drawn("model", MODEL, 1200), drawn("donor", DONOR, 72)  # a block and a bit
    assert bits(transplanted(builder, wide, blocks=1)) == bits(transplanted(builder, wide, blocks=100))


def test_the_mean_is_that_of_all_rows() -> None:
    given = tables()
    close(transplanted("transplant_mean", given), np.tile(arrays(given)[3].mean(0), (FRESH, 1)))


def test_zero_is_zero_and_noise_and_scale_come_after() -> None:
    given = tables()
    assert not transplanted("transplant_zero", given)[:FRESH].any()
    noise = normals(Draws(3, "embed", 1), 0, FRESH * WIDTH).reshape(FRESH, WIDTH)
    close(transplanted("transplant_zero", given, noise=0.5, scale=3.0, **DRAWN), 1.5 * noise)


def test_pieces_are_summed_with_their_weights() -> None:
    given = tables()
    model = arrays(given)[3]
    pieces = [[n, n + 1, 2 * n] if n else [] for n in NUMBER]
    ways: dict[str, Callable[[Any], Any]] = {
        "mean": lambda rows: rows.mean(0),
        "sum": lambda rows: rows.sum(0),
        "first": lambda rows: rows[0],
        "last": lambda rows: rows[-1],
        "rising": lambda rows: (rows * [[1], [2], [3]]).sum(0) / 6,
        "falling": lambda rows: (rows * [[3], [2], [1]]).sum(0) / 6,
    }
    text = str(RowMap.of([*(tuple((0, row) for row in some) for some in pieces), *[()] * (DONOR - FRESH)]))
    for way, value in ways.items():
        wanted = [value(model[some]) if some else model.mean(0) for some in pieces]
        close(transplanted("transplant_subword", given, subword_method=way, pieces=text), wanted)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("k", [1, 5, SHARED])
def test_neighbours_weigh_by_their_distance(k: int, cosine: bool) -> None:
    given = tables()
    ours, theirs, fresh, _ = arrays(given)
    wanted = []
    for row in fresh:
        apart = np.linalg.norm(theirs - row, axis=1)
        if cosine:
            apart = -(theirs @ row) / np.linalg.norm(theirs, axis=1) / np.linalg.norm(row)
        near = np.argsort(apart, kind="stable")[:k]
        weights = -apart[near] if cosine else 1 / apart[near]
        wanted.append(weights @ ours[near] / weights.sum())
    made = transplanted("transplant_common_interpolation", given, k=k, cosine_similarity=cosine)
    np.testing.assert_allclose(made[:FRESH].double().numpy(), wanted, rtol=1e-4 if cosine else 2e-6, atol=1e-4)


def test_a_row_that_is_a_shared_one_is_that_one() -> None:
    model, donor = tables()
    donor[:FRESH] = donor[FRESH : 2 * FRESH]
    for builder in ("transplant_common_interpolation", "transplant_fitted_interpolation"):
        made = transplanted(builder, (model, donor), k=1)
        torch.testing.assert_close(made[:FRESH], made[FRESH : 2 * FRESH])


def test_of_equally_near_tokens_the_first_count() -> None:
    table = np.tile(np.eye(3), (3000, 1))
    chosen, apart = nearest(np.eye(3), alone(table), row_products(table), 2001, cosine=False)
    assert [row[:2001].tolist() for row in chosen] == [list(range(n, 6003, 3)) for n in range(3)]
    assert not apart.any()


def test_least_squares_and_barycentric_weights() -> None:
    given = tables()
    ours, theirs, fresh, _ = arrays(given)
    free, bound = [], []
    for row in fresh:
        near = np.argsort(np.linalg.norm(theirs - row, axis=1), kind="stable")[:5]
        free.append(np.linalg.lstsq(theirs[near].T, row, rcond=None)[0] @ ours[near])
        gram = np.zeros((6, 6))  # Lagrange's equations
        gram[:5, :5], gram[5, :5], gram[:5, 5] = theirs[near] @ theirs[near].T, 1.0, 1.0
        bound.append(np.linalg.solve(gram, [*(theirs[near] @ row), 1.0])[:5] @ ours[near])
    close(transplanted("transplant_fitted_interpolation", given, weight_scheme="least_squares"), free)
    close(transplanted("transplant_fitted_interpolation", given, weight_scheme="barycentric"), bound)


@pytest.mark.parametrize("k", [1, 3, WIDTH])
def test_pursuit_takes_the_likest_and_fits_all_again(k: int) -> None:
    given = tables()
    ours, theirs, fresh, _ = arrays(given)
    wanted = []
    for row in fresh:
        chosen: list[int] = []
        rest = row
        for _ in range(k):
            scores = np.abs(theirs @ rest)
            scores[chosen] = -1
            chosen.append(int(scores.argmax()))
            weights = np.linalg.lstsq(theirs[chosen].T, row, rcond=None)[0]
            rest = row - weights @ theirs[chosen]
        wanted.append(weights @ ours[chosen])
    np.testing.assert_allclose(transplanted("transplant_omp", given, k=k)[:FRESH].numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_pursuit_finds_sparse_sums_among_orthogonal_tokens() -> None:
    """Where tokens are at right angles, the best pair of all is the pair that is found."""
    atoms, row = np.linalg.qr(drawn("atoms", 8, 8).double().numpy())[0], drawn("row", 1, 8).double().numpy()
    (chosen,), (weights,) = pursued(row, Atoms(atoms, np.arange(8)), 2)
    errors = {
        pair: np.linalg.norm(row[0] - sum(atoms[n] * (atoms[n] @ row[0]) for n in pair))
        for pair in combinations(range(8), 2)
    }
    assert tuple(sorted(chosen.tolist())) == min(errors, key=lambda pair: errors[pair])
    np.testing.assert_allclose(weights, atoms[chosen] @ row[0])


def test_pursuit_beyond_the_width_stays_exact() -> None:
    """More tokens than dimensions: those that add nothing weigh nothing."""
    given = tables(torch.float64)
    ours, theirs, fresh, _ = arrays(given)
    chosen, weights = pursued(fresh, Atoms(theirs, np.arange(SHARED)), SHARED)
    assert all(len(set(row)) == SHARED for row in chosen.tolist())
    np.testing.assert_allclose(np.einsum("nk,nkw->nw", weights, theirs[chosen]), fresh, atol=1e-9)
    assert np.isfinite(ours[chosen]).all()


def turned(row: Any, position: float, heads: int, base: float) -> Any:
    """A row at a position: each pair of each head, as a complex number, times one on the circle."""
    size = len(row) // heads
    made = row.copy()
    for head in range(heads):
        for pair in range(size // 2):
            n, m = head * size + pair, head * size + pair + size // 2
            number = (row[n] + 1j * row[m]) * np.exp(1j * position * base ** (-2 * pair / size))
            made[n], made[m] = number.real, number.imag
    return made


@pytest.mark.parametrize("k", [1, 5])
def test_rotary_pursuit_turns_each_token_to_its_position(k: int) -> None:
    given = tables()
    ours, theirs, fresh, _ = arrays(given)
    frequencies = 10_000.0 ** -np.array([0, 2 / 6, 4 / 6])
    wanted = []
    for row in fresh:
        chosen: list[int] = []
        rest, atoms, rows = row, [], []
        for _ in range(k):
            scores = np.abs(theirs @ rest)
            scores[chosen] = -1
            chosen.append(int(scores.argmax()))
            halves = [
                np.array([x[[0, 1, 2, 6, 7, 8]] + 1j * x[[3, 4, 5, 9, 10, 11]]]) for x in (theirs[chosen[-1]], rest)
            ]
            both = [np.angle(s * halves[1] / halves[0]).reshape(2, 3) @ frequencies for s in (1, -1)]
            position = min((each.sum() / (2 * (frequencies**2).sum()) for each in both), key=abs)
            atoms.append(turned(theirs[chosen[-1]], position, 2, 10_000.0))
            rows.append(turned(ours[chosen[-1]], position, 3, 500.0))
            rest = rest - atoms[-1] * (atoms[-1] @ rest) / (atoms[-1] @ atoms[-1])
        wanted.append(np.linalg.lstsq(np.array(atoms).T, row, rcond=None)[0] @ rows)
    np.testing.assert_allclose(
        transplanted("transplant_mp_rope", given, k=k)[:FRESH].numpy(), wanted, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("width", [9, WIDTH, 14])
def test_a_basis_of_tokens_holds_for_rows_in_both_tables(width: int) -> None:
    """Axes of the narrower table, in tokens around their mean; the basis is of the tokens as they are."""
    given = tables(width=width)
    ours, theirs, fresh, model = arrays(given)
    narrow = theirs if width < WIDTH else ours
    centred = narrow - narrow.mean(0)
    near, far = [], []
    for axis in np.linalg.svd(centred)[2]:
        chosen: list[int] = []
        rest = axis
        for _ in range(3):
            scores = np.abs(centred @ rest)
            scores[chosen] = -1
            chosen.append(int(scores.argmax()))
            weights = np.linalg.lstsq(centred[chosen].T, axis, rcond=None)[0]
            rest = axis - weights @ centred[chosen]
        near.append(weights @ theirs[chosen])
        far.append(weights @ ours[chosen])
    moved = (fresh - given[1].double().numpy().mean(0)).T
    wanted = np.linalg.lstsq(np.array(near).T, moved, rcond=None)[0].T @ np.array(far) + model.mean(0)
    made = transplanted("transplant_stb", given, k=3)
    np.testing.assert_allclose(made[:FRESH].numpy(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("builder", ["transplant_landmark_pca", "transplant_omp"])
def test_a_rotation_between_the_models_is_found(builder: str) -> None:
    """Where the donor's rows are the model's turned and moved, new rows come back to where they were."""
    turn, _ = np.linalg.qr(drawn("turn", WIDTH, WIDTH).double().numpy())
    _, donor = tables(torch.float64)
    moved = 0.25 if builder == "transplant_landmark_pca" else 0.0
    image = torch.from_numpy(donor.numpy() @ turn + moved)
    model = drawn("model", MODEL, WIDTH, dtype=torch.float64)
    for n in range(SHARED):
        model[SHARED - n] = image[FRESH + n]
    made = transplanted(builder, (model, donor), k=WIDTH)
    np.testing.assert_allclose(made[:FRESH].numpy(), image[:FRESH].numpy(), atol=1e-8)


@pytest.mark.parametrize("builder", ["transplant_common_interpolation", "transplant_omp", "transplant_landmark_pca"])
def test_the_models_may_differ_in_width(builder: str) -> None:
    assert transplanted(builder, tables(width=9)).shape == (DONOR, WIDTH)


def test_normal_numbers_are_normal() -> None:
    draws = Draws(3, "embed", 0)
    found = normals(draws, 0, 100_000)
    assert abs(found.mean()) < 0.01
    assert abs(found.std() - 1) < 0.01
    assert abs((np.abs(found) < 1).mean() - math.erf(math.sqrt(0.5))) < 0.01
    assert np.array_equal(found[750:760], normals(draws, 750, 10))


def test_john_hewitts_rows_have_the_models_mean_and_covariance() -> None:
    model = torch.cat([drawn("even", MODEL, 3), drawn("odd", MODEL, 1) * 5 + 2], 1)
    rows = RowMap.of(((1, n),) for n in range(20_000))
    params = {"rows": str(rows), "anchors": "", **DRAWN}
    made = make("transplant_john_hewitt", (model,), params, shape=(20_000, 4)).tensor.double().numpy()
    assert np.abs(made.mean(0) - model.numpy().mean(0)).max() < 0.05
    wanted = np.cov(model.double().numpy().T)
    assert np.abs(np.cov(made.T) - wanted).max() < 0.05 * np.abs(wanted).max()


def test_untrained_rows_are_the_shortest_the_unused_and_what_is_like_them() -> None:
    table = drawn("table", 200, 8).numpy()
    table[50], table[60] = 1e-3, 1e-4
    assert np.flatnonzero(undertrained(table, [])).tolist() == [50, 60]
    table[70], table[71] = 32 * table[9], 16 * table[9]  # equally like it: of the two, the first
    assert np.flatnonzero(undertrained(table, [9])).tolist() == [9, 50, 60, 70]


def test_untrained_tokens_help_nobody() -> None:
    """Shared tokens that are untrained in one table are made anew; in both, they are zeros, as are new ones."""
    model, donor = tables()
    none = str(RowMap.of([]))
    both, one, new = FRESH + 4, FRESH + 5, 2
    unused = [str(RowMap.of([((0, SHARED - 4),)])), str(RowMap.of(((0, n),) for n in (new, both, one)))]
    plain = transplanted("transplant_omp", (model, donor), k=5)
    for marks in ([none, none], unused):
        made = transplanted("transplant_omp", (model, donor), k=5, unused=marks)
        assert made.shape == plain.shape
    assert not made[both].any()
    assert not made[new].any()
    assert made[one].any()
    assert not torch.equal(made[one], plain[one])
