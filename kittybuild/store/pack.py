"""A pack is an ordinary safetensors file whose every byte follows from its ordered tensors.

So a header is right if, and only if, it equals the one that we would write: reading rebuilds it and compares.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kittybuild.digest import Digest, canonical
from kittybuild.model.manifest import pack_digest
from kittybuild.store.problems import damaged
from kittybuild.tensors import TensorRef, TensorSpec

BLOCK = 4096
PACK_VERSION = 1
_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
_HINT = "delete this file: its tensors are made again when they are needed"


@dataclass(frozen=True)
class PackLayout:
    """Which tensor lies where. `tensors` is in the order of the data, `offsets` are absolute."""

    tensors: tuple[tuple[str, TensorSpec], ...]
    offsets: tuple[int, ...]
    header_size: int
    size: int

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, TensorSpec]]) -> PackLayout:
        """Lay out `tensors`: those of whole blocks first, then the others by falling size of their elements.

        So all of the first kind can share blocks between files, and each tensor is aligned to its elements.
        Otherwise the given order is kept; a layout of a layout's tensors is that layout.
        """
        given = tuple(tensors)
        _check_names([name for name, _ in given])
        ordered = tuple(sorted(given, key=_rank))
        header_size = _blocks(_LENGTH.size + len(_header_json(ordered, ["0" * 64] * len(ordered))))
        offsets, end = [], header_size
        for _, spec in ordered:
            offsets.append(end)
            end += spec.nbytes
        return cls(ordered, tuple(offsets), header_size, end)

    def header(self, refs: Mapping[str, TensorRef]) -> bytes:
        """The first `header_size` bytes of the file; its length is the same whatever the digests."""
        for name, spec in self.tensors:
            if refs[name].spec != spec:
                raise ValueError(f"{name}: {refs[name].spec} does not fit the layout's {spec}")
        text = _header_json(self.tensors, [refs[name].digest.hex for name, _ in self.tensors])
        padded = text.ljust(self.header_size - _LENGTH.size, b" ")
        return _LENGTH.pack(len(padded)) + padded

    def offset(self, name: str) -> int:
        """Where a tensor begins in the file; raises KeyError."""
        return self.offsets[self._positions[name]]

    def spec(self, name: str) -> TensorSpec:
        """The spec of a tensor; raises KeyError."""
        return self.tensors[self._positions[name]][1]

    @cached_property
    def _positions(self) -> Mapping[str, int]:
        return {name: position for position, (name, _) in enumerate(self.tensors)}

    def digest(self, refs: Mapping[str, TensorRef]) -> Digest:
        """The name of the pack that holds `refs` in this layout."""
        return pack_digest(tuple((name, refs[name]) for name, _ in self.tensors))


def read_pack_header(path: str) -> tuple[PackLayout, dict[str, TensorRef]]:
    """What a complete pack says it holds, in the order of the data; its tensors are not read.

    Raises StoreError unless each byte of the header, and the size, is as it must be; FileNotFoundError if it is absent.
    """
    layout, refs, size = read_cut_pack_header(path)
    if layout.size != size:
        raise damaged(path, f"the file has {size:,} bytes, and its header says {layout.size:,}", _HINT)
    return layout, refs


def read_cut_pack_header(path: str) -> tuple[PackLayout, dict[str, TensorRef], int]:
    """The same of a pack that may have lost its end, and the size that the file has."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(_LENGTH.size)
        length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else size
        if _LENGTH.size + length > size:
            raise damaged(path, "the file ends inside its header", _HINT)
        body = file.read(length)
    try:
        refs = _parse(body)
        layout = PackLayout.of((name, ref.spec) for name, ref in refs.items())
        same = layout.header(refs) == head + body
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, f"not the header of a pack: {error}", _HINT) from error
    if not same:
        raise damaged(path, "not the header of a pack: some of its bytes are not as they must be", _HINT)
    return layout, refs, size


def _rank(tensor: tuple[str, TensorSpec]) -> tuple[int, int]:
    spec = tensor[1]
    whole = spec.nbytes > 0 and spec.nbytes % BLOCK == 0
    return (0, 0) if whole else (1, -spec.dtype.size)


def _check_names(names: list[str]) -> None:
    if _METADATA in names:
        raise ValueError(f"a tensor may not be named {_METADATA}")
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"more than one tensor is named {twice[0]!r}")


def _blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _header_json(tensors: tuple[tuple[str, TensorSpec], ...], digests: list[str]) -> bytes:
    # The names are in the order of the data, not sorted: tensors of size 0 share an offset, so only this tells theirs.
    ours = canonical({"pack": PACK_VERSION, "digests": ",".join(digests)}).decode()
    form: dict[str, Any] = {_METADATA: {"format": "pt", "kittybuild": ours}}
    end = 0
    for name, spec in tensors:
        form[name] = {
            "dtype": spec.dtype.value,
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    return json.dumps(form, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _parse(body: bytes) -> dict[str, TensorRef]:
    form = json.loads(body)
    metadata = form.pop(_METADATA)
    text = json.loads(metadata["kittybuild"])["digests"]
    digests = text.split(",") if text else []
    return {
        name: TensorRef.from_json([digest, item["dtype"], item["shape"]])
        for (name, item), digest in zip(form.items(), digests, strict=True)
    }
