"""Merges that choose elements by what the models say of them, in the peers' arithmetic: SCE, Arcee Fusion, RAM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kittybuild.builders.peers.differences import differences, signs_agree
from kittybuild.builders.peers.whole import Given, in_order

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 1e-6


def sce(given: Given) -> Tensor:
    """base + the mean of the differences that have the elected sign, weighted by their mean squares (mergekit).

    With `select_topk` below 1 only the elements whose variance over the models is among the largest. All in the common
    element type; weights whose sum is below 1e-6 are equal (Wan et al. 2024, FuseChat). Where nothing varies, mergekit
    0.1.4 writes the base with one dimension more, which is left out here.
    """
    import torch

    deltas = _most_varied([model - given.origin for model in given.models], given.params["select_topk"])
    sizes = (deltas**2).flatten(1).mean(dim=1)
    total = sizes.sum().item()
    weights = torch.ones_like(sizes) / len(sizes) if abs(total) < LEAST else sizes / total
    weights = weights.view(-1, *[1] * (deltas.dim() - 1)) * signs_agree(deltas, deltas.sum(dim=0))
    return given.origin + (deltas * weights).sum(dim=0) / weights.sum(dim=0).clamp(min=LEAST)


def sce_by_numbers(given: Given) -> Tensor:
    """The same in the base's element type; weights are Python's numbers, and equal where their sum is 0; a divisor of 0
    is 1 (mergekitty).
    """
    import torch

    deltas = _most_varied(differences(given), given.params["select_topk"])
    sizes = [(delta**2).sum().item() / delta.numel() for delta in deltas]
    total = in_order(sizes)
    shares = [size / total for size in sizes] if total else [1 / len(sizes)] * len(sizes)
    weights = torch.tensor(shares, dtype=deltas.dtype).view(-1, *[1] * (deltas.dim() - 1))
    weights = weights * signs_agree(deltas, deltas.sum(dim=0))
    divisor = weights.sum(dim=0)
    divisor[divisor == 0] = 1
    return given.origin + (deltas * weights).sum(dim=0) / divisor


def _most_varied(given: Sequence[Tensor], share: float) -> Tensor:
    """These, stacked, with zeros where they vary little."""
    import torch

    deltas = torch.stack(list(given))
    if share >= 1:
        return deltas
    variance = deltas.var(dim=0, correction=0)
    mask = torch.zeros_like(variance)
    count = int(variance.count_nonzero() * share)
    if count > 0:
        mask.view(-1)[variance.abs().view(-1).topk(count).indices] = 1
    return deltas * mask


def ram(given: Given) -> Tensor:
    """base + the differences above `epsilon`, where several models have one their mean (mergekit 0.1.5)."""
    deltas, active, count = _active(given)
    kept = deltas * active
    parts = kept * (count == 1) + kept * (count > 1) / count.clamp(min=1)
    return given.origin + parts.sum(dim=0).view(given.origin.shape)


def ram_plus(given: Given) -> Tensor:
    """The same, with what only one model has times 1 + r · its shared count over its unique count, cut to [0, alpha].

    The result is of float32 at least (mergekit 0.1.5, ramplus_tl).
    """
    params = given.params
    deltas, active, count = _active(given)
    shared = (active & (count > 1)).sum(dim=1)
    unique = (active & (count == 1)).sum(dim=1).clamp(min=params["epsilon"])
    factors = (shared / unique).clamp(0, params["alpha"]).mul(params["r"]).add(1)
    kept = deltas * active
    parts = kept * (count == 1) * factors.unsqueeze(-1) + kept * (count > 1) / count.clamp(min=1)
    return given.origin + parts.sum(dim=0).view(given.origin.shape)


def _active(given: Given) -> tuple[Tensor, Tensor, Tensor]:
    """The differences, one a row; where they are above epsilon; of how many models each element is."""
    import torch

    deltas = torch.stack(differences(given)).flatten(1)
    active = deltas.abs().gt(given.params["epsilon"])
    return deltas, active, active.sum(dim=0, keepdim=True)
