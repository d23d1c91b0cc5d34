"""Files of torch.save in tests: written in both layouts or by hand, and read back piece by piece."""

from __future__ import annotations

import itertools
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from kittybuild.checkpoint.pickled import read_pickled
from kittybuild.checkpoint.reading import Files
from kittybuild.checkpoint.source import Entry
from kittybuild.errors import SourceError

LAYOUTS = ("zip", "legacy")


def save(path: Path, value: Any, layout: str = "zip", **options: Any) -> Path:
    """A file of torch.save."""
    torch.save(value, path, _use_new_zipfile_serialization=layout == "zip", **options)
    return path


def read(path: Path) -> dict[str, Entry]:
    return read_pickled(str(path))[0]


def content(entry: Entry, cuts: tuple[int, ...] = ()) -> bytes:
    """A tensor's bytes, read piece by piece."""
    places = sorted({0, *cuts, entry.spec.nbytes})
    with Files() as files:
        reader, whole = files.reader(entry), bytearray(entry.spec.nbytes)
        for start, stop in itertools.pairwise(places):
            reader.read_into(start, memoryview(whole)[start:stop])
        return bytes(whole)


def raw(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().flatten().clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def same(entries: Mapping[str, Entry], tensors: Mapping[str, torch.Tensor]) -> None:
    assert list(entries) == list(tensors)
    for name, tensor in tensors.items():
        assert entries[name].spec.shape == tuple(tensor.shape)
        assert f"torch.{entries[name].spec.dtype.torch_name}" == str(tensor.dtype)
        assert content(entries[name]) == raw(tensor), name


def refused(path: Path, code: str) -> SourceError:
    with pytest.raises(SourceError) as caught:
        read_pickled(str(path))
    assert caught.value.code == code, caught.value
    assert caught.value.at == str(path)
    assert caught.value.hint
    return caught.value


def machine(*steps: bytes) -> bytes:
    return b"\x80\x02" + b"".join(steps) + b"."


def named(name: str) -> bytes:
    module, _, word = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + word.encode() + b"\n"


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def storage(kind: str = "torch.FloatStorage", key: bytes = text("0"), count: bytes = number(4)) -> bytes:
    return b"(" + text("storage") + named(kind) + key + text("cpu") + count + b"tQ"


def rebuilt(
    at: bytes = number(0), size: bytes = number(4) + b"\x85", stride: bytes = number(1) + b"\x85", **kwargs: bytes
) -> bytes:
    """A call of _rebuild_tensor_v2."""
    stored, more = kwargs.get("stored", storage()), kwargs.get("more", b"\x89}")
    return named("torch._utils._rebuild_tensor_v2") + b"(" + stored + at + size + stride + more + b"tR"


def zip_of(path: Path, pickled: bytes, data: Mapping[str, bytes] | None = None, **more: bytes) -> Path:
    """A zip file as torch makes it, with that pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", pickled)
        for name, content in {"byteorder": b"little", **more}.items():
            file.writestr(f"x/{name}", content)
        for key, content in ({"0": bytes(16)} if data is None else data).items():
            file.writestr(f"x/data/{key}", content)
    return path


def one(tensor: bytes) -> bytes:
    return machine(b"}", text("x"), tensor, b"s")
