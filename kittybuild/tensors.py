"""What a tensor is without its bytes (TensorSpec), and with them by name (TensorRef).

DTypes carry the safetensors names; shapes are tuples of non-negative ints; sizes are in bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from kittybuild.digest import Digest, Json


class DType(str, Enum):
    """An element type, by its safetensors name."""

    F64 = "F64"
    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    F8_E4M3 = "F8_E4M3"
    F8_E5M2 = "F8_E5M2"
    I64 = "I64"
    I32 = "I32"
    I16 = "I16"
    I8 = "I8"
    U64 = "U64"
    U32 = "U32"
    U16 = "U16"
    U8 = "U8"
    BOOL = "BOOL"

    @property
    def size(self) -> int:
        """Bytes of one element."""
        return _SIZES[self]

    @property
    def is_float(self) -> bool:
        """Whether merge arithmetic is defined on it."""
        return self.value[0] == "F" or self is DType.BF16

    @property
    def torch_name(self) -> str:
        """The name that torch, config.json and mergekit use."""
        return _TORCH_NAMES[self]

    @classmethod
    def named(cls, name: str) -> DType | None:
        """The dtype that torch or a recipe calls `name` (`bfloat16`, `torch.float32`), or None."""
        return _BY_TORCH_NAME.get(name.removeprefix("torch."))


_SIZES = MappingProxyType(
    {d: 8 if "64" in d.value else 4 if "32" in d.value else 2 if "16" in d.value else 1 for d in DType}
)
_TORCH_NAMES = MappingProxyType(
    {
        DType.F64: "float64",
        DType.F32: "float32",
        DType.F16: "float16",
        DType.BF16: "bfloat16",
        DType.F8_E4M3: "float8_e4m3fn",
        DType.F8_E5M2: "float8_e5m2",
        DType.I64: "int64",
        DType.I32: "int32",
        DType.I16: "int16",
        DType.I8: "int8",
        DType.U64: "uint64",
        DType.U32: "uint32",
        DType.U16: "uint16",
        DType.U8: "uint8",
        DType.BOOL: "bool",
    }
)
_BY_TORCH_NAME = MappingProxyType({name: dtype for dtype, name in _TORCH_NAMES.items()})

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Element type and shape."""

    dtype: DType
    shape: Shape

    def __post_init__(self) -> None:
        if any(side < 0 for side in self.shape):
            raise ValueError(f"not a shape: {self.shape}")

    @property
    def numel(self) -> int:
        """How many elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the raw bytes."""
        return self.numel * self.dtype.size

    def with_dtype(self, dtype: DType) -> TensorSpec:
        """The same shape in another element type."""
        return self if dtype is self.dtype else TensorSpec(dtype, self.shape)

    def to_json(self) -> list[Json]:
        """`[dtype, shape]`."""
        return [self.dtype.value, list(self.shape)]

    def __str__(self) -> str:
        return f"{self.dtype.value}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor by content: the digest of its raw bytes, and how to read them."""

    digest: Digest
    spec: TensorSpec

    def to_json(self) -> list[Json]:
        """`[digest, dtype, shape]`."""
        return [self.digest.hex, *self.spec.to_json()]

    @classmethod
    def from_json(cls, value: Json) -> TensorRef:
        """The inverse of `to_json`; raises ValueError for anything else."""
        match value:
            case [str(digest), str(dtype), [*shape]] if all(type(side) is int for side in shape):
                return cls(Digest(digest), TensorSpec(DType(dtype), tuple(shape)))  # type: ignore[arg-type]
        raise ValueError(f"not a tensor ref: {value!r}")
