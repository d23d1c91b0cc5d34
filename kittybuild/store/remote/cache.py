"""One cache: its blobs and claims by name, in a bucket. What comes out is bounded, and believed by nobody yet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from kittybuild.digest import Digest, canonical
from kittybuild.errors import RemoteError
from kittybuild.store.remote import names
from kittybuild.store.remote.bucket import Bucket, Unreachable, stream, whole

FORMAT = 1
RAW, ZSTD = "raw", "zstd"
_LARGEST_INFO = 4096
_LEVEL = 3
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Cache:
    """The cache in a bucket. `forms`: in which forms its blobs lie, the likelier one first."""

    bucket: Bucket
    forms: tuple[str, ...] = (RAW,)

    @classmethod
    def open(cls, bucket: Bucket) -> Cache:
        """The cache, as it tells about itself. Raises Unreachable, and RemoteError KB807 for another format."""
        return cls(bucket, _told(bucket) or (RAW,))

    @property
    def where(self) -> str:
        """Its address, for messages."""
        return self.bucket.where

    def tell(self, form: str) -> Cache:
        """The cache, which tells from now on that it has blobs in that form too."""
        told = _told(self.bucket)
        forms = (form, *(other for other in told or () if other != form))
        if forms != told:
            self.bucket.put(names.INFO, memoryview(canonical({"kittybuild.cache": FORMAT, "blobs": list(forms)})))
        return Cache(self.bucket, forms)

    def blob(self, digest: Digest, nbytes: int) -> Iterator[memoryview] | None:
        """The bytes of a blob as they come, never more than `nbytes`, not verified. Raises Unreachable."""
        for form in self.forms:
            most = nbytes if form == RAW else nbytes + nbytes // 64 + 1024
            parts = stream(self.bucket, names.blob(digest, zstd=form == ZSTD), most)
            if parts is not None:
                return parts if form == RAW else _unpacked(parts, nbytes)
        return None

    def has(self, digest: Digest, nbytes: int) -> bool:
        """Whether it seems to have a whole blob: an object of the right name, and of the right size if it is raw."""
        for form in self.forms:
            size = self.bucket.head(names.blob(digest, zstd=form == ZSTD))
            if size is not None and (form == ZSTD or size == nbytes):
                return True
        return False

    def put_blob(self, digest: Digest, data: memoryview, form: str) -> int:
        """Put a blob, whose bytes the caller verified; how many bytes were sent."""
        sent = data if form == RAW else _packed(data)
        self.bucket.put(names.blob(digest, zstd=form == ZSTD), sent)
        return len(sent)

    def claim(self, kind: str, about: str, signer: str, most: int) -> bytes | None:
        """What a signer claims, not verified. Raises Unreachable."""
        return whole(self.bucket, names.claim(kind, about, signer), most)

    def put_claim(self, kind: str, about: str, signer: str, data: bytes) -> None:
        """Put a claim, instead of the one that this signer made before."""
        self.bucket.put(names.claim(kind, about, signer), memoryview(data))


def _told(bucket: Bucket) -> tuple[str, ...] | None:
    """The forms that a cache tells; None where it tells nothing, or what it was to tell was cut short."""
    data = whole(bucket, names.INFO, _LARGEST_INFO)
    try:
        form = json.loads(data or b"")
    except (ValueError, RecursionError):
        return None
    try:
        known, forms = form["kittybuild.cache"], tuple(form["blobs"])
    except (TypeError, KeyError):
        known, forms = None, ()
    if known != FORMAT or not forms or not set(forms) <= {RAW, ZSTD} or len(forms) > 2:
        message = f"not a cache of format {FORMAT}: {names.INFO} says otherwise"
        raise RemoteError("KB807", message, at=bucket.where, hint="use a newer kittybuild, or another cache")
    return forms


def _packed(data: memoryview) -> memoryview:
    import zstandard

    return memoryview(zstandard.ZstdCompressor(level=_LEVEL).compress(data))


def _unpacked(parts: Iterator[memoryview], nbytes: int) -> Iterator[memoryview]:
    """The bytes behind a zstd frame, in bounded pieces; what would be too many is cut."""
    import zstandard

    # A window larger than the contents is only asked for by those who want our memory.
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    left = nbytes
    try:
        reader = decompressor.stream_reader(_File(parts))  # type: ignore[arg-type]  # it only reads
        while piece := reader.read(min(_CHUNK, left + 1)):
            left -= len(piece)
            if left < 0:
                raise Unreachable("a compressed blob holds more than it should")
            yield memoryview(piece)
    except zstandard.ZstdError as error:
        raise Unreachable(f"a compressed blob is damaged: {error}") from error


class _File:
    """Parts as a file to read from."""

    def __init__(self, parts: Iterator[memoryview]) -> None:
        self._parts, self._rest = parts, memoryview(b"")

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        if not self._rest:
            self._rest = next(self._parts, memoryview(b""))
        piece, self._rest = self._rest[:size], self._rest[size:]
        return bytes(piece)
