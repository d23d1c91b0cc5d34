"""Why tensors of a plan are not what the last build made: the direct causes of each, and what comes from others.

The last build is known by what it told (`model.made`), and by its recipe, lowered today: where the two plans differ
the recipe was changed, where the old plan differs from what was told, the world was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from kittybuild.digest import Digest
from kittybuild.model.derivation import Derivation, Input, SourceTensor, StageTensor, Step
from kittybuild.model.made import Apart, Derivations, Made, apart
from kittybuild.model.manifest import Manifest, ManifestTensor
from kittybuild.model.plan import inputs_of
from kittybuild.model.recipe import ApplyLoraStage, Recipe
from kittybuild.planner.explain import weights
from kittybuild.planner.known import Known
from kittybuild.planner.lineage import told
from kittybuild.planner.merge_params import Origin
from kittybuild.recipe.changes import TextChange
from kittybuild.tensors import TensorRef

RECIPE, SOURCE, VERSION, MACHINE, FILES, STORE = "recipe", "source", "version", "machine", "files", "store"
Node = tuple[str, str]
"""A tensor of the plan: its stage, and its name."""
Origins = Mapping[str, Callable[[str], tuple[Origin, ...]]]


@dataclass(frozen=True, slots=True)
class Cause:
    """Something that is not as it was. `kind`: of RECIPE to STORE; `at`: where it stands in the recipe, if it does.

    `was` and `now` are None where there is nothing to name, as for bytes.
    """

    kind: str
    what: str
    was: str | None = None
    now: str | None = None
    at: str | None = None


@dataclass(frozen=True)
class Lowered:
    """A recipe, its plan with what is known of it, and where parameters stand in it."""

    recipe: Recipe
    known: Known
    origins: Origins

    def step(self, node: Node) -> Step | None:
        """The step behind a tensor, if it is in the plan."""
        stage = self.known.plan.stages.get(node[0])
        return stage.steps.get(node[1]) if stage else None

    def params(self, node: Node) -> tuple[Origin, ...]:
        """The parameters of a tensor, where it is known in which lines they stand."""
        declared, step = self.recipe.stages.get(node[0]), self.step(node)
        if isinstance(declared, ApplyLoraStage) and isinstance(step, Derivation):
            return weights(declared, step)
        return self.origins[node[0]](node[1]) if node[0] in self.origins else ()


@dataclass(frozen=True)
class Before:
    """The last build of an output: the stage that it was, what it made and how. `then`: its recipe, lowered today, None
    where that cannot be done; `texts`: what the text of the recipe says otherwise now."""

    stage: str
    manifest: Manifest
    made: Derivations
    then: Lowered | None = None
    texts: tuple[TextChange, ...] = ()

    @cached_property
    def tensors(self) -> dict[str, ManifestTensor]:
        """What it made, by name."""
        return {tensor.name: tensor for tensor in self.manifest.tensors}


@dataclass(frozen=True)
class Changed:
    """One tensor now. `causes`: its own; `through`: tensors of other stages that changed and that it is made of."""

    was: str | None
    key: str | None
    causes: tuple[Cause, ...] = ()
    through: tuple[Node, ...] = field(default=())

    @property
    def same(self) -> bool:
        """Whether it is what it was."""
        return not (self.causes or self.through)


class Causes:
    """The causes behind the tensors of one output, found as they are asked for."""

    def __init__(self, now: Lowered, output: str, before: Before) -> None:
        self.now, self.output, self.before = now, output, before
        self._found: dict[Node, Changed] = {}
        self._roots: dict[Node, tuple[Cause, ...]] = {}

    def of(self, node: Node) -> Changed:
        """What is otherwise with one tensor."""
        if node not in self._found:
            step = self.now.step(node)
            assert step is not None  # it is in the plan
            self._found[node] = self._made(node, step) if isinstance(step, Derivation) else self._taken(node, step)
        return self._found[node]

    def roots(self, node: Node) -> tuple[Cause, ...]:
        """All causes behind a tensor, its own first."""
        if node not in self._roots:
            found = self.of(node)
            behind = (cause for given in found.through for cause in self.roots(given))
            self._roots[node] = tuple(dict.fromkeys((*found.causes, *behind)))
        return self._roots[node]

    def _then(self, node: Node) -> Node:
        """What a tensor was called: the stage of an output may have another name now."""
        return (self.before.stage, node[1]) if node[0] == self.output else node

    def _content(self, given: Input, recorded: str | None) -> TensorRef | None:
        """The content of an input: known here, or what the last build told of what is the same."""
        ref = self.now.known.ref(given)
        if ref is None and isinstance(given, StageTensor) and recorded and self.of((given.stage, given.name)).same:
            return TensorRef(Digest(recorded), given.spec)
        return ref

    def _made(self, node: Node, drv: Derivation) -> Changed:
        stage, name = self._then(node)
        before = self.before.made.get(stage, {}).get(name)
        recorded = {given[:2]: given[2] for given in before.inputs} if before else {}
        refs = [self._content(given, recorded.get(_named(given))) for given in drv.inputs]
        key = drv.key(refs) if all(refs) else None  # type: ignore[arg-type]
        made = told(drv, key, refs)
        if before is None:
            kept = self.before.tensors.get(name) if node[0] == self.output else None
            what = f"{node[0]} takes it over no more: it is made" if kept else f"{node[0]} makes it now"
            return Changed(None, made.key, tuple(self._recipe(node, drv)) or (Cause(RECIPE, what),))
        difference = apart(before, made)
        if difference is None:
            return Changed(before.key, made.key)
        through = tuple(
            dict.fromkeys(
                (given.stage, given.name)
                for given in drv.inputs
                if isinstance(given, StageTensor) and _named(given) in difference.contents
            )
        )
        changed = tuple(given for given in through if not self.of(given).same)
        causes = [*self._recipe(node, drv), *self._world(drv, before, made, difference)]
        if not causes and not changed:
            causes = list(self._rest(node, drv, before, made, difference))
        return Changed(before.key, made.key, tuple(dict.fromkeys(causes)), changed)

    def _taken(self, node: Node, step: Input) -> Changed:
        """A tensor that is taken over as it is."""
        before, then = self.before.tensors.get(node[1]), self.before.then
        as_then = then is None or then.step(self._then(node)) == step
        ref = self._content(step, before.ref.digest.hex if before and as_then else None)
        if before and ref == before.ref:
            return Changed(None, None)
        causes = list(self._recipe(node, step))
        if isinstance(step, SourceTensor) and not causes and before:
            causes = [self._source(step)]
        elif not causes and isinstance(step, StageTensor):
            return Changed(None, None, (), ((step.stage, step.name),))
        return Changed(None, None, tuple(causes) or (Cause(RECIPE, f"{node[0]} has it now"),))

    def _recipe(self, node: Node, step: Step) -> Iterator[Cause]:
        """What the recipe says otherwise about a tensor."""
        then = self.before.then
        if then is None:
            return
        stage, name = self._then(node)
        old = then.step((stage, name))
        if old == step:
            return
        alike = old is not None and _alike(old, step)
        params = list(_params(then.params((stage, name)), self.now.params(node), more=alike))
        yield from params
        if params and alike:
            return
        declared = list(self._texts(node[0]))
        others = [cause for cause, of_parameters in declared if not of_parameters]
        yield from others or (() if params else (cause for cause, _ in declared))

    def _texts(self, stage: str) -> Iterator[tuple[Cause, bool]]:
        """What the text says otherwise in the declaration of a stage; else at the top, which is for all of them. With
        each, whether it is about parameters."""
        declared = stage if stage in self.now.recipe.stages else stage.partition("/")[0]
        texts = self.before.texts
        found = [each for each in texts if each.stage == declared or (each.stage is None and not each.top)]
        for each in found or [each for each in texts if each.top in ("defaults", "numerics", "dialect")]:
            what = f"{stage}: {each.path}" if each.stage else each.path
            yield Cause(RECIPE, what, each.was, each.now, str(each.at)), each.of_parameters

    def _world(self, drv: Derivation, before: Made, made: Made, difference: Apart) -> Iterator[Cause]:
        """What is otherwise whatever the recipe says: sources, versions, the machine."""
        for what, was, now in difference.fields:
            if what.startswith("version of "):
                yield Cause(VERSION, what, was, now)
            elif what == "numerics" and before.numerics.partition(";")[0] == made.numerics.partition(";")[0]:
                yield Cause(MACHINE, "the machine", before.numerics.partition(";")[2], made.numerics.partition(";")[2])
        for given in drv.inputs:
            if isinstance(given, SourceTensor) and _named(given) in difference.contents:
                yield self._source(given)

    def _source(self, given: SourceTensor) -> Cause:
        sources = self.now.known.sources
        file = os.path.basename(sources.checkpoints[given.source].entry(given.name).file)
        known = self.now.known.ref(given) is not None
        unread = "is not known here: it was written to, or is new to this store"
        says = f"{file} holds other tensors" if known else f"what {file} holds {unread}"
        return Cause(SOURCE, f"the source {given.source}: {says}", at=self._declared(given.source))

    def _declared(self, source: str) -> str | None:
        declared = self.now.recipe.sources.get(source)
        return str(declared.at) if declared else None

    def _rest(self, node: Node, drv: Derivation, before: Made, made: Made, difference: Apart) -> Iterator[Cause]:
        """What is left where the old recipe cannot be lowered, or says the same."""
        if self.before.then is None:
            yield from (cause for cause, _ in self._texts(node[0]))
            for what, was, now in difference.fields:
                yield Cause(RECIPE, f"{node[0]}: {what}", was, now)
            if not self.before.texts and not difference.fields:
                yield Cause(RECIPE, f"{node[0]}: parameters, or files that they come from")
        elif difference.fields:  # words of the command that no text holds
            for what, was, now in difference.fields:
                yield Cause(RECIPE, f"{node[0]}: {what}", was, now)
        else:
            named = dict.fromkeys(given.source for given in self.now.known.sources_of(drv))
            yield Cause(FILES, f"tokenizer or config of {', '.join(named)}")


def _named(given: Input) -> Node:
    return (given.source if isinstance(given, SourceTensor) else given.stage), given.name


def _alike(one: Step, two: Step) -> bool:
    """Whether two steps differ in parameters at most."""
    if isinstance(one, Derivation) and isinstance(two, Derivation):
        forms = [(drv.builder, drv.inputs, drv.output, drv.numerics) for drv in (one, two)]
        return forms[0] == forms[1]
    return one == two


def _params(then: Sequence[Origin], now: Sequence[Origin], *, more: bool) -> Iterator[Cause]:
    """Parameters that have another value; `more`: and those that were not there. A model that is named twice counts by
    its turn."""
    was = dict(_by_turn(then))
    for key, origin in _by_turn(now):
        old = was.pop(key, None)
        if old and old.at is None and origin.at is None:  # another default comes with another method
            continue
        if old.value != origin.value if old else more:
            what = f"{origin.name} of {origin.model}" if origin.model else origin.name
            said = _text(origin.value) if origin.at else f"{_text(origin.value)} (the default)"
            yield Cause(RECIPE, what, _text(old.value) if old else None, said, str(origin.at) if origin.at else None)


def _by_turn(origins: Sequence[Origin]) -> Iterator[tuple[tuple[str, str | None, int], Origin]]:
    turns: dict[tuple[str, str | None], int] = {}
    for origin in origins:
        name = origin.name, origin.model
        turns[name] = turns.get(name, 0) + 1
        yield (*name, turns[name]), origin


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else "none" if value is None else str(value)


def reached(now: Known, output: str) -> tuple[Node, ...]:
    """The tensors of an output and all that they are made of, in the order of the plan."""
    found: set[Node] = {(output, name) for name in now.plan.stages[output].steps}
    todo = list(found)
    while todo:
        stage, name = todo.pop()
        for given in inputs_of(now.plan.stages[stage].steps[name]):
            if isinstance(given, StageTensor) and (given.stage, given.name) not in found:
                found.add((given.stage, given.name))
                todo.append((given.stage, given.name))
    return tuple(
        (name, tensor) for name, stage in now.plan.stages.items() for tensor in stage.steps if (name, tensor) in found
    )
