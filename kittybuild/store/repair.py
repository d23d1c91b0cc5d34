"""Repairing a store: what is damaged is set aside, and put together again from what is good elsewhere.

Nothing is invented: a tensor that is nowhere whole is left to the next build, and the outputs that need it are named.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from kittybuild.digest import Digest
from kittybuild.errors import StoreError
from kittybuild.store.check import Damage
from kittybuild.store.facts import Location
from kittybuild.store.inside import Inside
from kittybuild.store.layout import stored_digests
from kittybuild.store.pack import read_cut_pack_header
from kittybuild.store.problems import DamagedTensor, guarded
from kittybuild.store.roots import Root
from kittybuild.tensors import TensorRef

Tensors = tuple[tuple[str, TensorRef], ...]


@dataclass(frozen=True)
class Repaired:
    """What was damaged, the packs that are whole again, and the outputs that a build must put right."""

    damage: tuple[Damage, ...]
    whole: tuple[Digest, ...]
    hurt: tuple[Root, ...]


def repair(inside: Inside, damage: tuple[Damage, ...]) -> Repaired:
    """Set aside what is damaged and put packs together again. The index is not repaired here: it is made anew.

    An output whose pack was damaged is hurt even if the pack is whole again: its shard may be the damaged file itself.
    """
    inside.learn()
    wanted = {}
    for found in damage:
        if found.kind == "pack" and found.digest is not None:
            wanted[found.digest] = _tensors(inside, found.digest, found.path)
        _set_aside(inside, found)
    whole = tuple(digest for digest, tensors in wanted.items() if tensors and _put_together(inside, tensors))
    inside.unfinished.close()  # so that what lies elsewhere now is found to be of no use any more
    inside.unfinished.salvage()
    hurt = {root for found in damage for root in found.hurt}
    return Repaired(damage, whole, tuple(sorted(hurt)))


def _set_aside(inside: Inside, found: Damage) -> None:
    with guarded("set aside", found.path):
        match found.kind:
            case "pack":
                inside.unfinished.discard(found.path)
            case "rows":
                inside.index.drop_damaged()
            case "root":
                name = f"damaged-root-{os.urandom(16).hex()}"
                inside.disk.rename(found.path, os.path.join(inside.paths.tmp, name))
                inside.disk.sync_dir(inside.paths.roots)
            case "manifest" | "file":
                inside.disk.unlink(found.path)
                if found.kind == "manifest" and found.digest is not None:
                    inside.content.forget([found.digest])


def _tensors(inside: Inside, digest: Digest, path: str) -> Tensors:
    """What a pack must hold: from a manifest that lists it, else from its own header, if that is sound."""
    for name, _ in stored_digests(inside.paths.manifests, ".json"):
        manifest = inside.content.sound_manifest(name)
        for shard in manifest.shards if manifest is not None else ():
            if shard.pack == digest and manifest is not None:
                refs = {tensor.name: tensor.ref for tensor in manifest.tensors}
                return tuple((tensor, refs[tensor]) for tensor in shard.names)
    try:
        return tuple(read_cut_pack_header(path)[1].items())
    except (StoreError, OSError):
        return ()


def _put_together(inside: Inside, tensors: Tensors) -> bool:
    """Write a pack whose tensors are all good somewhere; whether they are."""
    while (places := _places(inside, tensors)) is not None:
        with inside.write_pack((name, ref.spec) for name, ref in tensors) as writer:
            try:
                for name, ref in tensors:
                    writer.copy(name, ref, places[ref.digest])
                writer.finish()
                return True
            except DamagedTensor as more:
                writer.discard()
                bad = more.path
        inside.unfinished.discard(bad)
    return False


def _places(inside: Inside, tensors: Tensors) -> dict[Digest, Location] | None:
    """Where all of the tensors lie; None if one lies nowhere."""
    wanted = {ref.digest for _, ref in tensors}
    inside.packs.locate_again(wanted - set(inside.facts.locations(wanted)))
    places = inside.facts.locations(wanted)
    return places if set(places) == wanted else None
