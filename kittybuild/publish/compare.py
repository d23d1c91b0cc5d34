"""Two checkpoints compared tensor by tensor: the same bytes, or how far apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kittybuild.checkpoint.reading import Files
from kittybuild.checkpoint.source import RAW, Entry
from kittybuild.digest import Digest
from kittybuild.publish.measure import SAME, Measures, Measuring
from kittybuild.publish.verify import digest_of

IDENTICAL, CLOSE, DIFFERENT = "identical", "close", "different"
OTHER_DTYPE, OTHER_SHAPE = "other dtype", "other shape"
NAMES = ("published", "rebuilt")

BLOCK = 1 << 18
LEAST_BLOCK = 1 << 12
HELD = 128
"""Bytes that are held for each element of a block, at most: bits and numbers of both sides, and what is computed."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One tensor. `ulps`: the largest distance, None where there is none; `elements` differ `of` all. `measures`: None
    where the shapes differ, or one side has it not."""

    name: str
    how: str
    ulps: int | None = None
    elements: int = 0
    of: int = 0
    said: str = ""
    measures: Measures | None = None

    def to_json(self) -> dict[str, str | float | int | None]:
        """As `reproduce --json` and `diff --json` print it."""
        form = {"tensor": self.name, "how": self.how, "ulps": self.ulps, "elements": self.elements, "of": self.of}
        return {**form, **(self.measures or Measures(None, None, None)).to_json()}

    def within(self, ulps: int | None) -> bool:
        """Whether it is the same, or so few units in the last place apart."""
        return self.how == IDENTICAL or (self.how == CLOSE and ulps is not None and (self.ulps or 0) <= ulps)

    def __str__(self) -> str:
        if self.how == CLOSE:
            return f"{self.name}: {self.elements} of {self.of} elements differ, by {self.ulps} ulp at most"
        if self.how == DIFFERENT:
            return f"{self.name}: {self.elements} of {self.of} elements differ"
        return f"{self.name}: {self.how}{self.said}"


def only(side: str) -> str:
    """The word for a tensor that one side alone has."""
    return f"only {side}"


def compare(
    published: Mapping[str, Entry], made: Mapping[str, Entry], digests: Mapping[str, Digest]
) -> Iterator[tuple[Compared, Digest | None]]:
    """Every tensor of both, in the order of the names, with the digest of the published one. Raises SourceError.

    `digests`: those of the tensors that were made; where they are equal, nothing is compared.
    """
    with Files() as files:
        for name in sorted({*published, *made}):
            digest = digest_of(published[name], files) if name in published else None
            if digest is not None and digest == digests.get(name) and published[name].spec == made[name].spec:
                yield Compared(name, IDENTICAL, 0, 0, made[name].spec.numel, measures=SAME), digest
            else:
                yield _compared(name, published.get(name), made.get(name), NAMES, BLOCK, files), digest


def compare_all(
    one: Mapping[str, Entry], two: Mapping[str, Entry], names: tuple[str, str], *, memory: int, jobs: int
) -> tuple[Compared, ...]:
    """Every tensor of both, in the order of the first and then of the second. Raises SourceError.

    `names`: what the sides are called; `memory`: bytes for the blocks of all `jobs` together.
    """
    block = max(LEAST_BLOCK, min(BLOCK, memory // jobs // HELD))
    with Files() as files, ThreadPoolExecutor(jobs) as threads:
        tensors = list(dict.fromkeys((*one, *two)))
        return tuple(
            threads.map(lambda name: _compared(name, one.get(name), two.get(name), names, block, files), tensors)
        )


def _compared(
    name: str, one: Entry | None, two: Entry | None, names: tuple[str, str], block: int, files: Files
) -> Compared:
    if one is None or two is None:
        return Compared(name, only(names[0] if one else names[1]))
    if one.spec.shape != two.spec.shape:
        said = f": {list(one.spec.shape)}, {names[1]} {list(two.spec.shape)}"
        return Compared(name, OTHER_SHAPE, said=said)
    if one.spec.dtype is two.spec.dtype and _equal(one, two, block, files):
        return Compared(name, IDENTICAL, 0, 0, one.spec.numel, measures=SAME)
    measuring = Measuring(one.spec.dtype, two.spec.dtype)
    for pair in _blocks(one, two, block, files):
        measuring.add(*pair)
    elements, ulps, found = measuring.elements, measuring.ulps, measuring.done()
    if one.spec.dtype is not two.spec.dtype:
        said = f": {one.spec.dtype.value}, {names[1]} {two.spec.dtype.value}"
        return Compared(name, OTHER_DTYPE, None, elements, one.spec.numel, said, found)
    return Compared(name, DIFFERENT if ulps is None else CLOSE, ulps, elements, one.spec.numel, measures=found)


def _equal(one: Entry, two: Entry, block: int, files: Files) -> bool:
    """Whether the bytes are the same: at one place of one file, as shards of unchanged outputs are, or read."""
    in_place = one.encoding == two.encoding == RAW and one.offset == two.offset and files.same(one.file, two.file)
    return in_place or all(left == right for left, right in _blocks(one, two, block, files))


def _blocks(one: Entry, two: Entry, block: int, files: Files) -> Iterator[tuple[bytearray, bytearray]]:
    """The bytes of both, as many elements at a time."""
    readers = files.reader(one), files.reader(two)
    for start in range(0, one.spec.numel, block):
        count = min(block, one.spec.numel - start)
        pair = []
        for reader in readers:
            size = reader.spec.dtype.size
            buffer = bytearray(count * size)
            reader.read_into(start * size, memoryview(buffer))
            pair.append(buffer)
        yield pair[0], pair[1]
