"""Interpolation on spheres in the peers' arithmetic: SLERP in float32, NuSLERP and Multi-SLERP in the models' type."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kittybuild.builders.peers.whole import Given, refused

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1_048_576
"""Elements that mergekit 0.1.5 takes norms and products of at a time."""
TINY, COLINEAR = 1e-8, 0.9995
SHORT, NO_WEIGHT = 1e-7, 1e-6


def slerp_wide(given: Given) -> Tensor:
    """sin((1-t)θ)/sin θ · base + sin(tθ)/sin θ · x in float32 (float64 for float64) by torch (mergekit 0.1.5).

    θ: the angle between the flattened tensors, from sums over pieces of 1,048,576 elements; linear where |cos θ| is
    above 0.9995; norms at or below 1e-8 count as 1.
    """
    import torch

    base, other = given.origin.reshape(1, -1), given.models[0].reshape(1, -1)
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    pieces = [slice(start, start + PIECE) for start in range(0, base.shape[1], PIECE)]

    def norm(tensor: Tensor) -> Tensor:
        parts = [torch.linalg.vector_norm(tensor[:, piece].to(wide), dim=1, keepdim=True) for piece in pieces]
        whole = torch.linalg.vector_norm(torch.stack(parts), dim=0)
        return torch.where(whole > TINY, whole, 1)

    norms = norm(base), norm(other)
    products = [
        ((base[:, piece].to(wide) / norms[0]) * (other[:, piece].to(wide) / norms[1])).sum(dim=1, keepdim=True)
        for piece in pieces
    ]
    cosine = torch.stack(products).sum(dim=0).clamp(-1, 1)
    colinear = cosine.abs() > COLINEAR
    angle = torch.where(colinear, 0, cosine).acos()
    t = torch.tensor([[given.params["t"]]], dtype=wide)
    near = torch.where(colinear, 1 - t, ((1 - t) * angle).sin() / angle.sin())
    far = torch.where(colinear, t, (t * angle).sin() / angle.sin())
    result = torch.empty_like(base)
    for piece in pieces:
        result[:, piece] = near * base[:, piece].to(wide) + far * other[:, piece].to(wide)
    return result.view(given.origin.shape)


def slerp_by_numpy(given: Given) -> Tensor:
    """sin(θ-tθ)/sin θ · base + sin(tθ)/sin θ · x in float32 by numpy, in the base's element type (mergekit 0.1.4).

    θ: the angle between the flattened tensors; linear where |cos θ| is above 0.9995; a tensor whose norm is at or
    below 1e-8 counts as a unit vector already.
    """
    import numpy as np
    import torch

    base, other = given.origin.float().numpy(), given.models[0].float().numpy()
    norms = np.linalg.norm(base), np.linalg.norm(other)
    units = [v / norm if norm > TINY else v for v, norm in zip((base, other), norms, strict=True)]
    cosine, t = np.sum(units[0] * units[1]), given.params["t"]
    del units
    if np.abs(cosine) > COLINEAR:
        result = (1 - t) * base + t * other
    else:
        angle = np.arccos(cosine)
        part = angle * t
        result = np.sin(angle - part) / np.sin(angle) * base + np.sin(part) / np.sin(angle) * other
    return torch.from_numpy(result).to(given.origin.dtype)


Straight = Callable[["Tensor", "Tensor"], "Tensor"]


def straight_by_cosine(cosine: Tensor, angle: Tensor) -> Tensor:
    """Where 1 - cos² θ is at or below 1e-16 (mergekit 0.1.5)."""
    return 1 - cosine**2 <= TINY**2


def straight_by_sine(cosine: Tensor, angle: Tensor) -> Tensor:
    """Where |sin θ| is below 1e-8 (mergekit 0.1.4, mergekitty)."""
    return angle.sin().abs() < TINY


def nuslerp(given: Given, *, straight: Straight) -> Tensor:
    """The two models, or their differences from the base, interpolated on a sphere by the share of their weights.

    Weights whose sum is within 1e-6 of zero count as equal.
    """
    first, second = given.params["weight"]
    total = first + second
    t = 0.5 if abs(total) < NO_WEIGHT else second / total
    flat, across = given.params["nuslerp_flatten"], given.params["nuslerp_row_wise"]
    a, b = given.models
    if given.base is None:
        return sphere(t, a, b, flat=flat, across=across, straight=straight)
    return given.base + sphere(t, a - given.base, b - given.base, flat=flat, across=across, straight=straight)


def slerp_or_nuslerp(given: Given) -> Tensor:
    """With `t` the two tensors as listed, 0 being the first; else as NuSLERP, by weights (mergekitty)."""
    t = given.params["t"]
    if t is None:
        return nuslerp(given, straight=straight_by_sine)
    if len(given.models) != 2:
        raise refused("slerp", f"with t it takes two models, here are {len(given.models)}")
    a, b = given.models
    flat, across = given.params["nuslerp_flatten"], given.params["nuslerp_row_wise"]
    return sphere(t, a, b, flat=flat, across=across, straight=straight_by_sine)


def sphere(t: float, a: Tensor, b: Tensor, *, flat: bool, across: bool, straight: Straight) -> Tensor:
    """(sin((1-t)θ) a + sin(tθ) b) / sin θ in the tensors' element type, linear where they are `straight`.

    θ: the angle between the whole tensors, or (not `flat`) for each vector along the last dimension, or (`across`) the
    first. Norms below 1e-7 count as that.
    """
    import torch

    shape = a.shape
    if flat:
        a, b = a.reshape(-1), b.reshape(-1)
    elif across:
        a, b = a.transpose(0, -1), b.transpose(0, -1)
    cosine = (_unit(a) * _unit(b)).sum(dim=-1, keepdim=True).clamp(-1, 1)
    angle = cosine.acos()
    colinear = straight(cosine, angle)
    bent = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()
    result = torch.where(colinear, (1 - t) * a + t * b, bent)
    if across and not flat:
        result = result.transpose(0, -1)
    return result.reshape(shape)


def _unit(tensor: Tensor) -> Tensor:
    import torch

    norm: Tensor = torch.linalg.vector_norm(tensor, dim=-1, keepdim=True)
    return tensor / norm.clamp(min=SHORT)


def multislerp(given: Given) -> Tensor:
    """Steps once from the weighted mean direction along the sphere, and scales by the weighted mean norm.

    All in the models' element type, on differences where there is a base. A single model is taken as it is. Raises
    BuildError KB510 where more than two directions cancel out.
    """
    import torch

    if len(given.models) == 1:
        return given.models[0]
    eps, stacked = given.params["eps"], torch.stack(given.models)
    shape = stacked.shape[1:]
    if given.base is not None:
        stacked.sub_(given.base)
    flat = stacked.view(len(given.models), -1)
    weights = torch.tensor(given.params["weight"], dtype=flat.dtype)
    if given.params["normalize_weights"]:
        weights = weights / weights.sum()
    columns = weights.view(-1, 1)
    norms = torch.linalg.vector_norm(flat, dim=-1, keepdim=True)
    units = flat / (norms + eps)
    mean = (units * columns).sum(dim=0)
    length = torch.linalg.vector_norm(mean)
    if length < eps:
        if len(given.models) > 2:
            raise refused("multislerp", "the weighted directions of the models cancel out")
        result = (flat * columns).sum(dim=0)
    else:
        mean = mean / length
        tangents = units - (units * mean).sum(dim=-1, keepdim=True) * mean
        step = (tangents * columns).sum(dim=0)
        size = torch.linalg.vector_norm(step) + eps
        result = (mean * size.cos() + step * (size.sin() / size)) * (norms.squeeze(-1) * weights).sum()
    result = result.view(shape)
    return result if given.base is None else result + given.base
