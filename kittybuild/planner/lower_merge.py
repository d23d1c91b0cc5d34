"""A merge stage lowered to one derivation a tensor. Pure; every problem is noted, none stops the search for more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kittybuild.builders.base import Builder, Builders
from kittybuild.errors import KittybuildError, PlanError, RecipeError, nearest
from kittybuild.model.derivation import Derivation, Input, Step
from kittybuild.model.method import Param, Scalar
from kittybuild.model.recipe import MergeStage, ModelRef, ModelUse, Slice
from kittybuild.planner.config import with_layers
from kittybuild.planner.names import before_layers, layer_of, natural, stacks
from kittybuild.planner.views import View
from kittybuild.recipe.settings import resolve
from kittybuild.tensors import DType, TensorSpec

Views = Callable[[ModelRef], View]
SHOWN = 6


@dataclass(frozen=True, slots=True)
class Row:
    """One output tensor: its name, the slice it is in, its name in each source, its position in the slice."""

    name: str
    part: Slice
    names: tuple[str, ...]
    t: float


class MergeLowering:
    """One merge stage on its way to steps. `problems` collects what is wrong."""

    def __init__(self, stage: MergeStage, views: Views, builders: Builders, problems: list[KittybuildError]) -> None:
        self.stage, self.views, self.problems = stage, views, problems
        self.builder: Builder = builders[stage.method]
        self.builders = builders
        assert self.builder.method is not None  # the recipe names methods only
        self.method = self.builder.method
        self.missing: dict[tuple[str, str], list[str]] = {}
        self.shapes: dict[str, Mapping[str, TensorSpec]] = {}

    def steps(self) -> dict[str, Step]:
        """The steps of all output tensors, in natural order of their names."""
        parts = self._parts()
        counted = [self._count_fits(part) for part in parts]
        if not all(counted):
            return {}
        rows = self._sliced(parts) if self.stage.slices else self._whole(parts[0])
        found = {row.name: self._step(row) for row in rows}
        self._report()
        return {name: found[name] for name in sorted(found, key=natural) if found[name] is not None}  # type: ignore[misc]

    def donor(self) -> View:
        """The model whose companion files and config the output takes: the base, else the first."""
        return self.views(self.stage.base or self._parts()[0].sources[0].model)

    def config(self) -> Mapping[str, Any] | None:
        """The donor's config.json as this merge changes it."""
        donor = self.donor()
        if donor.config is None or not self.stage.slices:
            return donor.config
        counts = stacks(donor.tensors)
        layers = [layer for part in self.stage.slices for layer in range(*(part.sources[0].layers or (0, 0)))]
        return with_layers(donor.config, next(iter(counts.values())), layers) if len(counts) == 1 else donor.config

    def _fail(self, code: str, message: str, at: object, hint: str | None = None) -> None:
        self.problems.append(PlanError(code, message, at=str(at), hint=hint))

    def _parts(self) -> tuple[Slice, ...]:
        """The slices; `models` are one slice of all layers, to which mergekit appends a base that is not among them."""
        stage = self.stage
        if stage.slices:
            return stage.slices
        uses = stage.models
        if stage.base and stage.base not in [use.model for use in uses]:
            uses = (*uses, ModelUse(stage.base, at=stage.base.at))
        return (Slice(uses, stage.base, {}, stage.at),)

    def _base_of(self, part: Slice) -> ModelRef | None:
        return part.base or self.stage.base

    def _count_fits(self, part: Slice) -> bool:
        base, refs = self._base_of(part), [use.model for use in part.sources]
        method = self.method
        if len(set(refs)) < len(refs):
            twice = next(ref for ref in refs if refs.count(ref) > 1)
            self._fail("KB308", f"{twice} stands twice in one slice", part.at, "name each model once a slice")
            return False
        if method.base == "required" and base not in refs:
            hint = "list the base model among the sources of the slice"
            self._fail("KB309", f"{method.name} needs its base model {base} in every slice", part.at, hint)
            return False
        if len(refs) < method.least or (method.most is not None and len(refs) > method.most):
            counted = " (the base model counts)" if base in refs else ""
            self._fail("KB309", f"{method.name} takes {method.counts_text()}, here are {len(refs)}{counted}", part.at)
            return False
        return True

    def _whole(self, part: Slice) -> Iterator[Row]:
        lead = self.views(self._base_of(part) or part.sources[0].model)
        views = [self.views(use.model) for use in part.sources]
        for view in views:
            for name in view.tensors.keys() - lead.tensors.keys():
                self.missing.setdefault((lead.label, view.label), []).append(name)
        counts = stacks(lead.tensors)
        for name in lead.tensors:
            layer = layer_of(name)
            last = counts[layer.stack] - 1 if layer else 0
            t = (layer.index / last if last else 1.0) if layer else 0.0
            yield Row(name, part, (name,) * len(part.sources), t)

    def _sliced(self, parts: tuple[Slice, ...]) -> Iterator[Row]:
        fits = [self._range_fits(use) for part in parts for use in part.sources]
        if not all(fits):
            return
        total = 0
        for index, part in enumerate(parts):
            lead = self.views(part.sources[0].model)
            first = part.sources[0].layers or (0, 0)
            count = first[1] - first[0]
            for name in lead.tensors:
                layer = layer_of(name)
                if layer is None:
                    if index == (0 if before_layers(name) else len(parts) - 1):
                        yield Row(name, part, (name,) * len(part.sources), 0.0)
                elif first[0] <= layer.index < first[1]:
                    j = layer.index - first[0]
                    names = tuple(layer.at((use.layers or first)[0] + j) for use in part.sources)
                    yield Row(layer.at(total + j), part, names, j / (count - 1) if count > 1 else 1.0)
            total += count

    def _range_fits(self, use: ModelUse) -> bool:
        view = self.views(use.model)
        counts = stacks(view.tensors)
        if len(counts) != 1:
            found = ", ".join(counts) or "none"
            hint = "merge such models whole, with `models:`"
            self._fail(
                "KB304", f"{use.model} has {len(counts)} stacks of layers ({found}): which is sliced?", use.at, hint
            )
            return False
        count = next(iter(counts.values()))
        if use.layers and use.layers[1] > count:
            self._fail("KB303", f"{use.model} has the layers [0, {count}), not {list(use.layers)}", use.at)
            return False
        return True

    def _step(self, row: Row) -> Step | None:
        inputs: list[tuple[ModelUse, str, Input]] = []
        for use, name in zip(row.part.sources, row.names, strict=True):
            view = self.views(use.model)
            if found := view.tensors.get(name):
                inputs.append((use, name, found))
            else:
                self.missing.setdefault((view.label, self.views(row.part.sources[0].model).label), []).append(name)
        if len(inputs) < len(row.names):
            return None
        base = self._base_of(row.part)
        if self.method.base == "required":
            inputs.sort(key=lambda item: item[0].model != base)  # the base first, the others as they stand
        specs = {str(use.model): tensor.spec for use, _, tensor in inputs}
        if (
            len({spec.shape for spec in specs.values()}) > 1
            or len({spec.dtype.is_float for spec in specs.values()}) > 1
        ):
            self.shapes[row.name] = specs
            return None
        return self._derive(row, inputs)

    def _derive(self, row: Row, inputs: list[tuple[ModelUse, str, Input]]) -> Step:
        tensors = tuple(tensor for _, _, tensor in inputs)
        lead = tensors[0].spec
        if not lead.dtype.is_float:
            return tensors[0] if len(tensors) == 1 else self._made("same", {}, tensors, lead)
        output = lead.with_dtype(self.stage.out_dtype or self.stage.dtype or self._first_dtype(row, inputs))
        uses = [(use, name) for use, name, _ in inputs[1 if self.method.base == "required" else 0 :]]
        params = {p.name: self._param(p, row, uses) for p in self.method.params if not p.accepted}
        if self.method.name == "passthrough" and params["scale"] == [None]:
            return tensors[0] if output == lead else self._made("cast", {}, tensors, output)
        return self._made(self.stage.method, params, tensors, output)

    def _first_dtype(self, row: Row, inputs: list[tuple[ModelUse, str, Input]]) -> DType:
        """The dtype of the base's tensor, else of the first model's."""
        base = self._base_of(row.part)
        return next((tensor for use, _, tensor in inputs if use.model == base), inputs[0][2]).spec.dtype

    def _made(
        self, builder: str, params: Mapping[str, Any], inputs: tuple[Input, ...], output: TensorSpec
    ) -> Derivation:
        return Derivation(builder, self.builders[builder].version, params, inputs, output)

    def _param(self, param: Param, row: Row, uses: list[tuple[ModelUse, str]]) -> Scalar | list[Scalar | None] | None:
        shared = ((row.part.parameters, row.name), (self.stage.parameters, row.name))
        if param.scope == "shared":
            return self._value(param, [*shared], row.t, None)
        return [
            self._value(param, [(use.parameters, name), *((given, name) for given, _ in shared)], row.t, use)
            for use, name in uses
        ]

    def _value(self, param: Param, scopes: list[Any], t: float, use: ModelUse | None) -> Scalar | None:
        try:
            found = resolve(param, scopes, t)
        except RecipeError as error:
            if not any(str(known) == str(error) for known in self.problems):
                self.problems.append(error)
            return param.default
        if found is None:
            whose = f" of {use.model}" if use else ""
            at = str(use.at if use else self.stage.at)
            message = f"{self.method.name} needs the parameter {param.name!r}{whose}"
            if not any(
                known.code == "KB115" and known.message.startswith(message) and known.at == at
                for known in self.problems
            ):
                hint = f"add `{param.name}:` under `parameters:` (nothing given matches {scopes[0][1]})"
                self.problems.append(RecipeError("KB115", message, at=at, hint=hint))
            return param.default
        return found.value

    def _report(self) -> None:
        """Missing tensors and unequal shapes, each kind in one error."""
        for (lacking, having), names in self.missing.items():
            unique = sorted(set(names), key=natural)
            rows = "".join(f"\n  {name}" for name in unique[:SHOWN])
            more = f"\n  and {len(unique) - SHOWN} more" if len(unique) > SHOWN else ""
            near = (
                nearest(unique[0], self.views_by_label(lacking)) if len(unique) == 1 else "are these models siblings?"
            )
            text = f"{lacking} lacks {len(unique)} tensors that {having} has:{rows}{more}"
            self._fail("KB302", text.replace(" 1 tensors", " a tensor"), self.stage.at, near)
        if self.shapes:
            shown = list(self.shapes.items())[:SHOWN]
            rows = "".join(f"\n  {name}: " + ", ".join(f"{m} {s}" for m, s in specs.items()) for name, specs in shown)
            more = f"\n  and {len(self.shapes) - SHOWN} more" if len(self.shapes) > SHOWN else ""
            hint = "only tensors of one shape can be merged; where vocabularies differ, bring them to one size first"
            self._fail(
                "KB301", f"the inputs of {len(self.shapes)} tensors differ in shape{rows}{more}", self.stage.at, hint
            )

    def views_by_label(self, label: str) -> list[str]:
        """The tensor names of the model with that label."""
        refs = [use.model for part in self._parts() for use in part.sources]
        return next((list(view.tensors) for view in map(self.views, refs) if view.label == label), [])
