"""Model Stock in the peers' arithmetic: between base and mean, by the angles between the models' differences."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

from kittybuild.builders.peers.whole import Given

if TYPE_CHECKING:
    from torch import Tensor

LEAST_PRODUCT = 1e-6
SINGULAR = 1e-6


def model_stock(given: Given, *, guarded: bool) -> Tensor:
    """t mean(x_i) + (1 - t) base, t = n c / (1 + (n - 1) c), c the mean cosine of all pairs of differences.

    One t for the tensor, with `filter_wise` one for each row. All in the models' element type (Jang et al. 2024, Model
    Stock). `guarded`: t is 0 where its divisor is below 1e-6 (mergekit 0.1.5; without: mergekit 0.1.4, mergekitty).
    """
    import torch

    base, models = given.origin, list(given.models)
    shape = base.shape
    if not given.params["filter_wise"]:
        base, models = base.reshape(-1), [model.reshape(-1) for model in models]
    elif base.dim() == 1:
        base, models = base.unsqueeze(0), [model.unsqueeze(0) for model in models]
    differences = [model - base for model in models]
    cosine = torch.stack([_cosine(a, b) for a, b in combinations(differences, 2)]).mean(dim=0).unsqueeze(-1)
    del differences
    count = len(models)
    share, divisor = cosine * count, cosine * (count - 1) + 1
    if guarded:
        singular = divisor.abs() < SINGULAR
        share = torch.where(singular, 0.0, share / torch.where(singular, 1.0, divisor))
    else:
        share = share / divisor
    return (share * (sum(models) / count) + (1 - share) * base).reshape(shape)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    import torch

    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    cosine: Tensor = ((a * b).sum(dim=-1) / norms.clamp(min=LEAST_PRODUCT)).clamp(-1, 1)
    return cosine
