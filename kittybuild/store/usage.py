"""What roots keep: which packs, manifests and files each output needs. Reads only.

What a root needs is known from its manifest alone; without that nobody may say that something is not needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kittybuild.digest import Digest, Json
from kittybuild.errors import StoreError
from kittybuild.model.manifest import Manifest
from kittybuild.store.inside import Inside
from kittybuild.store.problems import damaged
from kittybuild.store.roots import Root


@dataclass(frozen=True)
class Kept:
    """By digest, the outputs that need a pack, a manifest, a file; and all tensors in these packs."""

    packs: Mapping[Digest, tuple[Root, ...]]
    manifests: Mapping[Digest, tuple[Root, ...]]
    files: Mapping[Digest, tuple[Root, ...]]
    tensors: frozenset[Digest]


@dataclass(frozen=True, slots=True)
class Use:
    """What one output needs: bytes of packs, and of packs that no other output needs. `there`: its folder is there."""

    root: Root
    bytes: int
    alone: int
    there: bool

    def to_json(self) -> dict[str, Json]:
        """As `store info --json` prints it."""
        root = self.root
        named: dict[str, Json] = {"output": root.name, "folder": root.folder, "manifest": root.manifest.hex}
        return {**named, "recipe": root.recipe, "bytes": self.bytes, "alone_bytes": self.alone, "there": self.there}


@dataclass
class _Needs:
    packs: dict[Digest, tuple[Root, ...]] = field(default_factory=dict)
    manifests: dict[Digest, tuple[Root, ...]] = field(default_factory=dict)
    files: dict[Digest, tuple[Root, ...]] = field(default_factory=dict)
    tensors: set[Digest] = field(default_factory=set)

    def add(self, root: Root, manifest: Manifest | None) -> None:
        """Note what one root needs; without its manifest, that alone."""
        _note(self.manifests, root, [root.manifest])
        for digest in root.also:  # a manifest or a file: the names of both are digests of their bytes
            _note(self.manifests, root, [digest])
            _note(self.files, root, [digest])
        if manifest is not None:
            _note(self.packs, root, (shard.pack for shard in manifest.shards))
            _note(self.files, root, (file.digest for file in manifest.files))
            if manifest.shards:
                self.tensors.update(tensor.ref.digest for tensor in manifest.tensors)


def kept(inside: Inside, roots: Iterable[Root] | None = None) -> Kept:
    """What all roots keep (or these). Raises StoreError KB706 if a root, or its manifest, cannot be read."""
    needs = _Needs()
    for root in inside.roots.all() if roots is None else roots:
        manifest = inside.content.sound_manifest(root.manifest)
        if manifest is None:
            hint = "build it again or drop it (`kittybuild store roots --drop FOLDER`): till then nothing is collected"
            message = f"the manifest of the output {root.name} in {root.folder} is damaged or gone"
            raise damaged(inside.paths.manifest(root.manifest), message, hint)
        needs.add(root, manifest)
    return Kept(needs.packs, needs.manifests, needs.files, frozenset(needs.tensors))


def needed_by(inside: Inside) -> Kept:
    """The same as far as it can be read, to say who is hurt by damage: never to delete."""
    needs = _Needs()
    for path in inside.roots.files():
        try:
            root = inside.roots.read(path)
        except (StoreError, FileNotFoundError):  # damaged: `check` names it
            continue
        needs.add(root, inside.content.sound_manifest(root.manifest))
    return Kept(needs.packs, needs.manifests, needs.files, frozenset(needs.tensors))


def used_by(inside: Inside) -> tuple[Use, ...]:
    """What each output needs, as far as it can be read."""
    found = needed_by(inside)
    sizes = {digest: _size(inside.paths.pack(digest)) for digest in found.packs}
    uses = []
    for root in sorted({root for roots in found.manifests.values() for root in roots}):
        mine = [digest for digest, roots in found.packs.items() if root in roots]
        alone = sum(sizes[digest] for digest in mine if len(found.packs[digest]) == 1)
        uses.append(Use(root, sum(sizes[digest] for digest in mine), alone, os.path.isdir(root.folder)))
    return tuple(uses)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _note(needs: dict[Digest, tuple[Root, ...]], root: Root, digests: Iterable[Digest]) -> None:
    for digest in digests:
        if root not in needs.get(digest, ()):
            needs[digest] = (*needs.get(digest, ()), root)
