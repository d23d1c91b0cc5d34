"""Two checkpoints compared tensor by tensor: the same bytes, or how far apart, in units in the last place.

The distance of two numbers is how many representable ones lie between them, plus one; plus and minus zero are at one
place. NaN is nowhere: two tensors of which only one has it at a place are infinitely far apart there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from kittybuild.checkpoint.reading import Files
from kittybuild.checkpoint.source import Entry
from kittybuild.digest import Digest, Json
from kittybuild.publish.verify import CHUNK, digest_of
from kittybuild.tensors import DType

if TYPE_CHECKING:
    import numpy as np

IDENTICAL, CLOSE, DIFFERENT = "identical", "close", "different"
ONLY_PUBLISHED, ONLY_REBUILT, OTHER_DTYPE, OTHER_SHAPE = "only published", "only rebuilt", "other dtype", "other shape"

_INFINITY: Mapping[DType, int] = MappingProxyType(
    {
        DType.F64: 0x7FF0_0000_0000_0000,
        DType.F32: 0x7F80_0000,
        DType.F16: 0x7C00,
        DType.BF16: 0x7F80,
        DType.F8_E5M2: 0x7C,
        DType.F8_E4M3: 0x7E,  # the largest number: it has no infinity
    }
)
"""The bits of the last value that is not NaN."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One tensor. `ulps`: the largest distance, None where there is none; `elements` differ `of` all."""

    name: str
    how: str
    ulps: int | None = None
    elements: int = 0
    of: int = 0
    said: str = ""

    def to_json(self) -> dict[str, Json]:
        """As `reproduce --json` prints it."""
        return {"tensor": self.name, "how": self.how, "ulps": self.ulps, "elements": self.elements, "of": self.of}

    def __str__(self) -> str:
        if self.how == CLOSE:
            return f"{self.name}: {self.elements} of {self.of} elements differ, by {self.ulps} ulp at most"
        if self.how == DIFFERENT:
            return f"{self.name}: {self.elements} of {self.of} elements differ"
        return f"{self.name}: {self.how}{self.said}"


def compare(
    published: Mapping[str, Entry], made: Mapping[str, Entry], digests: Mapping[str, Digest]
) -> Iterator[tuple[Compared, Digest | None]]:
    """Every tensor of both, in the order of the names, with the digest of the published one. Raises SourceError.

    `digests`: those of the tensors that were made.
    """
    with Files() as files:
        for name in sorted({*published, *made}):
            if name not in made:
                yield Compared(name, ONLY_PUBLISHED), digest_of(published[name], files)
            elif name not in published:
                yield Compared(name, ONLY_REBUILT), None
            else:
                digest = digest_of(published[name], files)
                yield _compared(name, published[name], made[name], digest == digests[name], files), digest


def _compared(name: str, one: Entry, two: Entry, same: bool, files: Files) -> Compared:
    if one.spec.shape != two.spec.shape:
        return Compared(name, OTHER_SHAPE, said=f": {list(one.spec.shape)}, rebuilt {list(two.spec.shape)}")
    if one.spec.dtype is not two.spec.dtype:
        return Compared(name, OTHER_DTYPE, said=f": {one.spec.dtype.value}, rebuilt {two.spec.dtype.value}")
    if same:
        return Compared(name, IDENTICAL, 0, 0, one.spec.numel)
    ulps: int | None = 0
    elements = 0
    for left, right in _blocks(one, two, files):
        elements += int((left != right).sum())
        here = distance(left, right, one.spec.dtype)
        ulps = None if ulps is None or here is None else max(ulps, here)
    return Compared(name, DIFFERENT if ulps is None else CLOSE, ulps, elements, one.spec.numel)


def _blocks(one: Entry, two: Entry, files: Files) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The bits of both, block by block."""
    import numpy as np

    readers = files.reader(one), files.reader(two)
    size = one.spec.dtype.size
    for start in range(0, one.spec.nbytes, CHUNK):
        pair = []
        for reader in readers:
            buffer = bytearray(min(CHUNK, one.spec.nbytes - start))
            reader.read_into(start, memoryview(buffer))
            pair.append(np.frombuffer(buffer, f"<u{size}"))
        yield pair[0], pair[1]


def distance(left: np.ndarray, right: np.ndarray, dtype: DType) -> int | None:
    """The largest distance between elements, given by their bits; None for integers that differ, and for NaN."""
    import numpy as np

    differ = left != right
    if not differ.any():
        return 0
    if dtype not in _INFINITY:
        return None
    places = []
    for bits in (left[differ], right[differ]):
        sign = np.uint64(1) << np.uint64(8 * dtype.size - 1)
        wide = bits.astype(np.uint64)
        size = (wide & (sign - np.uint64(1))).astype(np.int64)
        if (size > _INFINITY[dtype]).any():
            return None
        places.append(np.where(wide & sign, -size, size))
    low, high = np.minimum(*places), np.maximum(*places)
    return int((high.view(np.uint64) - low.view(np.uint64)).max())  # modulo 2^64: right for float64, too
