"""A merge stage lowered to one derivation a tensor. Pure; every problem is noted, none stops the search for more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kittybuild.builders.base import Builder, Builders
from kittybuild.errors import KittybuildError, PlanError, RecipeError, nearest
from kittybuild.model.derivation import Derivation, Input, Step
from kittybuild.model.method import Param, Scalar
from kittybuild.model.recipe import MergeStage, ModelRef, ModelUse, Parameters, Slice
from kittybuild.planner.config import with_layers
from kittybuild.planner.names import before_layers, layer_of, natural, stacks
from kittybuild.planner.views import View
from kittybuild.recipe.settings import resolve, unused
from kittybuild.tensors import DType, TensorSpec

Views = Callable[[ModelRef], View]
SHOWN = 6


@dataclass(frozen=True, slots=True)
class Row:
    """One output tensor: its name, the slice it is in, its name in each source, its position in the slice.

    `lead`: the model whose names count.
    """

    name: str
    part: Slice
    names: tuple[str, ...]
    t: float
    lead: View


class MergeLowering:
    """One merge stage on its way to steps. `problems` collects what is wrong, `notes` what a person should know."""

    def __init__(
        self, stage: MergeStage, views: Views, builders: Builders, problems: list[KittybuildError], seed: int
    ) -> None:
        self.stage, self.views, self.problems, self.seed = stage, views, problems, seed
        self.builder: Builder = builders[stage.method]
        self.builders = builders
        assert self.builder.method is not None  # the recipe names methods only
        self.method = self.builder.method
        self.missing: dict[tuple[str, str], list[str]] = {}
        self.shapes: dict[str, Mapping[str, TensorSpec]] = {}
        self.told: set[tuple[str, str]] = set()
        self.notes: list[str] = []

    def steps(self) -> dict[str, Step]:
        """The steps of all output tensors, in natural order of their names."""
        parts = self._parts()
        fits = [self._count_fits(part) for part in parts]
        if not all(fits):
            return {}
        rows = list(self._sliced(parts) if self.stage.slices else self._whole(parts[0]))
        found = {row.name: self._step(row) for row in rows}
        self._report()
        self._note_unused(rows)
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
        if len(counts) != 1:
            return donor.config
        old = next(iter(counts.values()))
        changed = with_layers(donor.config, old, layers)
        if changed == donor.config and len(layers) != old:
            self.notes.append(
                f"{self.stage.at}: the config.json of {donor.label} names no number of {old} layers that"
                f" could become {len(layers)}: change it by hand"
            )
        return changed

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

    def _is_base(self, ref: ModelRef, part: Slice) -> bool:
        """Whether a model is the one that the method takes differences from."""
        return self.method.base != "ordinary" and ref == self._base_of(part)

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
        count = len([ref for ref in refs if not self._is_base(ref, part)])
        if count < method.least or (method.most is not None and count > method.most):
            hint = "take some away, or choose another method" if count > method.least else "add one"
            if method.base == "ordinary" and base in refs and base not in [use.model for use in self.stage.models]:
                hint = "base_model is one of them: take it away, or one of the others"
            message = f"{method.name} takes {method.counts_text()}, here are {count}"
            self._fail("KB309", message, part.at, hint)
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
            yield Row(name, part, (name,) * len(part.sources), t, lead)

    def _sliced(self, parts: tuple[Slice, ...]) -> Iterator[Row]:
        fits = [self._range_fits(use) for part in parts for use in part.sources]
        if not all(fits):
            return
        leads = [self.views(part.sources[0].model) for part in parts]
        self._outer_fit(leads[0], leads[-1])
        total = 0
        for index, (part, lead) in enumerate(zip(parts, leads, strict=True)):
            spans = [use.layers or (0, 0) for use in part.sources]
            first, count = spans[0], spans[0][1] - spans[0][0]
            for name in lead.tensors:
                layer = layer_of(name)
                if layer is None:
                    if index == (0 if before_layers(name) else len(parts) - 1):
                        yield Row(name, part, (name,) * len(part.sources), 0.0, lead)
                elif first[0] <= layer.index < first[1]:
                    j = layer.index - first[0]
                    names = tuple(layer.at(span[0] + j) for span in spans)
                    yield Row(layer.at(total + j), part, names, j / (count - 1) if count > 1 else 1.0, lead)
            for use, span in zip(part.sources[1:], spans[1:], strict=True):
                self._extra(lead, first, self.views(use.model), span)
            total += count

    def _outer_fit(self, first: View, last: View) -> None:
        """What stands before the layers comes from the first slice and the rest from the last: neither may be lost."""
        for lacking, having in ((first, last), (last, first)):
            lost = [name for name in having.tensors if layer_of(name) is None and name not in lacking.tensors]
            if lost:
                self.missing.setdefault((lacking.label, having.label), []).extend(lost)

    def _extra(self, lead: View, first: tuple[int, int], view: View, span: tuple[int, int]) -> None:
        """Tensors of a source's layers that the first source of the slice lacks."""
        for name in view.tensors:
            layer = layer_of(name)
            if layer is None or not span[0] <= layer.index < span[1]:
                continue
            wanted = layer.at(first[0] + layer.index - span[0])
            if wanted not in lead.tensors:
                self.missing.setdefault((lead.label, view.label), []).append(wanted)

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
            hint = "layers count from 0, and the end is not taken"
            self._fail("KB303", f"{use.model} has the layers [0, {count}), not {list(use.layers)}", use.at, hint)
            return False
        return True

    def _step(self, row: Row) -> Step | None:
        inputs: list[tuple[ModelUse, str, Input]] = []
        for use, name in zip(row.part.sources, row.names, strict=True):
            view = self.views(use.model)
            if found := view.tensors.get(name):
                inputs.append((use, name, found))
            else:
                self.missing.setdefault((view.label, row.lead.label), []).append(name)
        if len(inputs) < len(row.names):
            return None
        inputs.sort(key=lambda item: not self._is_base(item[0].model, row.part))  # the others as they stand
        specs = {str(use.model): tensor.spec for use, _, tensor in inputs}
        kinds = {"float" if spec.dtype.is_float else spec.dtype for spec in specs.values()}
        if len({spec.shape for spec in specs.values()}) > 1 or len(kinds) > 1:
            self.shapes[row.name] = specs
            return None
        return self._derive(row, inputs)

    def _derive(self, row: Row, inputs: list[tuple[ModelUse, str, Input]]) -> Step:
        tensors = tuple(tensor for _, _, tensor in inputs)
        lead = tensors[0].spec
        if not lead.dtype.is_float:
            return tensors[0] if len(tensors) == 1 else self._made("same", {}, tensors, lead)
        output = lead.with_dtype(self.stage.out_dtype or self.stage.dtype or self._first_dtype(row, inputs))
        uses = [(use, name) for use, name, _ in inputs if not self._is_base(use.model, row.part)]
        params: dict[str, Any] = {p.name: self._param(p, row, uses) for p in self.method.params if not p.accepted}
        if self.method.base == "optional":
            params["base"] = len(uses) < len(inputs)
        if self.builder.seeded:
            params |= {"seed": self.seed, "tensor": row.name}
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
            self._tell(error)
            return param.default
        if found is None:
            self._tell(self._not_given(param, scopes, use))
            return param.default
        return found.value

    def _not_given(self, param: Param, scopes: list[Any], use: ModelUse | None) -> RecipeError:
        message = f"{self.method.name} needs the parameter {param.name!r}" + (f" of {use.model}" if use else "")
        if any(param.name in parameters for parameters, _ in scopes):
            hint = f"no filter takes {scopes[0][1]}: add an entry without one"
        elif use and use not in self.stage.models and not self.stage.slices:
            hint = f"base_model is merged like the others: list it with its {param.name}, or leave it out"
        else:
            hint = f"add `{param.name}:` under `parameters:`"
        return RecipeError("KB115", message, at=str(use.at if use else self.stage.at), hint=hint)

    def _tell(self, error: RecipeError) -> None:
        """Note a problem of a parameter, once for all tensors."""
        if (error.code, str(error.at)) not in self.told:
            self.told.add((error.code, str(error.at)))
            self.problems.append(error)

    def _note_unused(self, rows: list[Row]) -> None:
        """Note the filters that take no tensor: most often a slip of the pen."""
        self._note_unused_in(self.stage.parameters, rows)
        for part in {id(row.part): row.part for row in rows}.values():
            inside = [row for row in rows if row.part is part]
            self._note_unused_in(part.parameters, inside)
            for index, use in enumerate(part.sources):
                if use.parameters:
                    self._note_unused_in(use.parameters, [replace(row, names=(row.names[index],)) for row in inside])

    def _note_unused_in(self, parameters: Parameters, rows: list[Row]) -> None:
        for name, given in parameters.items():
            param = self.method.param(name)
            by_input = param is not None and param.scope == "input"
            names = {name for row in rows for name in (row.names if by_input else [row.name])}
            for item in unused(given, names):
                what = "the value without a filter" if item.filter is None else f"the filter {item.filter!r}"
                self.notes.append(f"{given.at}: {what} of {name!r} takes no tensor")

    def _report(self) -> None:
        """Missing tensors and unequal shapes, each kind in one error."""
        for (lacking, having), names in self.missing.items():
            unique = sorted(set(names), key=natural)
            text = f"{lacking} lacks {counted(len(unique), 'tensor')} that {having} has:{_rows(unique)}"
            if unique == ["lm_head.weight"]:
                hint = f"{lacking} uses its embedding as its head: save it with a head of its own"
            else:
                near = self.views_by_label(lacking)
                hint = nearest(unique[0], near) if len(unique) == 1 and near else "are these models siblings?"
            self._fail("KB302", text, self.stage.at, hint)
        if self.shapes:
            shown = [
                f"{name}: " + ", ".join(f"{m} {s}" for m, s in specs.items()) for name, specs in self.shapes.items()
            ]
            hint = "only tensors of one shape can be merged; where vocabularies differ, bring them to one size first"
            if all(len({spec.shape for spec in specs.values()}) == 1 for specs in self.shapes.values()):
                hint = "integers are only taken over, where they are the same in all models"
            what = counted(len(self.shapes), "tensor")
            self._fail("KB301", f"the inputs of {what} do not fit each other:{_rows(shown)}", self.stage.at, hint)

    def views_by_label(self, label: str) -> list[str]:
        """The tensor names of the model with that label."""
        refs = [use.model for part in self._parts() for use in part.sources]
        return next((list(view.tensors) for view in map(self.views, refs) if view.label == label), [])


def counted(number: int, noun: str) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _rows(names: list[str]) -> str:
    """The first of them, each on its own line."""
    more = f"\n  and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return "".join(f"\n  {name}" for name in names[:SHOWN]) + more
