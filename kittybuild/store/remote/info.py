"""What a cache holds, in numbers, from its listing: nothing is read but names and sizes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from kittybuild.errors import RemoteError
from kittybuild.store.remote import names
from kittybuild.store.remote.bucket import Bucket, Unreachable


@dataclass(frozen=True)
class CacheInfo:
    """Blobs, their bytes as they are stored, and how many claims there are of each kind and signer."""

    blobs: int
    bytes: int
    claims: dict[str, int]
    signers: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """As `cache info --json` prints it."""
        return {"blobs": self.blobs, "bytes": self.bytes, **self.claims, "signers": self.signers}


def cache_info(bucket: Bucket) -> CacheInfo:
    """Count what is in a cache. Raises RemoteError KB802."""
    try:
        sizes = [blob.size for blob in bucket.list(names.CAS)]
        signers: Counter[str] = Counter()
        claims = {}
        for kind in names.KINDS:
            listed = [claim.name for claim in bucket.list(kind)]
            claims[kind] = len(listed)
            signers.update(name.rpartition("/")[2].removesuffix(".json") for name in listed)
    except Unreachable as error:
        hint = "check address, rights and connection"
        raise RemoteError("KB802", f"cannot list this cache: {error}", at=bucket.where, hint=hint) from error
    return CacheInfo(len(sizes), sum(sizes), claims, dict(sorted(signers.items())))
