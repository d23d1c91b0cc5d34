"""What changed since the last build of an output, cause by cause, and what a build would do about each. A value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kittybuild.digest import Json
from kittybuild.errors import UsageError, nearest
from kittybuild.model.manifest import Manifest
from kittybuild.planner.causes import STORE, Before, Cause, Causes, Lowered, Node, reached
from kittybuild.planner.work import stage_work

COMPUTED, FETCHED, CACHED = "computed", "fetched", "cached"
_KINDS = (COMPUTED, FETCHED, CACHED)
_SHOWN = 3
_LOST = Cause(STORE, "the store does not hold all that the last build made")


@dataclass(frozen=True)
class Group:
    """One cause, with all the tensors that it concerns, each with what a build does: computed, fetched or cached.

    `changes`: every (was, now) among them, in their order.
    """

    cause: Cause
    changes: tuple[tuple[str | None, str | None], ...]
    tensors: Mapping[Node, str]

    def count(self, what: str) -> int:
        """How many of its tensors are computed, fetched or cached."""
        return sum(done == what for done in self.tensors.values())

    def to_json(self) -> dict[str, Json]:
        """As `why --json` prints it."""
        was, now = _span([was for was, _ in self.changes]), _span([now for _, now in self.changes])
        counts: dict[str, Json] = {what: self.count(what) for what in _KINDS}
        names = [[stage, name, done] for (stage, name), done in self.tensors.items()]
        form: dict[str, Json] = {"kind": self.cause.kind, "what": self.cause.what, "was": was, "now": now}
        return {**form, "at": self.cause.at, "tensors": len(self.tensors), **counts, "names": names}

    def __str__(self) -> str:
        return sentence(self.cause, *(_span(values) for values in zip(*self.changes, strict=True)))


def sentence(cause: Cause, was: str | None, now: str | None) -> str:
    """A cause for a person."""
    where = f"{cause.at}: " if cause.at else ""
    if was is None and now is None:
        return f"{where}{cause.what}"
    if was is None:
        return f"{where}{cause.what} is {now}, and was not there"
    return (
        f"{where}{cause.what} was {was}, now {now}"
        if now is not None
        else f"{where}{cause.what} was {was}, and is gone"
    )


def _span(values: Iterable[str | None]) -> str | None:
    """Several values as one text: from the least to the largest, where they are numbers."""
    found = list(dict.fromkeys(value for value in values if value is not None))
    if len(found) > 1 and all(_is_number(value) for value in found):
        return f"{min(found, key=float)} to {max(found, key=float)}"
    return ", ".join(found[:_SHOWN]) + (" and others" if len(found) > _SHOWN else "") if found else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Link:
    """One tensor in a chain of causes. `key`: None where it is not known yet; `was`: that of the last build."""

    stage: str
    tensor: str
    done: str
    was: str | None
    key: str | None
    causes: tuple[Cause, ...]
    made_of: tuple[Link, ...]

    def to_json(self) -> dict[str, Any]:
        """As `why --tensor --json` prints it."""
        causes = [{"kind": c.kind, "what": c.what, "was": c.was, "now": c.now, "at": c.at} for c in self.causes]
        form = {"stage": self.stage, "tensor": self.tensor, "done": self.done, "was": self.was, "key": self.key}
        return {**form, "causes": causes, "from": [link.to_json() for link in self.made_of]}

    def lines(self, indent: str = "") -> list[str]:
        """As `why --tensor` prints it."""
        same = not self.causes and not self.made_of
        found = [f"{indent}{self.stage}: {self.tensor}: {self.done}{', as it was' if same else ''}"]
        found += [f"{indent}  {sentence(cause, cause.was, cause.now)}" for cause in self.causes]
        return found + [line for link in self.made_of for line in link.lines(f"{indent}  ")]


@dataclass(frozen=True)
class Why:
    """What changed for one output. `last`: where its last build is told of, None where there was none.

    `gone`: tensors that it had and has no more. `files`: companion files that are others, more or gone. `shards`: how
    many are to be written, and linked.
    """

    output: str
    folder: str | None
    last: str | None
    groups: tuple[Group, ...]
    done: Mapping[str, int]
    gone: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    shards: tuple[int, int] = (0, 0)
    chain: tuple[Link, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether a build would make another output, or has anything to compute."""
        return bool(self.last is None or self.groups or self.gone or self.files or self.shards[0])

    def to_json(self) -> dict[str, Any]:
        """As `why --json` prints it."""
        form = {"folder": self.folder, "last": self.last, "changed": self.changed, **self.done}
        more = {"gone": list(self.gone), "files": list(self.files)}
        shards = {"shards_to_write": self.shards[0], "shards_to_link": self.shards[1]}
        return {**form, **shards, "causes": [group.to_json() for group in self.groups], **more}


def work_of(now: Lowered, nodes: Sequence[Node]) -> dict[Node, str]:
    """What a build does for tensors; those of stages that nothing keeps come with what is made of them."""
    found = {}
    for name in dict.fromkeys(stage for stage, _ in nodes):
        if now.known.plan.stages[name].keep:
            work = stage_work(now.known.plan, name, now.known)
            done = dict.fromkeys(work.compute, COMPUTED) | dict.fromkeys(work.fetch, FETCHED)
            found[name] = done
    return {(stage, name): found[stage].get(name, CACHED) for stage, name in nodes if stage in found}


def explained(
    now: Lowered,
    output: str,
    folder: str | None,
    before: Before | None,
    last: str | None,
    *,
    files: Sequence[str] = (),
    tensor: str | None = None,
) -> Why:
    """What changed for one output. `last`: where the last build is told of; `files`: companions that are others;
    `tensor`: the one whose chain of causes is asked for. Raises UsageError KB005 if there is none of that name.
    """
    nodes = reached(now.known, output)
    if tensor is not None and all(name != tensor for _, name in nodes):
        hint = nearest(tensor, {name for _, name in nodes})
        raise UsageError("KB005", f"no stage makes a tensor {tensor!r}", at=now.recipe.file, hint=hint)
    work = work_of(now, nodes)
    counts = Counter(work.values())
    done = {"tensors": len(work), **{what: counts[what] for what in _KINDS}}
    shards = stage_work(now.known.plan, output, now.known).shards
    cut = sum(not shard.present for shard in shards), sum(shard.present for shard in shards)
    if before is None:
        return Why(output, folder, None, (), done, shards=cut)
    causes = Causes(now, output, before)
    grouped = _grouped(causes, nodes, work)
    gone = tuple(name for name in before.tensors if name not in now.known.plan.stages[output].steps)
    asked = [node for node in nodes if node[1] == tensor]
    told = [node for node in asked if not causes.of(node).same] or asked
    over = (node for node in told if not any(_behind(causes, other, node) for other in told))
    chain = tuple(_link(causes, node, work) for node in over)
    return Why(output, folder, last, grouped, done, gone, tuple(files), cut, chain)


def _grouped(causes: Causes, nodes: Sequence[Node], work: Mapping[Node, str]) -> tuple[Group, ...]:
    """The causes, each with its tensors, in the order of the plan."""
    tensors: dict[Cause, dict[Node, str]] = {}
    changes: dict[Cause, dict[tuple[str | None, str | None], None]] = {}
    for node in nodes:
        lost = (_LOST,) if work.get(node) in (COMPUTED, FETCHED) else ()
        for cause in causes.roots(node) or lost:
            named = Cause(cause.kind, cause.what, at=cause.at)
            changes.setdefault(named, {})[cause.was, cause.now] = None
            of = tensors.setdefault(named, {})
            if node in work:
                of[node] = work[node]
    return tuple(Group(cause, tuple(changes[cause]), tensors[cause]) for cause in tensors)


def _behind(causes: Causes, over: Node, node: Node) -> bool:
    """Whether a tensor is told of in the chain of another one already."""
    through = causes.of(over).through
    return node in through or any(_behind(causes, given, node) for given in through)


def _link(causes: Causes, node: Node, work: Mapping[Node, str]) -> Link:
    found = causes.of(node)
    done = work.get(node, "made in memory")
    own = (_LOST,) if found.same and done in (COMPUTED, FETCHED) else found.causes
    made_of = tuple(_link(causes, given, work) for given in found.through)
    return Link(node[0], node[1], done, found.was, found.key, own, made_of)


def nothing(output: str, folder: str | None, last: str, manifest: Manifest) -> Why:
    """An output that is as the last build made it."""
    count = len(manifest.tensors)
    done = {"tensors": count, COMPUTED: 0, FETCHED: 0, CACHED: count}
    return Why(output, folder, last, (), done, shards=(0, len(manifest.shards)))
