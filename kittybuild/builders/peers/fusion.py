"""Arcee Fusion in the peers' arithmetic: the other model's elements where they matter, the base's elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kittybuild.builders.peers.whole import Given
from kittybuild.builders.random import Draws

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE = 1_000_000
"""So many elements at most are looked at for quantiles: of larger tensors a random sample."""
EPSILON = 1e-8


def arcee_fusion(given: Given, *, replaced: bool) -> Tensor:
    """base + (x - base) where importance is at or above the median plus 1.5 times the distance of the quartiles.

    Importance: |x - base| times the KL divergence of the last dimension's softmax. The result is of float32 at least.
    `replaced`: one sample with replacement serves all quantiles of a large tensor (mergekit 0.1.5), else the median and
    the quartiles have one each, without replacement (mergekit 0.1.4).
    """
    import torch

    base, other = given.origin, given.models[0]
    p, q = (torch.softmax(tensor, dim=-1) + EPSILON for tensor in (other, base))
    importance = (other - base).abs() * (p * (p / q).log()).sum(dim=-1, keepdim=True)
    del p, q
    low, median, high = _quantiles(importance, given, 0, replaced=replaced)
    if not replaced and importance.numel() > SAMPLE:
        low, _, high = _quantiles(importance, given, 1, replaced=False)
    return base + (other - base) * (importance >= median + (high - low) * 1.5).float()


def _quantiles(importance: Tensor, given: Given, draw: int, *, replaced: bool) -> tuple[Tensor, ...]:
    """The quartiles and the median between them, of a sample where the tensor is large."""
    import torch

    values = importance.reshape(-1)
    count = values.numel()
    if count > SAMPLE:
        draws = Draws(given.params["seed"], given.params["tensor"], draw)
        if replaced:
            places = torch.from_numpy(draws.integers(0, SAMPLE)).double().add_(2.0**31).mul_(count / 2.0**32).long()
        else:
            places = torch.from_numpy(draws.integers(0, count)).argsort(stable=True)[:SAMPLE]
        values = values[places]
    ordered = values.sort().values
    return ordered[(torch.tensor((0.25, 0.5, 0.75)) * (len(ordered) - 1)).long()].unbind()
