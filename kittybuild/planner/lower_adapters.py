"""A merge_adapters stage lowered to an adapter: what its adapters add to each module is merged without the base. Pure.

Differences are summed exactly as factors: side by side, or decomposed from these, never formed. Where a method looks at
single elements of a difference, it is formed in memory and decomposed again. With `space: factors` each factor is
merged by itself, as PEFT's combination types do it (add_weighted_adapter, PEFT 0.21).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kittybuild.builders.base import Builders
from kittybuild.checkpoint.adapter import Factors
from kittybuild.errors import KittybuildError, PlanError
from kittybuild.model.derivation import Derivation, Input, StageTensor, Step
from kittybuild.model.recipe import MergeAdaptersStage
from kittybuild.planner.adapters import Kind, adapter_config, factor_names
from kittybuild.planner.decomposed import Decomposed, Module, Spectrum, too_small
from kittybuild.planner.lower_lora import Applied
from kittybuild.planner.machine import Machine
from kittybuild.planner.names import natural
from kittybuild.tensors import DType, TensorSpec

Pairs = Sequence[tuple[Applied, Factors]]


class AdaptersLowering:
    """One stage on its way to steps. `hidden`: stages of differences that nothing keeps."""

    def __init__(
        self,
        stage: MergeAdaptersStage,
        adapters: Sequence[Applied],
        builders: Builders,
        problems: list[KittybuildError],
        *,
        seed: int,
        machine: Machine | None,
        spectra: Mapping[str, Spectrum] | None,
    ) -> None:
        self.stage, self.builders, self.problems, self.seed, self.spectra = stage, builders, problems, seed, spectra
        self.adapters = adapters
        self.dtype = stage.out_dtype or stage.dtype or DType.F32
        how = stage.decomposition
        self.cut = Decomposed(stage.name, how, builders, seed, machine) if how else None
        self.hidden: dict[str, dict[str, Derivation]] = {}
        self.modules = self._modules()
        self.ranks: dict[str, int] = {}

    def steps(self) -> dict[str, Step]:
        """The merged adapter's tensors, in natural order."""
        found: dict[str, Step] = {}
        if self.cut:
            modules = [self._module(name, pairs) for name, pairs in self.modules.items()]
            self.problems += too_small(modules, self.cut.how.rank, self.stage.at)
            for module in modules:
                self.cut.decomposed(module)
                self.ranks[module.name] = self.cut.rank(module, self.spectra)
                if rank := self.ranks[module.name]:
                    found |= self.cut.sides(module, rank, self.dtype)
        else:
            for name, pairs in self.modules.items():
                by_factor = self.stage.space == "factors"
                found |= self._by_factor(name, pairs) if by_factor else self._joined(name, pairs)
        return {name: found[name] for name in sorted(found, key=natural)}

    def config(self) -> dict[str, Any]:
        """adapter_config.json."""
        # The base is that of the first: what else would they be merged for.
        return adapter_config(
            {name: rank for name, rank in self.ranks.items() if rank},
            base=self.adapters[0].base,
            others=None,
            transposed=self.adapters[0].adapter.transposed,
        )

    def _modules(self) -> dict[str, Pairs]:
        """The modules with the adapters that have them; what cannot be merged is noted."""
        found: dict[str, list[tuple[Applied, Factors]]] = {}
        for use in self.adapters:
            held = [*use.adapter.whole, *use.adapter.added, *(m for m, p in use.adapter.modules.items() if p.magnitude)]
            if held:
                self._fail("KB363", f"{use.label} holds more than factors: {held[0]}", "apply it to its base instead")
            for module, pair in use.adapter.modules.items():
                found.setdefault(module, []).append((use, pair))
        if len({use.adapter.transposed for use in self.adapters}) > 1:
            sides = ", ".join(f"{use.label} {str(use.adapter.transposed).lower()}" for use in self.adapters)
            self._fail("KB310", f"the adapters disagree on how their base keeps its weights (fan_in_fan_out: {sides})")
        for module, pairs in found.items():
            if len({(pair.matrix, pair.embedding) for _, pair in pairs}) > 1:
                sizes = ", ".join(f"{use.label} {list(pair.matrix)}" for use, pair in pairs)
                self._fail(
                    "KB301", f"{module}: the adapters are for other sizes: {sizes}", "were they made for one base?"
                )
                break
        return {name: found[name] for name in sorted(found, key=natural)}

    def _fail(self, code: str, message: str, hint: str | None = None) -> None:
        self.problems.append(PlanError(code, message, at=str(self.stage.at), hint=hint))

    def _derive(self, builder: str, params: Mapping[str, Any], inputs: Sequence[Input], spec: TensorSpec) -> Derivation:
        more = {"seed": self.seed} if self.builders[builder].seeded else {}
        return Derivation(builder, self.builders[builder].version, {**params, **more}, tuple(inputs), spec)

    def _hide(self, stage: str, name: str, made: Derivation) -> Input:
        """A tensor that is made in memory where it is needed."""
        label = f"{self.stage.name}/{stage}"
        self.hidden.setdefault(label, {})[name] = made
        return StageTensor(label, name, made.spec)

    def _joined(self, module: str, pairs: Pairs) -> dict[str, Step]:
        """The exact sum: ranks add up."""
        scales = [use.weight * pair.scale for use, pair in pairs]
        rank = self.ranks[module] = sum(pair.a.spec.shape[0] for _, pair in pairs)
        first = pairs[0][1]
        found: dict[str, Step] = {}
        for side, name, part in zip("AB", factor_names(module, _kind(first)), (first.a, first.b), strict=True):
            shape = part.spec.shape
            spec = TensorSpec(self.dtype, (rank, *shape[1:]) if side == "A" else (shape[0], rank, *shape[2:]))
            given = [use.given(pair.a if side == "A" else pair.b) for use, pair in pairs]
            found[name] = self._derive("lora_joined", {"side": side, "scales": scales}, given, spec)
        return found

    def _module(self, module: str, pairs: Pairs) -> Module:
        """What is decomposed: the sum of the products, or a difference merged element by element."""
        first = pairs[0][1]
        out, tail = first.matrix[0], first.matrix[1:]
        sides, scales = (out, math.prod(tail)), tuple(use.weight * pair.scale for use, pair in pairs)
        if self.stage.method in ("cat", "svd", "linear"):
            inputs = tuple(use.given(part) for use, pair in pairs for part in (pair.a, pair.b))
            return Module(module, _kind(first), inputs, sides, tail, scales=scales)
        spec = TensorSpec(DType.F32, sides)
        zero = self._zero(module, spec)
        deltas = []
        for index, ((use, pair), scale) in enumerate(zip(pairs, scales, strict=True)):
            params = {"scales": [scale], "transposed": False}
            made = self._derive("lora", params, (zero, use.given(pair.a), use.given(pair.b)), spec)
            deltas.append(self._hide(f"difference {index + 1}", module, made))
        merged = self._hide("merged", module, self._sparse(module, zero, deltas, spec))
        return Module(module, _kind(first), (merged,), sides, tail)

    def _by_factor(self, module: str, pairs: Pairs) -> dict[str, Step]:
        """Each factor merged by itself, the weights shared between both: their sign is A's."""
        found: dict[str, Step] = {}
        first = pairs[0][1]
        for use, pair in pairs:
            if pair.a.spec.shape != first.a.spec.shape:
                ranks = f"{pairs[0][0].label} {first.a.spec.shape[0]}, {use.label} {pair.a.spec.shape[0]}"
                hint = "leave `space` out: differences of any ranks can be merged"
                self._fail("KB364", f"{module}: factors of other ranks cannot be merged one by one ({ranks})", hint)
                return {}
        self.ranks[module] = first.a.spec.shape[0]
        scales = [use.weight * pair.scale for use, pair in pairs]
        roots = [math.sqrt(abs(scale)) for scale in scales]
        signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
        for side, name, shares in zip("AB", factor_names(module, _kind(first)), (signed, roots), strict=True):
            given = [use.given(pair.a if side == "A" else pair.b) for use, pair in pairs]
            spec = given[0].spec.with_dtype(self.dtype)
            if self.stage.method == "linear":
                found[name] = self._derive("linear", {"weight": shares, "normalize": False}, given, spec)
                continue
            wide = spec.with_dtype(DType.F32)
            scaled = [
                self._hide(
                    f"factors {index + 1}",
                    name,
                    self._derive("linear", {"weight": [share], "normalize": False}, (one,), wide),
                )
                for index, (one, share) in enumerate(zip(given, shares, strict=True))
            ]
            found[name] = self._sparse(name, self._zero(name, wide), scaled, spec)
        return found

    def _zero(self, name: str, spec: TensorSpec) -> Input:
        return self._hide("zeros", name, self._derive("zeros", {}, (), spec))

    def _sparse(self, name: str, zero: Input, given: Sequence[Input], spec: TensorSpec) -> Derivation:
        """Differences, weighted already, merged by a method that keeps a share of their elements."""
        method = self.builders[self.stage.method].method
        assert method is not None  # the schema names merge methods only
        params: dict[str, Any] = {}
        for param in method.params:
            params[param.name] = [param.default] * len(given) if param.scope == "input" else param.default
        params |= {"weight": [1.0] * len(given), "density": [self.stage.density] * len(given)}
        params |= {
            "normalize": self.stage.method == "ties",
            "rescale": "none" if self.stage.method == "ties" else "density",
        }
        params |= {"tensor": name} if self.builders[self.stage.method].seeded else {}
        return self._derive(self.stage.method, params, (zero, *given), spec)


def _kind(pair: Factors) -> Kind:
    if pair.embedding:
        return "embedding"
    return "conv" if len(pair.a.spec.shape) > 2 else "linear"
