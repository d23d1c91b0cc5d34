"""Sources whose contents are unknown: their files were touched, moved or copied here, so that no memo knows them.

Digesting them before anything is made costs one more reading; it pays where the store knows what is made of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from kittybuild.model.derivation import Derivation, SourceTensor, Step
from kittybuild.model.plan import inputs_of
from kittybuild.planner.known import Known
from kittybuild.planner.work import has_bytes

PROBES = 8
PROBES_PER_HIT = 4
LEAST_SHARE = 50

Waiting = Mapping[str, tuple[SourceTensor, ...]]


def unresolved(steps: Mapping[str, Step], known: Known) -> Waiting:
    """The tensors of a stage that wait for nothing but contents of sources, each with these sources."""
    found = {}
    for name, step in steps.items():
        missing = [given for given in inputs_of(step) if known.ref(given) is None]
        sources = tuple(given for given in missing if isinstance(given, SourceTensor))
        if missing and len(sources) == len(missing):
            found[name] = sources
    return found


def probes(waiting: Waiting) -> tuple[str, ...]:
    """A few of the smaller ones, spread over the sizes: at most a fiftieth of all bytes, but one at least."""
    sizes = {name: sum(given.spec.nbytes for given in sources) for name, sources in waiting.items()}
    smaller = sorted(sizes, key=lambda name: sizes[name])[: (len(sizes) + 1) // 2]
    left = sum(sizes.values()) // LEAST_SHARE
    chosen: list[str] = []
    for name in smaller[:: max(1, len(smaller) // PROBES)][:PROBES]:
        left -= sizes[name]
        if left >= 0 or not chosen:
            chosen.append(name)
    return tuple(chosen)


def recalled(known: Known, step: Step, stage: str, name: str) -> bool:
    """Whether a tensor need not be made: what it is realised to is known, or it is taken over and there."""
    if isinstance(step, Derivation):
        return known.ref(step, stage, name) is not None
    return has_bytes(known, step, stage, name)
