"""Bring the tensors of outputs from caches into the store: nothing is computed, and no folder is written."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kittybuild.executor.events import Events
from kittybuild.executor.substitute import substituted
from kittybuild.planner.known import Known
from kittybuild.planner.work import fetchable, layout_of, stage_work
from kittybuild.store.remote.substituters import STREAMS
from kittybuild.store.store import Store
from kittybuild.store.writer import PackWriter


@dataclass(frozen=True)
class Pulled:
    """Tensors and bytes that came, and how many tensors of the outputs are neither here nor in a cache."""

    fetched: int
    bytes: int
    lacking: int


def pull(known: Known, store: Store, events: Events) -> Pulled:
    """Fetch what the caches have of the outputs. `known`: with the offers, looked up."""
    fetched = nbytes = lacking = 0
    for name, stage in known.plan.stages.items():
        work = stage_work(known.plan, name, known)
        events.stage(name, sum(spec.nbytes for spec in work.specs(work.fetch)))
        lacking += len(work.compute) if stage.shards else 0
        for shard in work.shards:
            names = tuple(
                tensor for tensor, _ in shard.layout.tensors if fetchable(known, stage.steps[tensor], name, tensor)
            )
            while names:  # a pack is of tensors that all came: those that did not are left out, and it is begun again
                with store.write_pack(layout_of(stage, names).tensors) as writer:
                    came = _fetch(known, name, names, writer, events)
                    if came == names:
                        writer.finish()
                        fetched += len(names)
                        nbytes += sum(stage.steps[tensor].spec.nbytes for tensor in names)
                        break
                store.salvage()
                lacking += len(names) - len(came)
                names = came
    store.drop_salvaged()
    return Pulled(fetched, nbytes, lacking)


def _fetch(known: Known, stage: str, names: tuple[str, ...], writer: PackWriter, events: Events) -> tuple[str, ...]:
    """Fetch tensors side by side; those that came."""
    steps = known.plan.stages[stage].steps

    def one(name: str) -> bool:
        made = substituted(known, steps[name], stage, name, _Place(writer, name))
        if made is not None:
            writer.done(name, made.ref, made.xxh3, made.key)
            events.advance(made.ref.spec.nbytes)
        return made is not None

    with ThreadPoolExecutor(STREAMS) as threads:
        came = dict(zip(names, threads.map(one, names), strict=True))
    return tuple(name for name in names if came[name])


@dataclass(frozen=True, slots=True)
class _Place:
    writer: PackWriter
    name: str

    def write(self, offset: int, data: memoryview) -> None:
        """See Sink."""
        self.writer.write(self.name, offset, data)
