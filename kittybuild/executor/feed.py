"""The bytes of one input on their way in, digested and checked in the same pass, while they are in cache."""

from __future__ import annotations

from typing import Protocol

from blake3 import blake3
from xxhash import xxh3_64

from kittybuild.checkpoint.reading import Reader
from kittybuild.digest import Digest
from kittybuild.errors import SourceError
from kittybuild.store.problems import DamagedTensor
from kittybuild.tensors import TensorRef


class Sink(Protocol):
    """Takes the bytes of one tensor."""

    def write(self, offset: int, data: memoryview) -> None:
        """The bytes from `offset` of the tensor on."""


class Feed:
    """One input: its bytes, and what is to be found out or checked while they pass.

    `ref` None: the content is unknown and digested in the first full pass. `xxh3`: what the bytes must give; `path` is
    of the store's file that they come from, which is checked even where no XXH3 is known.
    """

    def __init__(self, reader: Reader, ref: TensorRef | None, xxh3: str | None = None, path: str = "") -> None:
        self.reader, self.spec, self.path = reader, reader.spec, path
        self._ref, self._xxh3 = ref, xxh3
        self._digest = blake3() if ref is None or (path and xxh3 is None) else None
        self._check = xxh3_64() if xxh3 is not None else None

    def read(self, start: int, buffer: memoryview, *, last: bool) -> None:
        """Fill `buffer` from byte `start` on; `last`: this is the pass in which digests are taken."""
        try:
            self.reader.read_into(start, buffer)
        except SourceError as error:
            if not self.path:
                raise
            raise DamagedTensor(self.path, error.message) from error
        if last and self._digest is not None:
            self._digest.update(buffer)
        if last and self._check is not None:
            self._check.update(buffer)

    def ref(self) -> TensorRef:
        """The content, after a full pass. Raises DamagedTensor where the bytes are not what the store says."""
        found = self._ref
        if self._digest is not None:
            found, self._digest = TensorRef(Digest(self._digest.hexdigest()), self.spec), None
        other = self._check is not None and self._check.hexdigest() != self._xxh3
        if other or (self._ref is not None and self._ref != found):
            raise DamagedTensor(self.path, f"a tensor of {self.spec} has other bytes than when it was written")
        assert found is not None
        self._ref = found
        return found
