"""One cache: its blobs and claims by name, in a bucket. What comes out is bounded, and believed by nobody yet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

from kittybuild.digest import Digest, canonical
from kittybuild.errors import RemoteError
from kittybuild.store.remote import names
from kittybuild.store.remote.bucket import Bucket, Listed, stream, whole
from kittybuild.store.remote.packed import OVERHEAD, packed, unpacked

FORMAT = 1
RAW, ZSTD, GROUPED = "raw", "zstd", "zstd-grouped"
_SUFFIXES = MappingProxyType(dict(zip((RAW, ZSTD, GROUPED), names.SUFFIXES, strict=True)))
_LARGEST_INFO = 4096


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
            most = nbytes if form == RAW else nbytes + nbytes // 64 + OVERHEAD
            parts = stream(self.bucket, names.blob(digest, _SUFFIXES[form]), most)
            if parts is not None:
                return parts if form == RAW else unpacked(parts, nbytes, grouped=form == GROUPED)
        return None

    def has(self, digest: Digest, nbytes: int) -> Listed | None:
        """The blob, if it seems to be there whole: an object of the right name, and of the right size if it is raw."""
        for form in self.forms:
            told = self.bucket.head(names.blob(digest, _SUFFIXES[form]))
            if told is not None and (form != RAW or told.size == nbytes):
                return told
        return None

    def put_blob(self, digest: Digest, data: memoryview, form: str, element: int = 1) -> int:
        """Put a blob, raw or grouped, whose bytes the caller verified; how many bytes were sent. `element`: the size of
        one of its elements."""
        sent = data if form == RAW else packed(data, element)
        self.bucket.put(names.blob(digest, _SUFFIXES[form]), sent)
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
        sound = form["kittybuild.cache"] == FORMAT and bool(form["blobs"]) and set(form["blobs"]) <= set(_SUFFIXES)
    except (TypeError, KeyError):
        sound = False
    if not sound:
        message = f"not a cache of format {FORMAT}: {names.INFO} says otherwise"
        raise RemoteError("KB807", message, at=bucket.where, hint="use a newer kittybuild, or another cache")
    return tuple(dict.fromkeys(form["blobs"]))
