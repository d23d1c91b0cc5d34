"""Which tensors a merge has, and from which tensors of its models each is made. Pure; problems are noted.

A part is a slice as it is merged: its method, its models, which of them is the base. A row is one output tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from kittybuild.builders.base import Builder, Builders
from kittybuild.errors import KittybuildError, PlanError
from kittybuild.model.method import Method
from kittybuild.model.recipe import MergeStage, ModelRef, ModelUse, Slice
from kittybuild.planner.names import before_layers, layer_of, stacks
from kittybuild.planner.peers import Rules
from kittybuild.planner.same import is_computed
from kittybuild.planner.towers import Tower, sliced
from kittybuild.planner.views import View

Views = Callable[[ModelRef], View]


@dataclass(frozen=True, eq=False)
class Part:
    """Some layers of the output. `anchor`: which of the sources is its base model, if one is.

    `base`: the same, where the method works on differences from it.
    """

    slice: Slice
    builder: Builder
    method: Method
    views: tuple[View, ...]
    anchor: int | None
    base: int | None

    def order(self, taking: tuple[int, ...]) -> tuple[int, ...]:
        """These sources in the order in which they go in: the base first, the others as they stand."""
        if not self.base or self.base not in taking:
            return taking
        return (self.base, *(index for index in taking if index != self.base))

    @functools.cached_property
    def everything(self) -> tuple[int, ...]:
        """All sources, as they stand."""
        return tuple(range(len(self.sources)))

    @property
    def sources(self) -> tuple[ModelUse, ...]:
        """The models in it."""
        return self.slice.sources

    @functools.cached_property
    def tower(self) -> Tower:
        """What its first model is sliced from, which it has."""
        return sliced(self.views[0].tensors, self.views[0].config)[0]

    @functools.cached_property
    def starts(self) -> tuple[int, ...]:
        """The first layer of each source that is in it."""
        return tuple(use.layers[0] if use.layers else 0 for use in self.sources)

    def named(self, source: int) -> str:
        """A source, told apart from others of the same model."""
        use = self.sources[source]
        twice = [other.model for other in self.sources].count(use.model) > 1
        return f"{use.model}{list(use.layers or ())}" if twice else str(use.model)


@dataclass(frozen=True, slots=True)
class Row:
    """One output tensor: its name, the part it is in, its name in each source; its position `t` in a gradient.

    `layer`: the number of its layer; `index`: counted within the part. `lead`: the model whose names count.
    """

    name: str
    part: Part
    names: tuple[str, ...]
    layer: int | None
    index: int | None
    t: float
    lead: View


@dataclass
class Findings:
    """What came up: problems, notes, the tensors that one model lacks and another has, and those that a pattern of
    `ignore` leaves out of a model."""

    problems: list[KittybuildError]
    notes: list[str] = field(default_factory=list)
    missing: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    computed: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    lacking: dict[str, View] = field(default_factory=dict)
    ignored: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def fail(self, code: str, message: str, at: object, hint: str | None = None) -> None:
        """Note a problem and go on."""
        self.problems.append(PlanError(code, message, at=str(at), hint=hint))

    def lacks(self, lacking: View, having: View, name: str) -> None:
        """Note a tensor that only one of two models has; one that is computed is no loss."""
        if name in having.tensors and is_computed(name, having.tensors[name].spec):
            self.computed.setdefault((lacking.label, having.label), []).append(name)
            return
        self.lacking[lacking.label] = lacking
        self.missing.setdefault((lacking.label, having.label), []).append(name)


def parts_of(stage: MergeStage, shown: Callable[[ModelUse], View], builders: Builders) -> tuple[Part, ...]:
    """The slices; `models` are one slice of all layers, to which mergekit appends a base that is not among them.

    With `take: base` a base that would be one model among others gives the rest, and no more.
    """
    slices = stage.slices
    if not slices:
        uses = stage.models
        builder = builders.get(stage.method, stage.numerics)
        apart = stage.take and builder and builder.method and builder.method.base == "ordinary"
        if stage.base and stage.base not in [use.model for use in uses] and not apart:
            uses = (*uses, ModelUse(stage.base, at=stage.base.at))
        slices = (Slice(uses, at=stage.at),)
    found = []
    for part in slices:
        builder = builders.get(part.method or stage.method, stage.numerics)
        assert builder is not None  # the recipe names builders of its class,
        assert builder.method is not None  # and methods only
        refs = [use.model for use in part.sources]
        base = part.base or stage.base
        anchor = refs.index(base) if base in refs else None
        on_differences = builder.method.base != "ordinary"
        seen = tuple(map(shown, part.sources))
        found.append(Part(part, builder, builder.method, seen, anchor, anchor if on_differences else None))
    return tuple(found)


def fits(stage: MergeStage, part: Part, rules: Rules, findings: Findings) -> bool:
    """Whether a part has the models that its method asks for."""
    method, base = part.method, part.slice.base or stage.base
    refs = [use.model for use in part.sources]
    given = [(use.model, use.layers) for use in part.sources]
    twice = next((use for use in given if given.count(use) > 1 or (rules.peer and refs.count(use[0]) > 1)), None)
    if twice:
        hint = "name it once, with the sum of the weights"
        if given.count(twice) == 1:
            hint = f"{stage.numerics} cannot do that: leave `numerics` out"
        findings.fail("KB308", f"{twice[0]} stands twice in one slice", part.slice.at, hint)
        return False
    if method.base == "required" and part.anchor is None:
        hint = "list the base model among the sources of the slice"
        findings.fail("KB309", f"{method.name} needs its base model {base} in every slice", part.slice.at, hint)
        return False
    count = len(refs) - (part.base is not None)
    if count < method.least or (method.most is not None and count > method.most):
        hint = "take some away, or choose another method" if count > method.least else "add one"
        if method.base == "ordinary" and base in refs and base not in [use.model for use in stage.models]:
            hint = "base_model is one of them: take it away, or one of the others"
        findings.fail("KB309", f"{method.name} takes {method.counts_text()}, here are {count}", part.slice.at, hint)
        return False
    return True


def rows_of(stage: MergeStage, parts: tuple[Part, ...], rules: Rules, findings: Findings) -> list[Row] | None:
    """The rows of all parts; None where a range of layers is none of its model's."""
    if not stage.slices:
        return list(_whole(parts[0], rules, findings, stage.tensors))
    both = [pair for part in parts for pair in zip(part.sources, part.views, strict=True)]
    ranges = [_range_fits(use, view, findings) for use, view in both]
    return list(_sliced(parts, rules, findings)) if all(ranges) else None


def _whole(part: Part, rules: Rules, findings: Findings, tensors: str) -> Iterator[Row]:
    """The base says which tensors there are, else the first model; or all of them, or what is common to all."""
    first = part.views[part.anchor or 0]
    every = {name: view for view in reversed((first, *part.views)) for name in view.tensors}
    wanted: Iterable[str] = every
    if tensors == "intersection":
        wanted = [name for name in every if all(name in view.tensors for view in part.views)]
    elif tensors == "same":
        wanted = first.tensors
        for view in part.views:
            for name in view.tensors.keys() - first.tensors.keys():
                findings.lacks(first, view, name)
    counts = stacks(wanted)
    for name in wanted:
        names, lead = (name,) * len(part.sources), every[name]
        if layer := layer_of(name):
            t = _position(layer.index, counts[layer.stack])
            yield Row(name, part, names, layer.index, layer.index, t, lead)
        else:
            yield Row(name, part, names, None, None, _outside(name, rules), lead)


def _position(index: int, count: int) -> float:
    return index / (count - 1) if count > 1 else 1.0


def _outside(name: str, rules: Rules) -> float:
    """The position in a gradient of what stands outside the layers."""
    return 0.0 if before_layers(name) else rules.tail


def _sliced(parts: tuple[Part, ...], rules: Rules, findings: Findings) -> Iterator[Row]:
    _outer_fit(parts[0], parts[-1], findings)
    total = 0
    for number, part in enumerate(parts):
        lead, tower, spans = part.views[0], part.tower, [use.layers or (0, 0) for use in part.sources]
        first, count = spans[0], spans[0][1] - spans[0][0]
        for name in lead.tensors:
            layer = tower.layer(name)
            if layer is None:
                if number == (0 if before_layers(name) else len(parts) - 1):
                    yield Row(name, part, (name,) * len(spans), None, None, _outside(name, rules), lead)
            elif first[0] <= layer.index < first[1]:
                j = layer.index - first[0]
                names = tuple(layer.at(start + j) for start, _ in spans)
                yield Row(layer.at(total + j), part, names, total + j, j, _position(j, count), lead)
        for view, span in zip(part.views[1:], spans[1:], strict=True):
            _extra(part, first, view, span, findings)
        total += count


def _outer_fit(first: Part, last: Part, findings: Findings) -> None:
    """What stands before the layers comes from the first slice and the rest from the last: neither may be lost."""
    for lacking, having in ((first, last), (last, first)):
        for name in having.views[0].tensors:
            if having.tower.layer(name) is None and name not in lacking.views[0].tensors:
                findings.lacks(lacking.views[0], having.views[0], name)


def _extra(part: Part, first: tuple[int, int], view: View, span: tuple[int, int], findings: Findings) -> None:
    """Tensors of a source's layers that the first source of the slice lacks."""
    lead = part.views[0]
    for name in view.tensors:
        layer = part.tower.layer(name)
        if layer is None or not span[0] <= layer.index < span[1]:
            continue
        wanted = layer.at(first[0] + layer.index - span[0])
        if wanted not in lead.tensors:
            findings.lacks(lead, view, wanted)


def _range_fits(use: ModelUse, view: View, findings: Findings) -> bool:
    found = sliced(view.tensors, view.config)
    if len(found) != 1:
        names = ", ".join(tower.label for tower in found) or "none"
        hint = "give each its own slices under `modules:`" if found else "merge such models whole, with `models:`"
        message = f"{use.model} has {len(found)} stacks of layers ({names}): which is sliced?"
        findings.fail("KB304", message, use.at, hint)
        return False
    (tower,) = found
    if use.layers and use.layers[1] > tower.count:
        hint = "layers count from 0, and the end is not taken"
        findings.fail("KB303", f"{use.model} has the layers [0, {tower.count}), not {list(use.layers)}", use.at, hint)
        return False
    there = {layer.index for name in view.tensors if (layer := tower.layer(name))}
    if gaps := [index for index in range(*(use.layers or (0, 0))) if index not in there]:
        hint = "its tensors tell which layers it has"
        findings.fail("KB303", f"{use.model} has no tensor of layer {gaps[0]}", use.at, hint)
        return False
    return True
