"""What made each tensor of a finished build, as kittybuild.json tells it: builder, class, key, inputs by content."""

from __future__ import annotations

from kittybuild.digest import Json
from kittybuild.model.derivation import Derivation, Input, SourceTensor
from kittybuild.planner.known import Known


def lineage(known: Known) -> dict[str, Json]:
    """By stage and tensor: `[builder, version, numerics, key, inputs]`, each input `[of, name, digest]`.

    Tensors that are taken over, and those of which nothing was needed, are left out.
    """
    found: dict[str, Json] = {}
    for stage, plan in known.plan.stages.items():
        made: dict[str, Json] = {}
        for name, drv in plan.derivations.items():
            if (key := known.key(drv)) and known.ref(drv, stage, name):
                made[name] = [drv.builder, drv.version, drv.numerics, key.hex, _inputs(drv, known)]
        if made:
            found[stage] = made
    return found


def _inputs(drv: Derivation, known: Known) -> list[Json]:
    return [[_of(given), given.name, ref.digest.hex] for given in drv.inputs if (ref := known.ref(given))]


def _of(given: Input) -> str:
    return given.source if isinstance(given, SourceTensor) else given.stage
