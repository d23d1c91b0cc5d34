"""The parts of an open store, for what looks after it: collection, check, repair."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kittybuild.store.content import Content
from kittybuild.store.disk import Disk
from kittybuild.store.facts import Facts
from kittybuild.store.index import Index
from kittybuild.store.layout import Layout
from kittybuild.store.pack import PackLayout
from kittybuild.store.packs import Packs
from kittybuild.store.problems import guarded
from kittybuild.store.roots import Roots
from kittybuild.store.unfinished import Unfinished
from kittybuild.store.writer import PackWriter, Part
from kittybuild.tensors import TensorSpec


@dataclass(frozen=True)
class Inside:
    """The parts of one open store."""

    disk: Disk
    paths: Layout
    index: Index
    facts: Facts
    packs: Packs
    content: Content
    roots: Roots
    unfinished: Unfinished

    @classmethod
    def of(cls, disk: Disk, paths: Layout, index: Index) -> Inside:
        """The parts over one index."""
        facts = Facts(index, paths)
        packs = Packs(paths, index, facts)
        content = Content(disk, paths, index, facts)
        return cls(disk, paths, index, facts, packs, content, Roots(disk, paths), Unfinished(disk, paths, packs, facts))

    def write_pack(self, tensors: Iterable[tuple[str, TensorSpec]]) -> PackWriter:
        """Begin a pack of these tensors; a salvaged one of the same layout is gone on with in place."""
        layout = PackLayout.of(tensors)
        part = self.unfinished.take(layout) or Part.new(self.disk, self.paths, layout)
        return PackWriter(self.disk, self.paths, self.packs, self.facts, part, self.unfinished.retire)

    def learn(self) -> None:
        """Record the packs and manifests that are on disk and not in the index; set aside packs that are no packs."""
        with guarded("read", self.paths.root):
            for digest, path in self.packs.unknown():
                if not self.packs.adopt(digest, path):
                    self.unfinished.discard(path)
            self.content.adopt_unknown()
