"""A merge stage lowered to one derivation a tensor. Pure; every problem is noted, none stops the search for more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from kittybuild.builders.base import Builders
from kittybuild.errors import KittybuildError
from kittybuild.model.derivation import Derivation, Input, Step
from kittybuild.model.recipe import MergeStage
from kittybuild.planner.config import LayerOrigin, with_layers
from kittybuild.planner.fitting import Derive, Fitting
from kittybuild.planner.machine import Machine
from kittybuild.planner.merge_params import Origin, PartParams
from kittybuild.planner.merge_report import MergeReport, counted, listed
from kittybuild.planner.names import is_vocabulary, natural
from kittybuild.planner.parts import Findings, Part, Row, Views, fits, parts_of, rows_of
from kittybuild.planner.peers import Fitted, rules_of
from kittybuild.planner.same import is_computed
from kittybuild.planner.towers import sliced
from kittybuild.planner.views import View
from kittybuild.tensors import DType, Shape, TensorSpec


class MergeLowering:
    """One merge stage on its way to steps. `problems` collects what is wrong, `notes` what a person should know.

    `donor`: the model whose companion files and config the output takes: the base, else the first.
    """

    def __init__(
        self,
        stage: MergeStage,
        views: Views,
        builders: Builders,
        problems: list[KittybuildError],
        seed: int,
        machine: Machine | None = None,
        derive: Derive | None = None,
        only: Callable[[str], bool] | None = None,
    ) -> None:
        self.stage, self.builders, self.seed, self.machine = stage, builders, seed, machine
        self.findings = Findings(problems)
        self.fitting = Fitting(stage, views, builders, self.findings, derive, only)
        self.notes, self.ignored = self.findings.notes, self.findings.ignored
        self.rules = rules_of(stage.numerics)
        self.parts = parts_of(stage, self.fitting.of, builders)
        self._numerics = {id(part): self._class(part) for part in self.parts}
        self.params = {id(part): PartParams(stage, part, self.rules, self.findings) for part in self.parts}
        self.donor = views(stage.base) if stage.base else views(self.parts[0].sources[0].model)
        self.report = MergeReport(stage, self.parts, self.params, self.rules, self.findings)
        self.rows: list[Row] = []

    def steps(self) -> dict[str, Step]:
        """The steps of all output tensors, in natural order of their names."""
        fit = [fits(self.stage, part, self.rules, self.findings) for part in self.parts]
        rows = rows_of(self.stage, self.parts, self.rules, self.findings) if all(fit) else None
        if rows is None:
            return {}
        self.rows = rows
        found = {row.name: step for row in self.rows if (step := self._step(row)) is not None}
        if self.stage.tensors == "intersection":
            self._common()
        if self.stage.take:
            found |= self._rest(found)
        self.fitting.finish()
        self.report.finish(self.rows)
        return {name: found[name] for name in sorted(found, key=natural)}

    def origins(self, tensor: str) -> tuple[Origin, ...]:
        """The parameters of an output tensor, each with where it came from."""
        row = self._named_rows.get(tensor)
        return self.params[id(row.part)].origins(row) if row else ()

    @cached_property
    def _named_rows(self) -> dict[str, Row]:
        return {row.name: row for row in self.rows}

    def config(self, given: Mapping[str, Any] | None = None) -> Mapping[str, Any] | None:
        """The donor's config.json (`given`: as other modules changed it) as this merge changes it."""
        donor, given = self.donor, given or self.donor.config
        if donor.config is None or given is None or not self.stage.slices:
            return given
        found = sliced(self.fitting.reference.tensors, donor.config)
        if len(found) != 1:
            return given
        origins = [
            LayerOrigin(part.views[0].config or donor.config, part.tower, layer)
            for part in self.parts
            for layer in range(*(part.sources[0].layers or (0, 0)))
        ]
        changed, doubts = with_layers(given, found[0], origins)
        if not found[0].keys and len(origins) != found[0].count:
            self.notes.append(
                f"{self.stage.at}: the config.json of {donor.label} names no number of {found[0].count} layers that"
                f" could become {len(origins)}: change it by hand"
            )
        for key in doubts:
            message = f"{key!r} in the config.json of {donor.label} cannot say which layers these are: look at it"
            self.notes.append(f"{self.stage.at}: {message}")
        return changed

    def _common(self) -> None:
        """Note what an intersection leaves out."""
        for view in self.parts[0].views:
            gone = view.tensors.keys() - {row.name for row in self.rows}
            if gone:
                shown = listed(sorted(gone, key=natural))
                text = f"not all models have {counted(len(gone), 'tensor')} of {view.label}, left out:{shown}"
                self.notes.append(f"{self.stage.at}: {text}")

    def _rest(self, found: Mapping[str, Step]) -> dict[str, Step]:
        """The base's tensors that no other model has; what it lacks has no place in its config."""
        base = self.fitting.reference
        tower = self.parts[0].tower if self.stage.slices else None
        for name, step in found.items():
            layer = tower.layer(name) if tower else None
            if name not in base.tensors and not layer:
                lead = next(row.lead for row in self.rows if row.name == name)
                self.findings.lacks(base, lead, name)
            elif not layer and step.spec.shape != base.tensors[name].spec.shape:
                self.report.shapes[name] = {base.label: base.tensors[name].spec, "the merge": step.spec}
        named = {name for part in self.parts for view in part.views if view is not base for name in view.tensors}
        rest = [name for name in base.tensors if name not in named and not (tower and tower.layer(name))]
        self.notes.append(f"{self.stage.at}: taken from {base.label} as it is: {counted(len(rest), 'tensor')}")
        return {name: self.taken(base.tensors[name]) for name in rest}

    def taken(self, given: Input) -> Step:
        """A tensor that is not merged, in the dtype of the output."""
        output = self.stage.out_dtype or self.stage.dtype
        if output is None or not given.spec.dtype.is_float or given.spec.dtype is output:
            return given
        return self._plain("cast", (given,), given.spec.with_dtype(output))

    def _lacking(self, row: Row, views: list[View]) -> Step | None:
        """The step of a row that some models lack: none, if that is an error."""
        name, lead = row.names[row.part.views.index(row.lead)], row.lead
        given = lead.tensors.get(name)
        if given and is_computed(name, given.spec):
            self.findings.computed.setdefault((views[0].label, lead.label), []).append(name)
            return self.taken(given)
        others = [view for view in row.part.views if view is not lead]
        if self.stage.take and lead is self.fitting.reference and others == views:
            return None  # it is among the rest of the base
        for view in views:
            self.findings.lacks(view, lead, row.names[row.part.views.index(view)])
        return None

    def _step(self, row: Row) -> Step | None:
        part = row.part
        if self.stage.tensors == "union":
            return self._of_those_that_have(row)
        inputs = [found for view, name in zip(part.views, row.names, strict=True) if (found := view.tensors.get(name))]
        if len(inputs) < len(row.names):
            both = zip(part.views, row.names, strict=True)
            return self._lacking(row, [view for view, name in both if name not in view.tensors])
        specs = [given.spec for given in inputs]
        first = specs[0]
        fitted = (first.shape, part.everything) if all(spec == first for spec in specs) else self._fitted(row, specs)
        if fitted is None:
            self.report.shapes[row.name] = {part.named(index): spec for index, spec in enumerate(specs)}
            return None
        self.report.see(row, specs, *fitted)
        if not first.dtype.is_float:
            return inputs[0] if len(inputs) == 1 else self._plain("same", tuple(inputs), first)
        return self._derive(row, inputs, *fitted)

    def _of_those_that_have(self, row: Row) -> Step | None:
        """The step of a row of the models that have it; what only one has is taken as it is."""
        part, method = row.part, row.part.method
        inputs = [view.tensors.get(row.name) for view in part.views]
        taking = tuple(index for index, given in enumerate(inputs) if given)
        specs = {index: given.spec for index, given in enumerate(inputs) if given}
        if len({spec.with_dtype(DType.F32) if spec.dtype.is_float else spec for spec in specs.values()}) > 1:
            self.report.shapes[row.name] = {part.named(index): spec for index, spec in specs.items()}
            return None
        given = tuple(given for given in inputs if given)
        self.report.see(row, [one.spec for one in given], given[0].spec.shape, taking)
        if len(given) == 1:
            return self.taken(given[0])
        if not given[0].spec.dtype.is_float:
            return self._plain("same", given, given[0].spec)
        count = len(taking) - (part.base in taking)
        if count < method.least or (method.base == "required" and part.anchor not in taking):
            for view in part.views:
                if row.name not in view.tensors:
                    self.findings.lacks(view, row.lead, row.name)
            return None
        return self._derive(row, inputs, given[0].spec.shape, taking)

    def _fitted(self, row: Row, specs: list[TensorSpec]) -> Fitted | None:
        """The output's shape and the inputs that take part, of inputs that differ; None where they do not fit."""
        if len({"float" if spec.dtype.is_float else spec.dtype for spec in specs}) > 1:
            return None
        if all(spec.shape == specs[0].shape for spec in specs):
            return specs[0].shape, row.part.everything
        vocabulary = is_vocabulary(row.name)
        return self.rules.fitted(row.part.method.name, specs, row.part.base, vocabulary=vocabulary)

    def _derive(self, row: Row, found: Sequence[Input | None], shape: Shape, taking: tuple[int, ...]) -> Step:
        """The step of a row from those of its inputs that take part."""
        part, dtype = row.part, self.stage.dtype
        inputs = {index: given for index, given in enumerate(found) if given}
        params = self.params[id(part)].of(row, taking)
        based = params["base"] if part.method.base == "optional" else part.base is not None
        given = tuple(inputs[index] for index in (part.order(taking) if based else taking))
        lead = inputs.get(part.anchor or 0, inputs[taking[0]]).spec
        result = dtype or lead.dtype
        if self.rules.peer:
            params["dtype"] = dtype.torch_name if dtype else None
            specs = [tensor.spec for tensor in given]
            result = self.rules.promoted(part.method.name, specs, 0 if based else None, dtype)
        output = self.stage.out_dtype or result
        made = lead.with_dtype(output) if shape == lead.shape else TensorSpec(output, shape)
        if part.method.name == "passthrough" and params["scale"] == [None]:
            if lead.dtype is result is output:
                return given[0]
            if not self.rules.peer:  # which rounds twice where `dtype` and `out_dtype` differ
                return self._plain("cast", given, made)
        if part.builder.seeded:
            params |= {"seed": self.seed, "tensor": row.name}
        return Derivation(part.builder.name, part.builder.version, params, given, made, self._numerics[id(part)])

    def _plain(self, builder: str, inputs: tuple[Input, ...], output: TensorSpec) -> Derivation:
        """A step without arithmetic, which is the same in all classes."""
        return Derivation(builder, self.builders[builder].version, {}, inputs, output)

    def _class(self, part: Part) -> str:
        """The class of arithmetic, with the machine where bits depend on it."""
        if not self.rules.peer:
            return self.stage.numerics
        assert self.machine is not None  # whoever lowers a peer's class says where
        return f"{self.stage.numerics};{self.machine.text(numpy=part.method.name in self.rules.numpy)}"
