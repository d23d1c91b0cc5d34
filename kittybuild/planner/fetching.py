"""Which bytes of sources a plan needs that may be elsewhere: whole files where most of one is needed, else ranges."""

from __future__ import annotations

import os
from dataclasses import dataclass

from kittybuild.checkpoint.sources.cached import GAP, Cached
from kittybuild.checkpoint.sources.hub import ranges_of
from kittybuild.checkpoint.sources.ranges import Range, joined, size_of
from kittybuild.model.derivation import SourceTensor, StageTensor, Step
from kittybuild.model.plan import inputs_of
from kittybuild.planner.known import Known
from kittybuild.planner.work import fetchable, stage_work

WHOLE_FROM = 0.5


@dataclass(frozen=True)
class Download:
    """Bytes of one file of a repository; `whole`: all of it, verified. `missing`: how many come over the network."""

    cached: Cached
    name: str
    ranges: tuple[Range, ...]
    whole: bool
    missing: int


def needed_sources(known: Known) -> tuple[SourceTensor, ...]:
    """The source tensors that a build would read, with what is known now."""
    found: dict[SourceTensor, None] = {}
    seen: set[StageTensor] = set()

    def reach(step: Step) -> None:
        for given in inputs_of(step):
            if isinstance(given, SourceTensor):
                found[given] = None
            elif given not in seen:
                seen.add(given)
                ref = known.ref(given)
                lacking = ref is None or known.location(ref.digest) is None
                if lacking and not fetchable(known, given, given.stage, given.name):
                    reach(known.plan.step(given))

    for name, stage in known.plan.stages.items():
        for tensor in stage_work(known.plan, name, known).compute:
            reach(stage.steps[tensor])
        for step in stage.steps.values():  # what a manifest lists must have a digest
            if isinstance(step, SourceTensor) and known.ref(step) is None:
                found[step] = None
    return tuple(found)


def downloads(known: Known) -> tuple[Download, ...]:
    """What must be brought here, or verified, before the plan can run; in the order of the recipe."""
    if not known.sources.remote:
        return ()
    tensors: dict[str, list[SourceTensor]] = {}
    for tensor in needed_sources(known):
        tensors.setdefault(tensor.source, []).append(tensor)
    found = []
    for source, cached in known.sources.remote.items():
        entries = [known.entry(tensor) for tensor in tensors.get(source, ())]
        for path, ranges in ranges_of(entries).items():
            name = os.path.relpath(path, cached.view).replace(os.sep, "/")
            found.append(_download(cached, name, joined(ranges, GAP)))
    return tuple(found)


def _download(cached: Cached, name: str, ranges: tuple[Range, ...]) -> Download:
    size = cached.files[name].size
    whole = size_of(ranges) >= WHOLE_FROM * size or cached.missing(name, ((0, size),)) == 0
    wanted = ((0, size),) if whole else ranges
    return Download(cached, name, wanted, whole, cached.missing(name, wanted))
