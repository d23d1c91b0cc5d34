"""What made each tensor of a finished build, as kittybuild.json tells it: builder, class, key, inputs by content."""

from __future__ import annotations

from collections.abc import Sequence

from kittybuild.digest import Digest, Json
from kittybuild.model.derivation import Derivation, SourceTensor
from kittybuild.model.made import Made
from kittybuild.planner.known import Known
from kittybuild.tensors import TensorRef


def lineage(known: Known) -> dict[str, Json]:
    """By stage and tensor, as `Made` writes it.

    Tensors that are taken over, and those of which nothing was needed, are left out.
    """
    found: dict[str, Json] = {}
    for stage, plan in known.plan.stages.items():
        made: dict[str, Json] = {}
        for name, drv in plan.derivations.items():
            if (key := known.key(drv)) and known.ref(drv, stage, name):
                made[name] = told(drv, key, [known.ref(given) for given in drv.inputs]).to_json()
        if made:
            found[stage] = made
    return found


def told(drv: Derivation, key: Digest | None, inputs: Sequence[TensorRef | None]) -> Made:
    """What is told of a derivation. `inputs`: the contents of its inputs, as far as they are known."""
    named = [
        (given.source if isinstance(given, SourceTensor) else given.stage, given.name, ref.digest.hex if ref else None)
        for given, ref in zip(drv.inputs, inputs, strict=True)
    ]
    return Made(drv.builder, drv.version, drv.numerics, key.hex if key else None, tuple(named))
