"""Where everything in a cache lies. Names are made of digests and names of keys only, so that none leads elsewhere."""

from __future__ import annotations

import re

from kittybuild.digest import Digest
from kittybuild.store.remote.keys import NAME

INFO = "kittybuild-cache.json"
CAS, TRACES, STAGES, SOURCES, ROOTS = "cas", "traces", "stages", "sources", "roots"
KINDS = (TRACES, STAGES, SOURCES)
ZSTD = ".zst"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def blob(digest: Digest, *, zstd: bool = False) -> str:
    """The name of a blob; `zstd`: of its compressed form."""
    return f"{CAS}/{digest.hex[:2]}/{digest.hex}{ZSTD if zstd else ''}"


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
