"""The leading singular values and vectors of a difference of two matrices: what a LoRA adapter is cut from.

The result has one row for each value: u, v, the value itself, and the norm of what all rows so far leave of the matrix.
Values descend; the entry of u that is largest by magnitude, and among equals first, is positive. LAPACK and BLAS
decide the last bits: the plan names numpy and the CPU in the derivation's class.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from kittybuild.builders.base import Builder, Combine, Job
from kittybuild.builders.floats import numpy_dtype
from kittybuild.digest import tagged
from kittybuild.tensors import DType

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

    Parts = tuple[Array, Array, Array]

SPECTRUM = 2
"""Numbers of a row behind u and v: the singular value, and the norm of what is left."""
OVERSAMPLING = 8
LEAST_WIDTH = 24
ROUNDING = 1e-12
_ROWS = 512


def _svd(job: Job) -> Combine:
    """All singular values, of which the first are kept (LAPACK's gesdd).

    Inputs: the matrix, and what is taken away from it (or not): [out, in], or with `transposed` [in, out]; further
    sides are flattened. `double`: in float64. Output: [rank, out + in + 2].
    """
    delta = _difference(job)
    return _result(job, _all_values(delta), _squares(delta))


def _randomized(job: Job) -> Combine:
    """The same within a block Krylov space of `iterations` steps, from a seeded start.

    Source: Musco & Musco 2015, Randomized block Krylov methods, algorithm 2. Where that space would be the whole, all
    values are computed.
    """
    rank, iterations = job.output.shape[0], job.params["iterations"]
    delta = _difference(job)
    total = _squares(delta)
    width = max(rank, LEAST_WIDTH) + OVERSAMPLING
    if width * (iterations + 1) >= min(delta.shape) or not math.isfinite(total):
        return _result(job, _all_values(delta), total)
    turned = delta.shape[0] > delta.shape[1]
    wide = delta.T if turned else delta
    u, s, v = _within(*_krylov(wide, _start(job, (wide.shape[1], width)), iterations), rank)
    return _result(job, (v.T, s, u.T) if turned else (u, s, v), total)


def _difference(job: Job) -> Array:
    """The matrix, or how it differs from the second, as [out, in] in the working precision."""
    import numpy as np

    double = job.params["double"] or job.double
    delta: Array = job.whole(0).astype(np.float64 if double else np.float32)
    if len(job.inputs) > 1:
        other = job.whole(1)
        for row in range(0, len(delta), _ROWS):
            delta[row : row + _ROWS] -= other[row : row + _ROWS].astype(delta.dtype)
    delta = delta.reshape(len(delta), -1)
    return delta.T if job.params["transposed"] else delta


def _all_values(matrix: Array) -> Parts:
    """The whole decomposition; NaN of a matrix that is not finite, where LAPACK fails."""
    import numpy as np

    if not np.isfinite(matrix).all():
        rank = min(matrix.shape)
        sides = (len(matrix), rank), (rank,), (rank, matrix.shape[1])
        return tuple(np.full(side, np.nan) for side in sides)  # type: ignore[return-value]
    return tuple(np.linalg.svd(matrix, full_matrices=False))  # type: ignore[return-value]


def _squares(delta: Array) -> float:
    """The sum of the squares of a matrix."""
    import numpy as np

    rows = np.einsum("ij,ij->i", delta, delta)  # short sums in its own precision
    return float(rows.sum(dtype=np.float64))


def _start(job: Job, shape: tuple[int, int]) -> Array:
    """Standard normal numbers that only seed, tensor and shape decide."""
    import numpy as np

    key = tagged("kittybuild.svd.v1", [job.params["seed"], job.params["tensor"]]).hex[:32]
    return np.random.Generator(np.random.Philox(key=int(key, 16))).standard_normal(shape, dtype=np.float32)


def _krylov(matrix: Array, start: Array, iterations: int) -> tuple[Array, Array]:
    """An orthonormal basis of matrix · start and of what `iterations` more passes give; and matrix' · basis.

    Both are float64, of factors that the matrix is multiplied with in its own precision. Columns of the basis are zeros
    where a pass gives nothing new.
    """
    import numpy as np

    width = start.shape[1]
    basis = np.empty((matrix.shape[0], width * (iterations + 1)))
    seen = np.empty((matrix.shape[1], basis.shape[1]), matrix.dtype)
    block = matrix @ start.astype(matrix.dtype)
    for done in range(0, basis.shape[1], width):
        now = slice(done, done + width)
        basis[:, now] = _orthonormal(block.astype(np.float64), basis[:, :done])
        seen[:, now] = matrix.T @ basis[:, now].astype(matrix.dtype)
        if now.stop < basis.shape[1]:
            block = matrix @ seen[:, now]
    return basis, seen.astype(np.float64)


def _orthonormal(block: Array, basis: Array) -> Array:
    """Orthonormal columns of what the basis lacks of a block; zeros where it lacks nothing but rounding errors.

    (Not by QR: what it makes of columns of zeros may lie in the basis.)
    """
    import numpy as np

    least = ROUNDING * np.linalg.norm(block, axis=0)
    for _twice in range(2):  # once leaves rounding errors of the size of what is taken away
        block = block - basis @ (basis.T @ block)
        norms = np.linalg.norm(block, axis=0)
        block = block * np.where(norms > least, 1 / norms, 0.0)
        squares, turn = np.linalg.eigh(block.T @ block)
        block = block @ (turn * np.where(squares > ROUNDING, 1 / np.sqrt(squares), 0.0))
        least = np.full(len(norms), 0.5)  # a column is of length 1 now, or of zeros
    return block


def _within(basis: Array, seen: Array, rank: int) -> Parts:
    """The first `rank` singular values and vectors of the part of a matrix whose columns lie in the space of a basis.

    `seen`: the transposed matrix times the basis. Its Gram matrix chooses the space of the first vectors (the square of
    its accuracy is enough for that), and a QR decomposition there gives them.
    """
    import numpy as np

    _, chosen = np.linalg.eigh(seen.T @ seen)
    chosen = chosen[:, : -rank - 1 : -1]
    right, small = np.linalg.qr(seen @ chosen)
    v, s, u = np.linalg.svd(small, full_matrices=False)
    return basis @ (chosen @ u.T), s, (right @ v).T


def _product(job: Job) -> Combine:
    """The same of a sum of products of factors: the sum over i of scale_i * B_i A_i, which is never formed.

    Inputs: A_1 [r, in], B_1 [out, r], A_2 ... . Param `scales`, one for each. In float64.
    """
    import numpy as np

    scales = job.params["scales"]
    wide = [job.whole(index).astype(np.float64) for index in range(2 * len(scales))]
    flat = [factor.reshape(len(factor), -1) for factor in wide]
    right = np.concatenate([a * scale for a, scale in zip(flat[::2], scales, strict=True)])
    left = np.concatenate([b.reshape(len(b), -1) for b in flat[1::2]], axis=1)
    outer, upper = np.linalg.qr(left)
    inner, lower = np.linalg.qr(right.T)
    u, s, v = _all_values(upper @ lower.T)
    return _result(job, (outer @ u, s, v @ inner.T), float(np.square(s).sum()))


def _result(job: Job, parts: Parts, total: float) -> Combine:
    """The rows of the output, signs made canonical."""
    import numpy as np

    rank = min(job.output.shape[0], len(parts[1]))  # a sum of products may have fewer: zeros follow
    u, s, v = parts[0][:, :rank], parts[1][:rank].astype(np.float64), parts[2][:rank]
    largest = np.take_along_axis(u, np.abs(u).argmax(axis=0)[None], axis=0)[0]
    signs = np.where(largest < 0, -1.0, 1.0)
    left = np.sqrt(np.maximum(_left(parts[1].astype(np.float64), rank, total), 0.0))
    rows = np.zeros(job.output.shape, numpy_dtype(job.output.dtype))
    out = len(u)
    rows[:rank, :out] = (u * signs).T
    rows[:rank, out:-SPECTRUM] = v * signs[:, None]
    rows[:rank, -2], rows[:rank, -1] = s, left
    result = rows.reshape(-1)
    return lambda block: result[block.start : block.start + block.count]


def _left(values: Array, rank: int, total: float) -> Array:
    """The sum of squares behind each of the first values: of the values that follow, and of what no value is known of.

    (Added from the least on, so that a small remainder keeps its digits.)
    """
    import numpy as np

    squares = np.square(values)
    behind = np.append(squares[:0:-1].cumsum()[::-1], 0.0)[:rank]
    known = float(squares.sum())
    unknown = total - known
    return behind + (unknown if unknown > 1e-6 * total else 0.0)


def _side(job: Job) -> Combine:
    """One factor of an adapter from the rows of a decomposition.

    Input: [values, out + in + 2]. Params: `side` ("A": v, [rank, in]; "B": u, [out, rank]) and `share`, which part of
    the singular value it takes: "none", "root", "whole".
    """
    import numpy as np

    rank, out = job.params["rank"], job.params["out"]
    rows = job.whole(0)[:rank]
    picked: Array = rows[:, :out] if job.params["side"] == "B" else rows[:, out:-SPECTRUM]
    values = rows[:, -2:-1]
    share = job.params["share"]
    if share != "none":
        picked = picked * (np.sqrt(values) if share == "root" else values)
    result = np.ascontiguousarray(picked.T if job.params["side"] == "B" else picked).reshape(-1)
    return lambda block: result[block.start : block.start + block.count]


def _spectrum(job: Job) -> Combine:
    """The singular values of a decomposition and what each leaves: [values, 2]."""
    import numpy as np

    result = np.ascontiguousarray(job.whole(0)[:, -SPECTRUM:]).reshape(-1)
    return lambda block: result[block.start : block.start + block.count]


def rows_spec(out: int, inner: int) -> int:
    """The length of a row of a decomposition of a matrix of these sides."""
    return out + inner + SPECTRUM


def working(double: bool) -> DType:
    """The dtype of a decomposition."""
    return DType.F64 if double else DType.F32


def _builder(name: str, prepare: Any, whole: int, version: int = 1, **more: Any) -> Builder:
    return Builder(name, version, prepare, streamed=0, scratch=0, whole=whole, **more)


SVD = (
    _builder("svd", _svd, 40, machine=True),
    _builder("svd_randomized", _randomized, 8, machine=True, seeded=True, version=2),
    _builder("svd_of_product", _product, 40, machine=True),
    _builder("lora_side", _side, 8),
    _builder("spectrum", _spectrum, 0),
)
