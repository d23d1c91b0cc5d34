"""Weighted sums and interpolation, element by element, in the peers' arithmetic: linear, passthrough, nearswap."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kittybuild.builders.peers.whole import Given

if TYPE_CHECKING:
    from torch import Tensor

NEAR = 1e-6


def linear_wide(given: Given) -> Tensor:
    """sum(w_i x_i) / sum(w_i) in float32 (float64 for float64), rounded once at the end (mergekit 0.1.5).

    The products are added by torch's fused kernel, in order.
    """
    import torch

    dtype = given.models[0].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.tensor([given.params["weight"]], dtype=wide)
    total = torch.zeros_like(given.models[0], dtype=wide)
    for model, weight in zip(given.models, weights.unbind(1), strict=True):
        total.addcmul_(model, weight)
    if given.params["normalize"]:
        total.div_(weights.sum(dim=1))
    return total.to(dtype)


def linear_narrow(given: Given) -> Tensor:
    """sum(w_i x_i) / sum(w_i), weights, products, sum and quotient each rounded to the models' element type.

    (mergekit 0.1.4, mergekitty)
    """
    import torch

    stacked = torch.stack(given.models)
    weights = torch.tensor(given.params["weight"], dtype=stacked.dtype).view(-1, *[1] * (stacked.dim() - 1))
    total = (weights * stacked).sum(dim=0)
    return total / weights.sum(dim=0) if given.params["normalize"] else total


def passthrough(given: Given) -> Tensor:
    """scale * x, rounded to the model's element type; x itself without a scale."""
    scale = given.params["scale"][0]
    return given.models[0] if scale is None else given.models[0] * scale


def nearswap(given: Given) -> Tensor:
    """k x + (1 - k) base, k = t / |base - x| within 0 and 1; distances below 1e-6 count as that (mergekit)."""
    distance = (given.origin - given.models[0]).abs().clamp(min=NEAR)
    return _blend(given, (given.params["t"] / distance).clamp(0, 1))


def nearswap_unguarded(given: Given) -> Tensor:
    """The same where no distance counts as small: a k that is not finite is 1; in the base's type (mergekitty)."""
    distance = (given.origin - given.models[0]).abs()
    share = (given.params["t"] / distance).nan_to_num(nan=1.0, posinf=1.0, neginf=1.0).clamp(0.0, 1.0)
    return _blend(given, share).to(given.origin.dtype)


def _blend(given: Given, share: Tensor) -> Tensor:
    return share * given.models[0] + (1 - share) * given.origin
