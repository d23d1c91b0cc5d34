"""Files of `torch.save`, zip and legacy, from strangers: where the bytes of each tensor lie. Nothing of them is run.

A tensor is a range of the file, as in safetensors; what a torch file may hold beside tensors is noted or refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, BinaryIO

from kittybuild.checkpoint.bounded import Bounded
from kittybuild.checkpoint.pickle_data import ORDERED_DICT, Known, Unreadable, call, read_pickle
from kittybuild.checkpoint.source import RAW, Entry
from kittybuild.checkpoint.state_dict import some, state_dict
from kittybuild.checkpoint.strided import contiguous, encoding, span
from kittybuild.checkpoint.zipped import AGAIN, read_members
from kittybuild.errors import SourceError
from kittybuild.tensors import DType, TensorSpec

SUFFIXES = (".bin", ".pt", ".pth")
LONGEST_PICKLE = 64 << 20

_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_MOST_SIDES = 64
_CONVERT = "load it with torch, and save its state dict as safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    """A run of `count` elements under a key. dtype None: one that we do not know."""

    key: str
    dtype: DType | None
    type: str
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class _Tensor:
    """A view of a storage; `offset` and `stride` in elements of `dtype`."""

    storage: _Storage
    dtype: DType | None
    type: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_pickled(path: str) -> tuple[dict[str, Entry], tuple[str, ...]]:
    """The tensors of a torch file by name, in its order, and notes. Raises SourceError KB201, KB203, KB220 to KB224."""
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            file.seek(0)
            if head == b"version ":
                hint = "run `git lfs pull`"
                raise SourceError("KB220", "not the weights but a pointer of git-lfs to them", at=path, hint=hint)
            if head[:4] == b"PK\x03\x04":
                value, places = _zipped(path, file)
            elif head[:1] == b"\x80":
                value, places = _legacy(path, file)
            else:
                raise _damaged(path, "it is neither a zip file nor a pickle")
    except OSError as error:
        hint = "check the path and its rights"
        raise SourceError("KB201", f"cannot read: {error.strerror}", at=path, hint=hint) from error
    tensors, notes = state_dict(path, value, _Tensor)
    return {name: _entry(path, name, tensor, places) for name, tensor in tensors.items()}, notes


def _damaged(path: str, message: str, hint: str = AGAIN) -> SourceError:
    return SourceError("KB220", f"not a whole torch file: {message}", at=path, hint=hint)


def _other(path: str, message: str, hint: str = _CONVERT) -> SourceError:
    return SourceError("KB222", message, at=path, hint=hint)


# ---- the two layouts: a value with tensors in it, and where each storage begins


def _zipped(path: str, file: BinaryIO) -> tuple[Any, dict[str, int]]:
    members = read_members(path, file)
    tops = [name[: -len("data.pkl")] for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(tops) != 1:
        raise _damaged(path, "the zip file has no data.pkl")
    top = tops[0]
    if f"{top}constants.pkl" in members:
        raise _other(path, "it is a TorchScript program, not a state dict")
    if packed := [name for name, member in members.items() if member.packed]:
        hint = "torch never compresses: load it with torch and save it again"
        raise _other(path, f"it is compressed or encrypted: {some(packed)}", hint)
    if order := members.get(f"{top}byteorder"):
        file.seek(order.offset)
        if file.read(min(order.nbytes, 16)) != b"little":
            raise _other(path, "it was written on a big-endian machine")
    pickle = members[f"{top}data.pkl"]
    file.seek(pickle.offset)
    storages: dict[str, _Storage] = {}
    bounded = Bounded(file, min(pickle.nbytes, LONGEST_PICKLE), "the pickle")
    value = read_pickle(path, bounded, _KNOWN, _storages(storages))
    places = {}
    for key, storage in storages.items():
        found = members.get(f"{top}data/{key}")
        nbytes = _nbytes(path, storage)
        if found is None or found.nbytes != nbytes:
            there = "not there" if found is None else f"of {found.nbytes} bytes"
            raise _damaged(path, f"the storage {key[:40]!r} of {nbytes} bytes is {there}")
        places[key] = found.offset
    return value, places


def _legacy(path: str, file: BinaryIO) -> tuple[Any, dict[str, int]]:
    bounded = Bounded(file, LONGEST_PICKLE, "the pickle")
    storages: dict[str, _Storage] = {}
    if read_pickle(path, bounded, {}) != _LEGACY_MAGIC:
        raise _damaged(path, "a pickle, but none of torch.save", _CONVERT)
    if read_pickle(path, bounded, {}) != _LEGACY_VERSION:
        raise _other(path, "it is of another version of torch's legacy format")
    system = read_pickle(path, bounded, {})
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _other(path, "it was written on a big-endian machine")
    value = read_pickle(path, bounded, _KNOWN, _storages(storages))
    keys = read_pickle(path, bounded, {})
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise _damaged(path, "it has no list of its storages")
    if set(keys) != storages.keys():
        raise _damaged(path, "the storages are not those of its tensors")
    at, size, places = bounded.tell(), os.fstat(file.fileno()).st_size, {}
    for key in keys:
        file.seek(at)
        if int.from_bytes(file.read(8), "little") != storages[key].count:
            raise _damaged(path, f"the storage {key[:40]!r} does not have {storages[key].count} elements")
        places[key] = at + 8
        at += 8 + _nbytes(path, storages[key])
    if at != size:
        raise _damaged(path, f"it describes {at} bytes, the file has {size}")
    return value, places


def _nbytes(path: str, storage: _Storage) -> int:
    if storage.dtype is None:
        raise _unknown(path, f"the storage {storage.key[:40]!r}", storage.type)
    return storage.count * storage.dtype.size


def _unknown(path: str, what: str, dtype: str) -> SourceError:
    hint = f"known: {', '.join(d.value for d in DType)}"
    return SourceError("KB203", f"{what} has the dtype {dtype!r}, which we do not know", at=path, hint=hint)


# ---- what a pickle of torch may name and call


def _storages(found: dict[str, _Storage]) -> Callable[[Any], _Storage]:
    """What stands for a persistent id; each storage is put into `found` once."""

    def stored(identity: Any) -> _Storage:
        match identity:
            case ("storage", Known() as kind, str(key), _, int(count), *view) if 0 <= count < 1 << 63:
                if kind.name not in _STORAGES:
                    raise ValueError(f"a storage of the type {kind.name}")
                if view not in ([], [None]):
                    raise Unreadable("its storages are views of others, as torch wrote them before 0.4")
                before = found.setdefault(key, _Storage(key, _STORAGES[kind.name], kind.name, count))
                if (before.type, before.count) != (kind.name, count):
                    raise ValueError(f"the storage {key[:40]!r} is described in two ways")
                return before
        raise ValueError("a persistent id that is no storage")

    return stored


def _rebuilt(arguments: Sequence[Any], dtype: Known | None = None) -> _Tensor:
    """The view that (storage, offset, size, stride, requires_grad, hooks, metadata) describe, the last 3 optional."""
    match arguments:
        case [_Storage() as storage, int(offset), tuple(shape), tuple(stride), *more] if len(more) <= 3:
            pass
        case _:
            raise ValueError("a tensor without storage, offset, size and stride")
    if len(shape) != len(stride) or len(shape) > _MOST_SIDES:
        raise ValueError("a tensor of impossible size or stride")
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in (offset, *shape, *stride)):
        raise ValueError("a tensor of impossible size or stride")
    if any(more[2:]):
        raise Unreadable("a tensor in it is a lazy conjugate or negative")
    if dtype is None:
        return _Tensor(storage, storage.dtype, storage.type, offset, shape, stride)
    return _Tensor(storage, DType.named(dtype.name), dtype.name, offset, shape, stride)


def _with_dtype(arguments: Sequence[Any]) -> _Tensor:
    """The same with a dtype before the metadata, over a storage of bytes."""
    match arguments:
        case [*head, Known() as dtype] | [*head, Known() as dtype, None] if len(head) == 6:
            return _rebuilt(head, dtype)
    raise ValueError("a tensor without its dtype")


def _parameter(arguments: Sequence[Any]) -> _Tensor:
    """The tensor that a parameter is."""
    match arguments:
        case [_Tensor() as tensor, *_]:
            return tensor
    raise ValueError("a parameter that is no tensor")


def _of_type(arguments: Sequence[Any]) -> _Tensor:
    """(function, type, arguments, state) for a tensor with attributes of its own."""
    match arguments:
        case [function, Known(name=name), tuple(inner), _] if name in _TENSOR_TYPES:
            return _parameter([call(function, inner)])
    raise Unreadable("a tensor in it is of a class of its own")


def _size(arguments: Sequence[Any]) -> tuple[Any, ...]:
    match arguments:
        case [list() | tuple() as sides]:
            return tuple(sides)
    raise ValueError("a size of no numbers")


_STORAGES: Mapping[str, DType | None] = MappingProxyType(
    {
        "torch.DoubleStorage": DType.F64,
        "torch.FloatStorage": DType.F32,
        "torch.HalfStorage": DType.F16,
        "torch.BFloat16Storage": DType.BF16,
        "torch.LongStorage": DType.I64,
        "torch.IntStorage": DType.I32,
        "torch.ShortStorage": DType.I16,
        "torch.CharStorage": DType.I8,
        "torch.ByteStorage": DType.U8,
        "torch.BoolStorage": DType.BOOL,
        "torch.storage.UntypedStorage": DType.U8,
        **dict.fromkeys(("torch.ComplexFloatStorage", "torch.ComplexDoubleStorage")),
        **dict.fromkeys(("torch.QInt8Storage", "torch.QUInt8Storage", "torch.QInt32Storage")),
    }
)
_TENSOR_TYPES = frozenset(("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"))
_OTHER_DTYPES = (
    "complex32 complex64 complex128 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2 qint8 quint8 qint32"
)
_CALLS: Mapping[str, Callable[[Sequence[Any]], Any]] = MappingProxyType(
    {
        "torch._utils._rebuild_tensor": _rebuilt,
        "torch._utils._rebuild_tensor_v2": _rebuilt,
        "torch._utils._rebuild_tensor_v3": _with_dtype,
        "torch._utils._rebuild_parameter": _parameter,
        "torch._utils._rebuild_parameter_with_state": _parameter,
        "torch._tensor._rebuild_from_type_v2": _of_type,
        "torch.Size": _size,
    }
)
_DTYPES = frozenset(f"torch.{name}" for name in (*(dtype.torch_name for dtype in DType), *_OTHER_DTYPES.split()))
_NAMES = _DTYPES | _TENSOR_TYPES | frozenset(_STORAGES)
_KNOWN: Mapping[str, Known] = MappingProxyType(
    {ORDERED_DICT.name: ORDERED_DICT}
    | {name: Known(name) for name in _NAMES}
    | {name: Known(name, call) for name, call in _CALLS.items()}
)


# ---- tensors as entries


def _entry(path: str, name: str, tensor: _Tensor, places: Mapping[str, int]) -> Entry:
    if tensor.dtype is None:
        raise _unknown(path, repr(name), tensor.type)
    spec, size = TensorSpec(tensor.dtype, tensor.shape), tensor.dtype.size
    place = places[tensor.storage.key]
    if spec.numel == 0:
        return Entry(name, spec, path, place, 0)
    reach, there = span(tensor.shape, tensor.stride), _nbytes(path, tensor.storage) // size
    if tensor.offset + reach > there:
        message = f"{name!r} ({spec}) ends at element {tensor.offset + reach} of the {there} that are stored for it"
        raise SourceError("KB223", message, at=path, hint=AGAIN)
    if spec.numel > reach:
        message = f"{name!r} ({spec}) repeats the {reach} elements that are stored"
        raise _other(path, message, "save `tensor.contiguous()` instead")
    dense = contiguous(tensor.shape, tensor.stride)
    offset = place + tensor.offset * size
    return Entry(name, spec, path, offset, reach * size, RAW if dense else encoding(tensor.stride))
