"""A source as its headers describe it: which tensors, in which bytes of which files. No weights are read here.

Every path in a Checkpoint lies inside the source's own folder, and every byte range inside its file.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kittybuild.digest import Digest, tagged
from kittybuild.tensors import Shape, TensorSpec

RAW = "raw"

_PLAIN = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class FileId:
    """A file as `stat` tells it: when one of these changes, what we knew of its content is void.

    `content`: its SHA-256 (or its name in git), for a file of which a lock says it; then nothing else counts. `whole`:
    its bytes were seen to be those; else only ranges of it are here, as a server gave them.
    """

    path: str
    size: int
    mtime_ns: int = 0
    ctime_ns: int = 0
    inode: int = 0
    content: str = ""
    whole: bool = True

    @classmethod
    def of(cls, path: str) -> FileId:
        """The identity of the file that `path` leads to; raises OSError."""
        stat = os.stat(path)
        return cls(os.path.realpath(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)

    def key(self) -> Digest:
        """The name under which facts about this file are remembered."""
        if self.content:
            return tagged("kittybuild.pinned-file.v1", [self.content, self.whole])
        return tagged("kittybuild.file.v1", [self.path, self.size, self.mtime_ns, self.ctime_ns, self.inode])


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a source: `spec` is what it means, the rest is where and how its bytes lie.

    `offset` and `nbytes` are the stored bytes in `file`. `encoding` is RAW (the stored bytes are the tensor's own), or
    says how they are decoded on reading: `gguf:TYPE`, `strides:1x4`, `scaled:F8_E4M3:128x128`, `mxfp4`. `parts`: the
    tensors that decoding needs. `heads` > 0: the rows are stored in GGUF's interleaved order of that many heads.
    """

    name: str
    spec: TensorSpec
    file: str
    offset: int
    nbytes: int
    encoding: str = RAW
    heads: int = 0
    parts: tuple[Entry, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that holds bytes of it."""
        return tuple(dict.fromkeys((self.file, *(part.file for part in self.parts))))

    @property
    def quantized(self) -> str | None:
        """The name of the quantized type that it is stored in; None for one that is plain."""
        kind, _, rest = self.encoding.partition(":")
        if kind == "gguf":
            return None if rest.split(":")[0] in _PLAIN else rest
        return {"scaled": f"{rest.split(':')[0]} with scales", "mxfp4": "MXFP4"}.get(kind)


def piece(name: str, start: int, shape: Shape) -> str:
    """What a piece of a tensor is called: the elements from `start` on that have this shape."""
    return f"{name}#{start}:{'x'.join(map(str, shape))}"


@dataclass(frozen=True, slots=True)
class Companion:
    """A file that travels with the weights. `derived`: not a file of its own but made from the weights file `path`."""

    name: str
    path: str
    derived: bool = False


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything that can be known of a source without reading weights."""

    where: str
    kind: str
    entries: Mapping[str, Entry]
    files: tuple[FileId, ...]
    companions: tuple[Companion, ...] = ()
    config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def entry(self, name: str) -> Entry:
        """A tensor, or a piece of one that is stored as it is."""
        if name in self.entries:
            return self.entries[name]
        whole, _, text = name.rpartition("#")
        start, _, sides = text.partition(":")
        entry = self.entries[whole]
        spec = TensorSpec(entry.spec.dtype, tuple(map(int, sides.split("x"))))
        offset = entry.offset + int(start) * spec.dtype.size
        return Entry(name, spec, entry.file, offset, spec.nbytes)

    @property
    def quantized(self) -> dict[str, int]:
        """How many of its tensors are stored in each quantized type."""
        return dict(Counter(filter(None, (entry.quantized for entry in self.entries.values()))))
