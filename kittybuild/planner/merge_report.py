"""What a person is told of a merge as a whole: tensors that do not fit, models and filters without effect.

Each kind is one error or note, however many tensors it concerns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kittybuild.errors import nearest
from kittybuild.model.recipe import MergeStage, Parameters
from kittybuild.planner.merge_params import PartParams
from kittybuild.planner.names import natural
from kittybuild.planner.parts import Findings, Part, Row
from kittybuild.planner.peers import Rules
from kittybuild.planner.same import is_tied
from kittybuild.recipe.settings import unused
from kittybuild.tensors import Shape, TensorSpec

SHOWN = 6


@dataclass
class MergeReport:
    """Collects while a merge is lowered. `shapes`: the tensors whose inputs do not fit each other."""

    stage: MergeStage
    parts: tuple[Part, ...]
    params: Mapping[int, PartParams]
    rules: Rules
    findings: Findings
    shapes: dict[str, Mapping[str, TensorSpec]] = field(default_factory=dict)
    _read: dict[int, set[int]] = field(default_factory=dict)
    _apart: dict[str, dict[str, None]] = field(default_factory=dict)

    def see(self, row: Row, specs: Sequence[TensorSpec], shape: Shape, taking: tuple[int, ...]) -> None:
        """A tensor that is merged, of these inputs."""
        part = row.part
        self._read.setdefault(id(part), set()).update(taking)
        if not self.rules.peer:
            return
        for index, spec in enumerate(specs):
            what = None
            if index not in taking:
                what = f"{self.stage.numerics} leaves {part.named(index)} out of tensors that have another shape there"
            elif spec.shape != shape:
                what = f"{self.stage.numerics} cuts the vocabulary of {part.named(index)}"
            elif self.rules.counts and not spec.dtype.is_float:
                what = f"integers are taken over, where {self.stage.numerics} would compute with them"
            if what:
                self._apart.setdefault(what, {})[row.name] = None

    def finish(self, rows: list[Row]) -> None:
        """Everything is lowered: what is to be said of it."""
        self._missing()
        for (lacking, having), computed in self.findings.computed.items():
            text = f"{lacking} lacks what {having} has and every loader computes:"
            text += listed(sorted(set(computed), key=natural))
            self.findings.notes.append(f"{self.stage.at}: {text}")
        self._unequal()
        if not self.findings.missing and not self.shapes:
            self._without_part()
        for what, names in self._apart.items():
            self.findings.notes.append(f"{self.stage.at}: {what}:{listed(list(names))}")
        self._random()
        self.findings.notes += unused_filters(self.stage, rows)

    def _missing(self) -> None:
        for (lacking, having), names in self.findings.missing.items():
            unique = sorted(set(names), key=natural)
            text = f"{lacking} lacks {counted(len(unique), 'tensor')} that {having} has:{listed(unique)}"
            near = self.findings.lacking[lacking].tensors
            hint = nearest(unique[0], near) if len(unique) == 1 and near else "are these models siblings?"
            if unique == ["lm_head.weight"] and is_tied(self.findings.lacking[lacking].config):
                hint = f"{lacking} uses its embedding as its head: make {having} the base, or write `ignore: [lm_head]`"
            elif self.stage.base and not self.stage.take and lacking != str(self.stage.base):
                hint = (
                    "are these models siblings? `take: base` takes what only the base has, `ignore: [...]` leaves out"
                )
            self.findings.fail("KB302", text, self.stage.at, hint)

    def _unequal(self) -> None:
        if not self.shapes:
            return
        shown = [f"{name}: " + ", ".join(f"{m} {s}" for m, s in specs.items()) for name, specs in self.shapes.items()]
        hint = "only tensors of one shape can be merged; where vocabularies differ, name a `tokenizer_source`"
        if all(len({spec.shape for spec in specs.values()}) == 1 for specs in self.shapes.values()):
            hint = "integers are only taken over, where they are the same in all models"
        what = counted(len(self.shapes), "tensor")
        self.findings.fail("KB301", f"the inputs of {what} do not fit each other:{listed(shown)}", self.stage.at, hint)

    def _without_part(self) -> None:
        """A model that no tensor reads is an error; one whose weight is zero everywhere is told."""
        active: set[str] = set()
        idle: dict[str, str] = {}
        for part in self.parts:
            resting = self.params[id(part)].idle()
            for index, use in enumerate(part.sources):
                model = str(use.model)
                if index not in self._read.get(id(part), ()):
                    hint = "take it out, or look at the shapes of its tensors"
                    self.findings.fail("KB312", f"{model} takes no part: no tensor is made of it", use.at, hint)
                elif index in resting:
                    idle.setdefault(model, f"{use.at}: the {resting[index]} of {model} is 0 for every tensor")
                else:
                    active.add(model)
        notes = [f"{note}: it changes nothing" for model, note in idle.items() if model not in active]
        self.findings.notes += notes

    def _random(self) -> None:
        """Where a peer draws random numbers, its bits are out of reach."""
        drawing = [part.method.name for part in self.parts if part.method.random and self.rules.peer]
        for name in dict.fromkeys(drawing):
            self.findings.notes.append(
                f"{self.stage.at}: {name} draws random numbers, which {self.stage.numerics} takes from one stream in"
                " the order of its work: its distribution is reproduced here, not its bits"
            )


def unused_filters(stage: MergeStage, rows: list[Row]) -> list[str]:
    """Notes on entries that take no tensor: most often a slip of the pen."""
    by_part: dict[int, list[Row]] = {}
    for row in rows:
        by_part.setdefault(id(row.part), []).append(row)
    groups = [(inside[0].part, inside) for inside in by_part.values()]
    notes = _unused(stage.parameters, groups)
    for part, inside in groups:
        notes += _unused(part.slice.parameters, [(part, inside)])
        for index, use in enumerate(part.sources):
            notes += _unused(use.parameters, [(part, inside)], (index,))
    return notes


def _unused(
    parameters: Parameters, groups: list[tuple[Part, list[Row]]], sources: tuple[int, ...] | None = None
) -> list[str]:
    """Of the settings of one level, which counts for these sources (None: all) of the parts."""
    notes = []
    for name, given in parameters.items():
        items = unused(given, _seen(name, groups, sources))
        notes += [f"{item.at}: {item} of {name!r} takes no tensor" for item in items]
    return notes


def _seen(
    parameter: str, groups: list[tuple[Part, list[Row]]], sources: tuple[int, ...] | None
) -> Iterator[tuple[str, int | None]]:
    """The names, with their layers, that filters of a parameter see."""
    for part, rows in groups:
        param = part.method.param(parameter)
        if param is None:
            continue
        if param.scope == "shared":
            yield from ((row.name, row.layer) for row in rows)
            continue
        for index in part.everything if sources is None else sources:
            start = part.starts[index]
            yield from ((row.names[index], None if row.index is None else start + row.index) for row in rows)


def counted(number: int, noun: str) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: list[str]) -> str:
    """The first of them, each on its own line."""
    more = f"\n  and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return "".join(f"\n  {name}" for name in names[:SHOWN]) + more
