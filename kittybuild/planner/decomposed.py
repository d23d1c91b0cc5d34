"""Modules whose differences become factors, their decompositions, and what is cut from these. Pure.

The decompositions and their spectra are stages of their own, `NAME/factors` and `NAME/spectra`: another rank below the
same `most`, dtype or share of the scale decomposes nothing again, nor does a layer that is as it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kittybuild.builders.base import Builders
from kittybuild.builders.svd import rows_spec, working
from kittybuild.errors import KittybuildError, PlanError
from kittybuild.model.derivation import KITTY_1, Derivation, Input, StageTensor, Step
from kittybuild.model.recipe import At, Decomposition, Rank
from kittybuild.planner.adapters import Kind, factor_names
from kittybuild.planner.machine import Machine
from kittybuild.tensors import DType, Shape, TensorSpec

Spectrum = Sequence[tuple[float, float]]
"""The singular values of a module, each with the norm of what is left behind it."""
Spectra = Mapping[str, Mapping[str, Spectrum]]
"""Those of the modules of each stage that are known."""


@dataclass(frozen=True, slots=True)
class Module:
    """A module whose difference becomes factors of a matrix of these `sides`, out and in.

    `inputs`: its weight and what it differs from, or a difference; with `scales` the As and Bs whose scaled products
    are the difference. `tail`: the shape of the weight behind its first side; `transposed`: it is kept as [in, out].
    """

    name: str
    kind: Kind
    inputs: tuple[Input, ...]
    sides: tuple[int, int]
    tail: Shape
    transposed: bool = False
    scales: tuple[float, ...] = ()

    @classmethod
    def of_weights(cls, name: str, kind: Kind, inputs: tuple[Input, ...], *, transposed: bool) -> Module:
        """One with weights of its own."""
        first, *rest = inputs[0].spec.shape
        inner = math.prod(rest)
        return cls(name, kind, inputs, (inner, first) if transposed else (first, inner), tuple(rest), transposed)


class Decomposed:
    """The decompositions of a stage, and the cuts of them."""

    def __init__(self, stage: str, how: Decomposition, builders: Builders, seed: int, machine: Machine | None) -> None:
        self.how, self.builders, self.seed = how, builders, seed
        self.numerics = f"{KITTY_1};{machine.numpy_text()}" if machine else KITTY_1
        self.factors_stage, self.spectra_stage = f"{stage}/factors", f"{stage}/spectra"
        self.factors: dict[str, Derivation] = {}
        self.spectra: dict[str, Derivation] = {}

    def rank(self, module: Module, spectra: Mapping[str, Spectrum] | None) -> int:
        """How many values a module keeps, as far as is known."""
        most = min(self.how.rank.most, *module.sides)
        return _rank(self.how.rank, spectra[module.name], most) if spectra is not None else most

    def sides(self, module: Module, rank: int, dtype: DType) -> dict[str, Step]:
        """A and B of a module by their names in the adapter."""
        rows = self.decomposed(module)
        out = module.sides[0]
        shares = ("root", "root") if self.how.distribute else ("whole", "none")
        found: dict[str, Step] = {}
        shapes = _factor_shapes(module, rank)
        for side, share, name, shape in zip("AB", shares, factor_names(module.name, module.kind), shapes, strict=True):
            params = {"side": side, "rank": rank, "out": out, "share": share}
            spec = TensorSpec(dtype, shape)
            found[name] = Derivation("lora_side", self.builders["lora_side"].version, params, (rows,), spec)
        return found

    def decomposed(self, module: Module) -> Input:
        """The decomposition of a module; its spectrum is cut from it."""
        spec = TensorSpec(working(self.how.double), (min(self.how.rank.most, *module.sides), rows_spec(*module.sides)))
        self.factors[module.name] = self._decomposition(module, spec)
        given = StageTensor(self.factors_stage, module.name, spec)
        values = TensorSpec(DType.F64, (spec.shape[0], 2))
        self.spectra[module.name] = Derivation("spectrum", self.builders["spectrum"].version, {}, (given,), values)
        return given

    def _decomposition(self, module: Module, spec: TensorSpec) -> Derivation:
        if module.scales:
            product = "svd_of_product"
            of = {"scales": list(module.scales)}
            return Derivation(product, self.builders[product].version, of, module.inputs, spec, self.numerics)
        params: dict[str, Any] = {"transposed": module.transposed, "double": self.how.double}
        name = "svd"
        if self.how.iterations is not None:
            name = "svd_randomized"
            params |= {"iterations": self.how.iterations, "seed": self.seed, "tensor": module.name}
        return Derivation(name, self.builders[name].version, params, module.inputs, spec, self.numerics)


def _rank(rank: Rank, spectrum: Spectrum, most: int) -> int:
    """How many of these values are kept."""
    if rank.threshold is not None:
        most = min(most, sum(value > rank.threshold for value, _ in spectrum))
    if rank.energy is not None and spectrum:
        total = spectrum[0][0] ** 2 + spectrum[0][1] ** 2
        enough = (count for count, (_, left) in enumerate(spectrum, 1) if left**2 <= (1 - rank.energy) * total)
        most = min(most, next(enough, most)) if total else 0
    return most


def _factor_shapes(module: Module, rank: int) -> tuple[Shape, Shape]:
    """The shapes of A and B."""
    out, inner = module.sides
    if module.kind != "conv":
        return (rank, inner), (out, rank)
    return (rank, *module.tail), (out, rank, *(1 for _ in module.tail[1:]))


def too_small(modules: Sequence[Module], rank: Rank, at: At) -> list[KittybuildError]:
    """The problem where a rank is above that of some matrix."""
    small = [module for module in modules if rank.exact and rank.most > min(module.sides)]
    if not small:
        return []
    more = f" (and {len(small) - 1} more)" if len(small) > 1 else ""
    message = f"rank {rank.most} is above that of {small[0].name}, a matrix of {list(small[0].sides)}{more}"
    hint = f"write `rank: {{most: {rank.most}}}` to take what each has"
    return [PlanError("KB360", message, at=str(at), hint=hint)]
