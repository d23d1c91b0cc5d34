"""The randomized decomposition beside LAPACK's: where singular values are nearly equal, where there are few, or one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kittybuild.recipe.schema import ExtractLoraText
from tests.jobs import make

ITERATIONS = ExtractLoraText.model_fields["iterations"].default
OUT, INNER, RANK = 450, 500, 32


def decomposed(matrix: Tensor, rank: int, iterations: int = ITERATIONS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, the singular values, v, and the norms of what is left, in float64."""
    out, inner = matrix.shape
    params: dict[str, Any] = {"transposed": False, "double": matrix.dtype is torch.float64}
    params |= {"iterations": iterations, "seed": 0, "tensor": "a"}
    rows = make("svd_randomized", [matrix], params, shape=(rank, out + inner + 2)).tensor.double()
    return rows[:, :out], rows[:, -2], rows[:, out:-2], rows[:, -1]


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotated(values: Tensor) -> Tensor:
    """A matrix with these singular values."""
    left, right = (torch.linalg.qr(normal(side, len(values), seed=side))[0] for side in (OUT, INNER))
    found: Tensor = (left * values) @ right.T
    return found


SINGLE = torch.zeros(OUT, INNER, dtype=torch.float64)
SINGLE[5] = normal(INNER)
MATRICES = {
    "noise": normal(OUT, INNER),
    "low rank": normal(OUT, 9, seed=2) @ normal(9, INNER, seed=3),
    "one row": SINGLE,
    "steep": rotated(torch.logspace(0, -9, 200, dtype=torch.float64)),
    "all alike": torch.eye(OUT, INNER, dtype=torch.float64),
    "nothing": torch.zeros(OUT, INNER, dtype=torch.float64),
}


@pytest.mark.parametrize("turned", [False, True], ids=["wide", "tall"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MATRICES)
def test_values_and_vectors_are_those_of_the_matrix(name: str, dtype: torch.dtype, turned: bool) -> None:
    matrix = (MATRICES[name].T if turned else MATRICES[name]).to(dtype)
    wide, exact = matrix.double(), torch.linalg.svdvals(matrix.double())
    u, s, v, left = decomposed(matrix, RANK)
    near = 2e-6 if dtype is torch.float32 else 1e-12
    size = max(float(exact[0]), 1e-30)
    assert float((s - exact[:RANK]).abs().max()) <= (1e-3 if name == "noise" else near) * size
    sure = s > 1e-5 * size  # vectors of no length have no direction
    for vectors in (u[sure], v[sure]):
        unit = torch.eye(len(vectors), dtype=torch.float64)
        assert torch.allclose(vectors @ vectors.T, unit, atol=2e-5 if dtype is torch.float32 else 1e-9)
    rest = float((wide - (u.T * s) @ v).norm())
    assert rest == pytest.approx(float(left[-1]), rel=1e-4, abs=2e-3 * size)
    assert rest == pytest.approx(float(exact[RANK:].norm()), rel=1e-3, abs=1e-5 * size)


@pytest.mark.parametrize("rank", [4, 16, 32])
def test_of_noise_it_keeps_what_can_be_kept_within_a_thousandth(rank: int) -> None:
    matrix = normal(768, 2048).float()
    best = torch.linalg.eigvalsh(matrix.double() @ matrix.double().T)[-rank:].sum()
    _, s, _, _ = decomposed(matrix, rank)
    assert 1 - 1e-3 < float((s**2).sum() / best) < 1 + 1e-6


def test_more_passes_keep_more() -> None:
    matrix = normal(OUT, INNER).float()
    kept = [float((decomposed(matrix, RANK, passes)[1] ** 2).sum()) for passes in (0, 1, 3, 8)]
    assert kept == sorted(kept)
    assert kept[0] < 0.9 * kept[-1]
