"""Small files by content: manifests and companion files.

Every read is verified by digest; a damaged file is removed, and absent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from kittybuild.digest import Digest
from kittybuild.model.manifest import Manifest
from kittybuild.store.disk import Disk
from kittybuild.store.facts import Facts
from kittybuild.store.index import Index
from kittybuild.store.layout import Layout, stored_digests
from kittybuild.store.problems import guarded
from kittybuild.store.reading import small_file

_MANIFEST = "manifest"


class Content:
    """The manifests and companion files of a store."""

    def __init__(self, disk: Disk, layout: Layout, index: Index, facts: Facts) -> None:
        self._disk = disk
        self._layout = layout
        self._index = index
        self._facts = facts

    def manifest(self, digest: Digest) -> Manifest | None:
        """The manifest; None if it is absent, damaged, or of a format that we do not know."""
        data = self._read(self._layout.manifest(digest), digest)
        try:
            return Manifest.from_bytes(data) if data is not None else None
        except ValueError:
            return None

    def sound_manifest(self, digest: Digest) -> Manifest | None:
        """The same, and a damaged one stays where it is."""
        path = self._layout.manifest(digest)
        with guarded("read", path):
            data = small_file(path)
        try:
            return Manifest.from_bytes(data) if data is not None and Digest.of(data) == digest else None
        except ValueError:
            return None

    def put_manifest(self, manifest: Manifest) -> Digest:
        """Keep a manifest, and record what it says of derivations."""
        digest = self._put_named(manifest.to_bytes(), self._layout.manifest)
        self._record(digest, manifest)
        return digest

    def file(self, digest: Digest) -> str | None:
        """The path of a companion file, not verified."""
        path = self._layout.file(digest)
        return path if os.path.exists(path) else None

    def put_file(self, data: bytes) -> Digest:
        """Keep a companion file."""
        return self._put_named(data, self._layout.file)

    def read_file(self, digest: Digest) -> bytes | None:
        """The bytes of a companion file."""
        return self._read(self._layout.file(digest), digest)

    def adopt_unknown(self) -> None:
        """Record what the manifests say that the index does not know."""
        known = {key for key, _ in self._index.iterate(_MANIFEST)}
        for digest, _ in stored_digests(self._layout.manifests, ".json"):
            if digest.hex not in known:
                manifest = self.manifest(digest)
                if manifest is not None:
                    self._record(digest, manifest)

    def forget(self, digests: Iterable[Digest] | None = None) -> None:
        """Let `adopt_unknown` read manifests again: these, or all."""
        keys = [key for key, _ in self._index.iterate(_MANIFEST)] if digests is None else [d.hex for d in digests]
        self._index.delete(_MANIFEST, keys)

    def _record(self, digest: Digest, manifest: Manifest) -> None:
        made = {tensor.key: tensor.ref for tensor in manifest.tensors if tensor.key is not None}
        # Where a known realisation differs it stays: whoever built this manifest was told so by `realise`.
        self._facts.add_realisations(made)
        counts = dict(manifest.nonfinite)
        self._facts.set_nonfinite({t.ref.digest: counts[t.name] for t in manifest.tensors if t.name in counts})
        self._index.put_many(_MANIFEST, {digest.hex: 1})

    def _put_named(self, data: bytes, place: Callable[[Digest], str]) -> Digest:
        digest = Digest.of(data)
        path = place(digest)
        with guarded("write", path, len(data)):
            if small_file(path) != data:
                self._disk.makedirs(os.path.dirname(path))
                self._disk.write_file(path, data)
        return digest

    def _read(self, path: str, digest: Digest) -> bytes | None:
        with guarded("read", path):
            data = small_file(path)
            if data is None or Digest.of(data) == digest:
                return data
            self._disk.unlink(path)
        return None
