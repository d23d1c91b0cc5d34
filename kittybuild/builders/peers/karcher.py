"""The Karcher mean in the peers' arithmetic: the point on the sphere that is nearest to all models' directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kittybuild.builders.peers.whole import Given, in_order

if TYPE_CHECKING:
    from torch import Tensor


def karcher(given: Given, *, scalars: bool) -> Tensor:
    """Scales the mean direction by the mean norm. Norms are of float32, all else in the models' element type.

    Models whose norm is at or below `tol` have no direction; one model is taken as it is. `scalars`: the first norm and
    the last scale are Python's numbers (mergekit 0.1.4), else torch's, and norms of float64 are of float64 (0.1.5).
    """
    import torch

    if len(given.models) == 1:
        return given.models[0]
    tol, share = given.params["tol"], 1.0 / len(given.models)
    norms = [_norm(model, short=scalars) for model in given.models]
    units = [model / norm for model, norm in zip(given.models, norms, strict=True) if norm.item() > tol]
    if not units:
        return torch.zeros_like(given.models[0])
    each = share / in_order([share] * len(units))  # rounded twice: not always 1 / len(units)
    mean = _direction(units, each, tol, scalars=scalars)
    for _ in range(int(given.params["max_iter"])):
        step = _step(mean, units, each, tol)
        length = _norm(step, short=scalars)
        if length.item() < tol:
            break
        mean = length.cos() * mean + length.sin() * (step / length)
        norm = _norm(mean, short=scalars)
        if norm.item() > tol:
            mean = mean / norm
    if scalars:
        return mean * in_order(share * norm.item() for norm in norms)
    scale: Tensor = sum(norm * share for norm in norms)  # type: ignore[assignment]
    return scale * mean


def _norm(tensor: Tensor, *, short: bool) -> Tensor:
    import torch

    wide = tensor.dtype == torch.float64 and not short
    norm: Tensor = torch.linalg.vector_norm(tensor if wide else tensor.float())
    return norm


def _direction(units: Sequence[Tensor], share: float, tol: float, *, scalars: bool) -> Tensor:
    """The direction of the sum of all; the first's where the sum is too short."""
    import torch

    total = torch.zeros_like(units[0])
    for unit in units:
        total += unit * share
    norm = _norm(total, short=scalars)
    if norm.item() < tol:
        return units[0]
    return total / (norm.item() if scalars else norm)


def _step(mean: Tensor, units: Sequence[Tensor], share: float, tol: float) -> Tensor:
    """The mean of all directions, seen from `mean` along the sphere."""
    import torch

    step = torch.zeros_like(mean)
    for unit in units:
        cosine = torch.dot(mean.flatten(), unit.flatten()).clamp(-1.0, 1.0)
        angle = cosine.acos()
        if angle.item() < tol:
            continue
        step += angle / angle.sin() * share * (unit - cosine * mean)
    return step
