"""Which elements of a difference are kept, and how they are rescaled, in the peers' arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kittybuild.builders.peers.whole import refused
from kittybuild.builders.random import Draws

if TYPE_CHECKING:
    from torch import Tensor

FAINT = 1e-7
FAINTER = 1e-8

Sparsifier = Callable[["Tensor", int, Mapping[str, Any]], "Tensor"]
"""A difference (which it may overwrite), the number of its model, the job's parameters -> what is kept of it."""
Rescale = Callable[["Tensor", "Tensor"], "Tensor"]


def dense(delta: Tensor, index: int, params: Mapping[str, Any]) -> Tensor:
    """Everything is kept."""
    return delta


def l1_norm(delta: Tensor, kept: Tensor) -> Tensor:
    """`kept` times the ratio of the L1 norms, all in the tensors' type; as it is where one is below 1e-7 (mergekit)."""
    whole, part = delta.abs().sum(), kept.abs().sum()
    return kept if whole < FAINT or part < FAINT else kept * (whole / part)


def l1_norm_of_both(delta: Tensor, kept: Tensor) -> Tensor:
    """The same with the bound 1e-8, and `delta` in place as well (mergekitty)."""
    whole, part = delta.abs().sum(), kept.abs().sum()
    if not (whole >= FAINTER and part >= FAINTER):
        return kept
    delta.mul_(whole / part)
    return kept * (whole / part)


def magnitude(delta: Tensor, index: int, params: Mapping[str, Any], *, rescale: Rescale, least: int) -> Tensor:
    """The int(density · n) largest magnitudes, in the order of torch's sort of their float32 values.

    `least`: so many at least; 0: BuildError KB510 where none would be kept.
    """
    density, n = params["density"][index], delta.numel()
    if density >= 1:
        return delta
    if density <= 0 and least:
        return delta.new_zeros(delta.shape)
    count = max(least, int(density * n))
    if count < 1:
        raise refused("trimming by magnitude", f"density {density:g} keeps none of {n} elements")
    order = delta.abs().reshape(-1).float().sort(descending=True).indices
    kept = _at(delta, order[:count])
    return rescale(delta, kept) if params["rescale"] else kept


def outliers(delta: Tensor, index: int, params: Mapping[str, Any], *, rescale: Rescale, off_by: bool) -> Tensor:
    """Magnitudes between the least and the int(gamma · n) largest, int(density · n) where there are as many.

    Where there are fewer, fewer of the largest are left out. `off_by`: nothing at all is kept where none of the largest
    is left out (mergekit 0.1.4, mergekitty).
    """
    density, n = params["density"][index], delta.numel()
    if density >= 1:
        return delta
    wanted = int(density * n)
    top = min(int(params["gamma"][index] * n), n - wanted)
    order = delta.abs().reshape(-1).float().sort().indices
    kept = _at(delta, order[:0] if off_by and top == 0 else order[n - top - wanted : n - top])
    return rescale(delta, kept) if params["rescale"] else kept


def _at(delta: Tensor, places: Tensor) -> Tensor:
    mask = delta.new_zeros(delta.numel())
    mask[places] = 1
    return delta * mask.view(delta.shape)


def bernoulli(delta: Tensor, index: int, params: Mapping[str, Any], *, rescale: Rescale | None) -> Tensor:
    """Each element with the probability `density`. `rescale` None: by 1 / density.

    bfloat16 is computed in itself, all else in float32.
    """
    density = params["density"][index]
    if density >= 1:
        return delta
    work = _working(delta)
    kept = work * _drawn(delta.new_full(delta.shape, density, dtype=work.dtype), index, params)
    if params["rescale"]:
        kept = kept / density if rescale is None else rescale(work, kept)
    return kept.to(delta.dtype)


def by_rank(delta: Tensor, index: int, params: Mapping[str, Any], *, rescale: Rescale | None, narrow: bool) -> Tensor:
    """Each element with a probability from density - epsilon to density + epsilon, by the rank of its magnitude.

    Ranks are within the second dimension (of one dimension, the first). bfloat16 is computed in itself, all else in
    float32. `narrow`: the result has the difference's element type again (mergekit, not mergekitty). `rescale` None: by
    1 / probability.
    """
    import torch

    density, epsilon = params["density"][index], params["epsilon"][index]
    if density >= 1:
        return delta
    if density <= 0:
        return torch.zeros_like(delta)
    rows = delta.unsqueeze(0) if delta.dim() < 2 else delta
    work = _working(rows)
    order = rows.abs().sort(dim=1).indices.sort(dim=1).indices
    ranks = torch.arange(1, order.shape[1] + 1, dtype=work.dtype)  # bfloat16 rounds those above 256, in its own way
    rank = order.to(work.dtype) + 1 if narrow else ranks[order]
    least, most = rank.amin(dim=1, keepdim=True), rank.amax(dim=1, keepdim=True)
    share = ((rank - least) / (most - least)).nan_to_num_(nan=0.5)  # a row of one: the peers fail
    probability = (share.clamp(0, 1) * 2 * epsilon if narrow else share * (2 * epsilon)) + (density - epsilon)
    kept = work * _drawn(probability, index, params)
    if params["rescale"]:
        kept = kept / probability if rescale is None else rescale(work, kept)
    return (kept.to(delta.dtype) if narrow else kept).reshape(delta.shape)


def _working(delta: Tensor) -> Tensor:
    import torch

    return delta if delta.dtype == torch.bfloat16 else delta.float()


def _drawn(probability: Tensor, index: int, params: Mapping[str, Any]) -> Tensor:
    """1 with that probability, else 0."""
    import torch

    draws = torch.from_numpy(Draws(params["seed"], params["tensor"], index).integers(0, probability.numel()))
    bounds = probability.double().mul_(2.0**32).ceil_().sub_(2.0**31 + 1)  # see random.limit
    return draws.view(probability.shape).to(torch.float64).le(bounds).to(probability.dtype)
