"""What a build would do and take, from a plan and the store: tensors, shards, bytes, memory, disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from kittybuild.builders.base import Builders
from kittybuild.model.derivation import Derivation, StageTensor, Step
from kittybuild.model.plan import inputs_of
from kittybuild.planner.fetching import downloads
from kittybuild.planner.files import companion_names
from kittybuild.planner.known import Known
from kittybuild.planner.work import StageWork, stage_work

RUNTIME = 256_000_000
BLOCKS = 24_000_000


@dataclass(frozen=True)
class StageEstimate:
    """One stage: numbers of tensors and shards, bytes read, written and fetched from caches, companion files."""

    kind: str
    tensors: int
    computed: int
    copied: int
    there: int
    fetched: int
    shards: int
    linked: int
    read: int
    written: int
    fetched_bytes: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class Estimate:
    """A whole build. Where contents are unknown it assumes the most: that all that hangs on them is computed.

    `download`: bytes that come over the network, from the Hub and caches. `quantized`: how many tensors of a source are
    stored in each quantized type.
    """

    stages: Mapping[str, StageEstimate]
    peak_memory: int
    notes: tuple[str, ...]
    download: int = 0
    quantized: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As `plan --json` prints it."""
        stages = {name: asdict(stage) for name, stage in self.stages.items()}
        rest = {"peak_memory": self.peak_memory, "download": self.download, "notes": list(self.notes)}
        return {"stages": stages, **rest, "quantized": {name: dict(types) for name, types in self.quantized.items()}}


def estimate(known: Known, builders: Builders, *, memory: int, jobs: int) -> Estimate:
    """What building the plan behind `known` would take with that budget (bytes) and number of workers."""
    works = [stage_work(known.plan, name, known) for name in known.plan.stages]
    stages = {work.stage.name: _stage(work, known) for work in works}
    computes = any(stage.computed or stage.copied or stage.fetched for stage in stages.values())
    peak = min(memory, RUNTIME + jobs * BLOCKS + _largest_whole(known, works, builders)) if computes else 60_000_000
    missing = sum(each.missing for each in downloads(known)) + sum(stage.fetched_bytes for stage in stages.values())
    quantized = {name: found for name, one in known.sources.checkpoints.items() if (found := one.quantized)}
    return Estimate(stages, peak, known.plan.notes, missing, quantized)


def _stage(work: StageWork, known: Known) -> StageEstimate:
    stage = work.stage
    read = {given: given.spec.nbytes for name in work.compute for given in inputs_of(stage.steps[name])}
    copied, fetched = (sum(spec.nbytes for spec in work.specs(names)) for names in (work.copy, work.fetch))
    if stage.shards:
        written = sum(shard.layout.size for shard in work.shards if not shard.present)
    else:
        written = sum(spec.nbytes for spec in work.specs((*work.compute, *work.fetch)))
    return StageEstimate(
        kind=stage.kind,
        tensors=len(stage.steps),
        computed=len(work.compute),
        copied=len(work.copy),
        there=len(work.there),
        fetched=len(work.fetch),
        shards=len(work.shards),
        linked=sum(shard.present for shard in work.shards),
        read=sum(read.values()) + copied,
        written=written,
        fetched_bytes=fetched,
        files=companion_names(stage, known.sources) if stage.shards else (),
    )


def _largest_whole(known: Known, works: list[StageWork], builders: Builders) -> int:
    """The most bytes that one derivation holds beside its blocks."""
    return max((_held(known, work.stage.steps[name], builders) for work in works for name in work.compute), default=0)


def _held(known: Known, step: Step, builders: Builders, result: int = 0) -> int:
    """The most bytes that making a tensor holds: inputs taken whole, and inputs made in memory one after the other."""
    if not isinstance(step, Derivation):
        return 0
    builder = builders.behind(step)
    whole = () if builder.streamed is None else step.inputs[builder.streamed :]
    made = most = 0
    for given in step.inputs:
        if isinstance(given, StageTensor) and not known.plan.stages[given.stage].keep:
            most = max(most, made + _held(known, known.plan.step(given), builders, given.spec.nbytes))
            made += given.spec.nbytes
    return max(most, made + result + sum(given.spec.nbytes + builder.whole * given.spec.numel for given in whole))
