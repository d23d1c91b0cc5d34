"""The merge methods that work on angles and statistics, written down plainly in numpy, vectors as they stand.

Each takes the inputs in the working dtype, in their shape, and the parameters. `near` methods give what is wanted and
how large the terms were that it was summed from; `exact` methods give the result of single steps, which numpy rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tests.jobs import halved

Array = np.ndarray[Any, Any]
Params = Mapping[str, Any]


def rows_of(x: Array) -> Array:
    """As a matrix; what has no rows is one."""
    return x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x.reshape(1, -1)


def split(xs: list[Array], p: Params) -> tuple[Array, list[Array]]:
    """The base (or zeros), and the vectors in float64: differences are taken in the working dtype."""
    if not p.get("base"):
        return np.zeros_like(xs[0], dtype=np.float64), [x.astype(np.float64) for x in xs]
    return xs[0].astype(np.float64), [(x - xs[0]).astype(np.float64) for x in xs[1:]]


def norm(x: Array) -> float:
    return float(np.sqrt(x.ravel() @ x.ravel()))


# ---- near


def arc(one: Array, other: Array, t: float) -> tuple[Array, Array]:
    """The point at `t` of the arc between two vectors, and the size of its terms."""
    cosine = one.ravel() @ other.ravel() / (max(norm(one), 1e-7) * max(norm(other), 1e-7))
    cosine = max(-1.0, min(1.0, cosine))
    near, far = 1 - t, t
    if 1 - cosine**2 > 1e-16:
        theta = math.acos(cosine)
        near, far = math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)
    return near * one + far * other, abs(near * one) + abs(far * other)


def nuslerp(xs: list[Array], p: Params) -> tuple[Array, Array]:
    base, (one, other) = split(xs, p)
    first, second = p["weight"]
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    if p.get("nuslerp_flatten", True):
        mixed, size = arc(one, other, t)
    elif p["nuslerp_row_wise"] and one.ndim > 1:
        columns = [x.reshape(x.shape[0], -1).T for x in (one, other)]
        both = [arc(a, b, t) for a, b in zip(*columns, strict=True)]
        mixed, size = (np.array(part).T.reshape(one.shape) for part in zip(*both, strict=True))
    else:
        both = [arc(a, b, t) for a, b in zip(rows_of(one), rows_of(other), strict=True)]
        mixed, size = (np.array(part).reshape(one.shape) for part in zip(*both, strict=True))
    return base + mixed, abs(base) + size


def multislerp(xs: list[Array], p: Params) -> tuple[Array, Array]:
    if len(p["weight"]) == 1:
        return xs[-1].astype(np.float64), abs(xs[-1]).astype(np.float64)
    base, vectors = split(xs, p)
    weights, eps = np.array(p["weight"]), p["eps"]
    if p["normalize_weights"]:
        weights = weights / weights.sum()
    norms = [norm(x) for x in vectors]
    units = [x / (n + eps) for x, n in zip(vectors, norms, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    size = sum(abs(w * x) for w, x in zip(weights, vectors, strict=True))
    if (length := norm(mean)) < eps:
        return base + sum(w * x for w, x in zip(weights, vectors, strict=True)), abs(base) + size
    scale = weights @ norms
    size = sum(abs(w * u) for w, u in zip(weights, units, strict=True)) * abs(scale) / length
    mean = mean / length
    tangents = [u - (u.ravel() @ mean.ravel()) * mean for u in units]
    step = sum(w * tangent for w, tangent in zip(weights, tangents, strict=True))
    way = norm(step) + eps
    return base + (mean * math.cos(way) + step * (math.sin(way) / way)) * scale, abs(base) + size


def karcher(xs: list[Array], p: Params) -> tuple[Array, Array]:
    _, vectors = split(xs, p)
    norms, tol = [norm(x) for x in vectors], p["tol"]
    units = [x / n for x, n in zip(vectors, norms, strict=True) if n > tol]
    if not units:
        return np.zeros_like(vectors[0]), np.zeros_like(vectors[0])
    centre = sum(units) / len(units)
    centre = units[0] if norm(centre) < tol else centre / norm(centre)
    for _ in range(p["max_iter"]):
        step = np.zeros_like(centre)
        for unit in units:
            theta = math.acos(max(-1.0, min(1.0, float(unit.ravel() @ centre.ravel()))))
            if tol <= theta <= math.pi - tol:
                step = step + theta / math.sin(theta) / len(units) * (unit - math.cos(theta) * centre)
        if (size := norm(step)) < tol:
            break
        centre = math.cos(size) * centre + math.sin(size) / size * step
        centre = centre / norm(centre)
    scale = sum(norms) / len(norms)
    return centre * scale, sum(abs(unit) for unit in units) * scale


def stock_of(base: Array, deltas: list[Array]) -> tuple[Array, Array]:
    count, cosines = len(deltas), []
    for i, a in enumerate(deltas):
        for b in deltas[i + 1 :]:
            scale = norm(a) * norm(b)
            cosines.append(max(-1.0, min(1.0, float(a.ravel() @ b.ravel()) / scale)) if scale else 0.0)
    cosine = sum(cosines) / len(cosines)
    divisor = 1 + (count - 1) * cosine
    t = count * cosine / divisor if abs(divisor) >= 1e-6 else 0.0
    spread = sum(abs(delta) for delta in deltas) / count * abs(t)
    return base + t * sum(deltas) / count, abs(base) + spread * (1 + 1 / max(abs(divisor), 1e-6))


def model_stock(xs: list[Array], p: Params) -> tuple[Array, Array]:
    base, deltas = split(xs, {"base": True})
    if not p["filter_wise"]:
        return stock_of(base, deltas)
    rows = zip(rows_of(base), *map(rows_of, deltas), strict=True)
    both = [stock_of(row, list(others)) for row, *others in rows]
    wanted, size = (np.array(part).reshape(base.shape) for part in zip(*both, strict=True))
    return wanted, size


NEAR: Mapping[str, Callable[[list[Array], Params], tuple[Array, Array]]] = {
    "slerp": nuslerp,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "model_stock": model_stock,
}


# ---- exact


def nearswap(xs: list[Array], p: Params) -> Array:
    base, other = xs
    kind = base.dtype.type
    share = np.clip(kind(p["t"]) / np.maximum(abs(base - other), kind(1e-6)), kind(0), kind(1))
    return base * (kind(1) - share) + other * share


def ram(xs: list[Array], p: Params) -> Array:
    base, kind = xs[0], xs[0].dtype.type
    deltas = [x - base for x in xs[1:]]
    active = [abs(delta) > kind(p["epsilon"]) for delta in deltas]
    count = np.sum(active, axis=0, initial=0).astype(base.dtype) + np.zeros_like(base)
    total = np.zeros_like(base)
    for delta, mask in zip(deltas, active, strict=True):
        total = total + np.where(mask, delta, kind(0))
    if "alpha" in p:
        for mask in active:
            alone, every = int((mask & (count == 1)).sum()), int(mask.sum())
            share = min((every - alone) / max(alone, p["epsilon"]), p["alpha"]) if alone else 0.0
            total = np.where(mask & (count == 1), total * kind(1 + p["r"] * share), total)
    return base + total / np.maximum(count, kind(1))


def sce(xs: list[Array], p: Params) -> Array:
    base, kind = xs[0], xs[0].dtype.type
    deltas = [x - base for x in xs[1:]]
    if not deltas:
        return base
    if p["select_topk"] < 1:
        mean = summed(deltas) / kind(len(deltas))
        variance = (summed([(delta - mean) * (delta - mean) for delta in deltas]) / kind(len(deltas))).ravel()
        count = int(np.count_nonzero(variance) * p["select_topk"])
        keep = np.zeros(variance.shape, bool)
        keep[np.argsort(-variance, kind="stable")[:count]] = True
        deltas = [np.where(keep.reshape(base.shape), delta, kind(0)) for delta in deltas]
    squares = [halved((delta.astype(np.float64) ** 2).ravel().tolist()) for delta in deltas]
    total = summed(squares)
    weights = [kind(square / total if total else 1 / len(squares)) for square in squares]
    sign = np.where(summed(deltas) >= 0, kind(1), kind(-1))
    agrees = [np.sign(delta * weight) == sign for delta, weight in zip(deltas, weights, strict=True)]
    mixed = summed([np.where(yes, d * w, kind(0)) for yes, d, w in zip(agrees, deltas, weights, strict=True)])
    divisor = summed([np.where(yes, w, kind(0)) for yes, w in zip(agrees, weights, strict=True)])
    return base + mixed / np.where(divisor == 0, kind(1), divisor)


def summed(parts: list[Any]) -> Any:
    """From the left; unlike `sum`, which newer Pythons compensate."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


EXACT: Mapping[str, Callable[[list[Array], Params], Array]] = {
    "nearswap": nearswap,
    "sce": sce,
    "ram": ram,
    "ramplus_tl": ram,
}


def importance(base: Array, other: Array) -> Array:
    """Of Arcee Fusion, in the working dtype; its divergences are numpy's, so close only."""
    with np.errstate(divide="ignore", under="ignore"):
        powers = [
            np.exp(x - x.max(axis=1, keepdims=True))
            for x in (rows_of(other).astype(float), rows_of(base).astype(float))
        ]
    p, q = (power / power.sum(axis=1, keepdims=True) + 1e-8 for power in powers)
    divergence = np.maximum((p * np.log(p / q)).sum(axis=1, keepdims=True), 0.0)
    return (abs(rows_of(other - base)) * divergence.astype(base.dtype)).reshape(base.shape)


def least_important(found: Array) -> Any:
    """The threshold of Arcee Fusion."""
    ordered, kind = np.sort(found, axis=None), found.dtype.type
    lower, median, upper = (ordered[int(share * (found.size - 1))] for share in (0.25, 0.5, 0.75))
    return median + kind(1.5) * (upper - lower)
