"""The models of a merge as it sees them: renamed, without what is ignored, in the layout of the one that leads.

Nothing is lost here in silence: what is left out or stands in for something else is a note.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from kittybuild.builders.base import Builders
from kittybuild.model.derivation import Derivation, Input
from kittybuild.model.plan import Ignored
from kittybuild.model.recipe import At, MergeStage, ModelUse
from kittybuild.planner.experts import Layout, layout_like
from kittybuild.planner.merge_report import counted, listed
from kittybuild.planner.names import natural
from kittybuild.planner.parts import Findings, Views
from kittybuild.planner.same import is_tied, same_weight, says_tied
from kittybuild.planner.views import View
from kittybuild.recipe.settings import taker

Derive = Callable[[str, View, Mapping[str, Derivation]], Mapping[str, Input]]
"""Makes a stage of its own, of a label, from a model and derivations over it: its tensors as inputs."""


class Fitting:
    """The models of one merge. `reference`: the one whose names and layout count: the base, else the first.

    `only`: the names that a module has.
    """

    def __init__(
        self,
        stage: MergeStage,
        views: Views,
        builders: Builders,
        findings: Findings,
        derive: Derive | None,
        only: Callable[[str], bool] | None = None,
    ) -> None:
        self.stage, self.views, self.builders = stage, views, builders
        self.findings, self.derive, self.only = findings, derive, only
        self._ignored = [(item, taker(item)) for item in stage.ignore]
        self._used: set[int] = set()
        self._seen: dict[tuple[str, str, str], View] = {}
        uses = stage.uses()
        own = next((use for use in uses if use.model == stage.base), None)
        first = own or (ModelUse(stage.base, at=stage.base.at) if stage.base else uses[0])
        self.reference = self._renamed(first)
        self._seen[_key(first)] = self.reference

    def of(self, use: ModelUse) -> View:
        """A model as the merge sees it."""
        if _key(use) not in self._seen:
            self._seen[_key(use)] = self._fitted(self._renamed(use))
        return self._seen[_key(use)]

    def finish(self) -> None:
        """Note the patterns of `ignore` that take no tensor."""
        for index, (item, _) in enumerate(self._ignored):
            if index not in self._used:
                self.findings.notes.append(f"{item.at}: {item} of 'ignore' takes no tensor")

    def _renamed(self, use: ModelUse) -> View:
        """The model under the names of the output, without the tensors that are ignored."""
        view = self.views(use.model)
        tensors: dict[str, Input] = {}
        for name, given in view.tensors.items():
            new = use.add + name.removeprefix(use.strip) if name.startswith(use.strip) else name
            if new in tensors:
                hint = "take names that no other tensor of the model has"
                self.findings.fail("KB313", f"two tensors of {view.label} would be called {new}", use.at, hint)
            tensors[new] = given
        if use.strip and tensors.keys() == view.tensors.keys():
            self.findings.notes.append(f"{use.at}: no tensor of {view.label} begins with {use.strip!r}")
        if self.only:
            tensors = {name: given for name, given in tensors.items() if self.only(name)}
        return replace(view, tensors=self._kept(view.label, tensors))

    def _kept(self, label: str, tensors: dict[str, Input]) -> dict[str, Input]:
        for index, (item, takes) in enumerate(self._ignored):
            taken = {name for name in tensors if takes(name, None)}
            if taken:
                self._used.add(index)
                self.findings.ignored.setdefault(item.filter or "*", {})[label] = sorted(taken, key=natural)
            tensors = {name: given for name, given in tensors.items() if name not in taken}
        return tensors

    def _fitted(self, view: View) -> View:
        """The model in the layout of the reference; in raw state dicts, a name is a name."""
        if self.stage.kind == "state_dict":
            return view
        found = layout_like(view, self.reference, self.builders)
        if found:
            view = self._laid_out(view, found)
        tensors = dict(view.tensors)
        for name, given in self.reference.tensors.items():
            if name not in tensors and is_tied(view.config):
                other = same_weight(name, given.spec, tensors)
                if other is not None and (other in self.reference.tensors or name.endswith("bias")):
                    tensors[name] = view.tensors[other]
                    self._note(f"{view.label} has {name} as {other}, which stands in for it")
        for name, given in view.tensors.items():
            if name not in self.reference.tensors and says_tied(view.config) and self._is_copy(name, given):
                del tensors[name]
                self._note(f"{name} of {view.label} is left out: its config.json says that its embedding is its head")
        return replace(view, tensors=tensors)

    def _is_copy(self, name: str, given: Input) -> bool:
        """Whether a tensor is a weight that the reference, which is tied too, keeps under another name."""
        return is_tied(self.reference.config) and same_weight(name, given.spec, self.reference.tensors) is not None

    def _laid_out(self, view: View, found: Layout) -> View:
        kept = {name: given for name, given in view.tensors.items() if name not in found.used}
        made = self.derive(f"{view.label} in the layout of {self.reference.label}", view, found.joins) \
            if found.joins and self.derive else {}  # fmt: skip
        self._note(f"the experts of {view.label} are taken in the layout of {self.reference.label}")
        return replace(view, tensors={**kept, **found.views, **made})

    def _note(self, text: str) -> None:
        note = f"{self.stage.at}: {text}"
        if note not in self.findings.notes:
            self.findings.notes.append(note)


def ignored_notes(at: At, ignored: Ignored) -> list[str]:
    """What is said of the tensors that a stage's `ignore` leaves out, model by model."""
    gone: dict[str, set[str]] = {}
    for models in ignored.values():
        for label, names in models.items():
            gone.setdefault(label, set()).update(names)
    return [
        f"{at}: 'ignore' leaves out {counted(len(names), 'tensor')} of {label}:{listed(sorted(names, key=natural))}"
        for label, names in gone.items()
    ]


def _key(use: ModelUse) -> tuple[str, str, str]:
    return str(use.model), use.strip, use.add
