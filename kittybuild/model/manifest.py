"""A manifest: the content-addressed list of a stage's tensors, shards and companion files.

It holds content and derivation keys only, never a path or a time: equal builds have equal manifests.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeVar

from kittybuild.digest import Digest, Json, canonical, tagged
from kittybuild.model import merkle
from kittybuild.tensors import TensorRef

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ManifestTensor:
    """One tensor of a checkpoint: content, and the key of the derivation that made it (None: it was taken over)."""

    name: str
    ref: TensorRef
    key: Digest | None


@dataclass(frozen=True, slots=True)
class ManifestShard:
    """One shard: the pack that it is, its size in bytes, and the names in it, in the order of the data."""

    pack: Digest
    size: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One companion file."""

    name: str
    digest: Digest
    size: int


@dataclass(frozen=True)
class Manifest:
    """What a stage made. `shards` hold all tensors of an output; an intermediate stage has none: where its tensors lie,
    and whether they are kept, depends on what was built before. `nonfinite`: by name, the tensors that hold NaN
    or infinity, each with how many elements.
    """

    tensors: tuple[ManifestTensor, ...]
    shards: tuple[ManifestShard, ...]
    files: tuple[ManifestFile, ...] = ()
    nonfinite: tuple[tuple[str, int], ...] = ()

    def to_bytes(self) -> bytes:
        """The canonical form, which is also the stored form."""
        form: dict[str, Json] = {
            "kittybuild.manifest": 1,
            "tensors": [[t.name, *t.ref.to_json(), t.key.hex if t.key else None] for t in self.tensors],
            "shards": [[s.pack.hex, s.size, list(s.names)] for s in self.shards],
            "files": [[f.name, f.digest.hex, f.size] for f in self.files],
        }
        if self.nonfinite:
            form["nonfinite"] = dict(self.nonfinite)
        return canonical(form)

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """The inverse of `to_bytes`; raises ValueError for anything else."""
        try:
            form = json.loads(data)
            if form["kittybuild.manifest"] != 1:
                raise ValueError(f"a manifest of format {form['kittybuild.manifest']!r}")
            return cls(
                tuple(
                    ManifestTensor(_plain(name, str), TensorRef.from_json(ref), Digest(key) if key else None)
                    for name, *ref, key in form["tensors"]
                ),
                tuple(
                    ManifestShard(Digest(pack), _plain(size, int), tuple(_plain(name, str) for name in names))
                    for pack, size, names in form["shards"]
                ),
                tuple(
                    ManifestFile(_plain(name, str), Digest(digest), _plain(size, int))
                    for name, digest, size in form["files"]
                ),
                tuple(sorted((name, int(count)) for name, count in form.get("nonfinite", {}).items())),
            )
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a manifest: {error!r}") from error

    @property
    def digest(self) -> Digest:
        """The manifest's name."""
        return Digest.of(self.to_bytes())

    @property
    def root(self) -> Digest:
        """The Merkle root over its tensors."""
        return merkle.root({tensor.name: tensor.ref for tensor in self.tensors})


def _plain(value: Any, kind: type[T]) -> T:
    if type(value) is not kind:
        raise ValueError(f"not a manifest: {value!r:.80} is not one {kind.__name__}")
    return value


def pack_digest(tensors: tuple[tuple[str, TensorRef], ...]) -> Digest:
    """The digest of a pack: over its ordered (name, digest, dtype, shape) list, so known before a byte is written."""
    return tagged("kittybuild.pack.v1", [[name, *ref.to_json()] for name, ref in tensors])
