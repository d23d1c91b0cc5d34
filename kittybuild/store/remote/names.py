"""Where everything in a cache lies. Names are made of digests and names of keys only, so that none leads elsewhere."""

from __future__ import annotations

import re

from kittybuild.digest import Digest, tagged
from kittybuild.store.remote.keys import NAME

INFO = "kittybuild-cache.json"
CAS, TRACES, STAGES, SOURCES, ROOTS = "cas", "traces", "stages", "sources", "roots"
KINDS = (TRACES, STAGES, SOURCES)
SUFFIXES = ("", ".zst", ".bg.zst")
"""Of blobs: raw, as zstd, and as zstd with the bytes of their elements grouped."""
_OURS = re.compile(
    rf"{CAS}/[0-9a-f]{{2}}/[0-9a-f]{{64}}(\.bg)?(\.zst)?|({'|'.join(KINDS)})/[0-9a-f]{{64}}/{NAME.pattern}\.json"
)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def blob(digest: Digest, suffix: str = "") -> str:
    """The name of a blob in one of its forms."""
    return f"{CAS}/{digest.hex[:2]}/{digest.hex}{suffix}"


def blobs(digest: Digest) -> tuple[str, ...]:
    """The names of a blob in all its forms."""
    return tuple(blob(digest, suffix) for suffix in SUFFIXES)


def claims(kind: str, about: str) -> str:
    """The folder with what each signer claims about a key or a file."""
    if kind not in KINDS or not _SHA256.fullmatch(about):
        raise ValueError(f"nobody claims {kind} about {about!r:.80}")
    return f"{kind}/{about}"


def claim(kind: str, about: str, signer: str) -> str:
    """The name of what `signer` claims about a key or a file."""
    if not NAME.fullmatch(signer):
        raise ValueError(f"not the name of a key: {signer!r:.80}")
    return f"{claims(kind, about)}/{signer}.json"


def root(name: str, signer: str) -> str:
    """The name of what `signer` keeps under a name."""
    if not NAME.fullmatch(signer):
        raise ValueError(f"not the name of a key: {signer!r:.80}")
    return f"{ROOTS}/{tagged('kittybuild.remote-root.v1', name).hex}/{signer}.json"


def is_ours(name: str) -> bool:
    """Whether an object of a bucket is a blob or a claim; all else in it is not ours to delete."""
    return _OURS.fullmatch(name) is not None
