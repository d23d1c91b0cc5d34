"""Spectra that are known: what singular values the store has for the modules of a stage. Small tensors, read whole."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from kittybuild.checkpoint.reading import Files
from kittybuild.digest import Digest
from kittybuild.errors import BuildError
from kittybuild.planner.decomposed import Spectrum
from kittybuild.planner.known import Known
from kittybuild.store.store import Location


def known_spectra(known: Known, stages: Iterable[str]) -> dict[str, dict[str, Spectrum]] | None:
    """The spectra of these stages by module; None where the store lacks one of them."""
    known.forget_places()
    found: dict[str, dict[str, Spectrum]] = {}
    with Files() as files:
        for stage in stages:
            found[stage] = {}
            for module, step in known.plan.stages[stage].steps.items():
                ref = known.ref(step, stage, module)
                place = known.location(ref.digest) if ref else None
                if ref is None or place is None:
                    return None
                found[stage][module] = _read(files, place, ref.digest, step.spec.nbytes)
    return found


def _read(files: Files, place: Location, digest: Digest, nbytes: int) -> Spectrum:
    data = bytearray(nbytes)
    files.read_into(place.path, place.offset, memoryview(data))
    if Digest.of(data) != digest:
        hint = "`kittybuild store check` finds the damage, the next build repairs it"
        raise BuildError("KB505", "the store holds other singular values than were written", at=place.path, hint=hint)
    numbers = array("d", bytes(data)).tolist()
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))
