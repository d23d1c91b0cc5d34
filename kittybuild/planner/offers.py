"""What remote caches offer to one build: claims of what its derivations make, and whether to fetch or to make.

Asked once for each derivation. A tensor is offered when a trusted key claims that it is what a derivation makes; that
its bytes are there is hoped, and a disappointment is a miss.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from blake3 import blake3

from kittybuild.digest import Digest
from kittybuild.tensors import TensorRef, TensorSpec

if TYPE_CHECKING:
    from kittybuild.store.remote.substituters import Claimed, Substituters, Write

AUTO, ALWAYS, NEVER = "auto", "always", "never"
MODES = (AUTO, ALWAYS, NEVER)
RATE = 200_000_000
"""Bytes of inputs and output that a worker gets through in a second, where no signer says how long it took."""


@dataclass
class Offers:
    """The offers of one build. `audit`: the share of what is offered that is made here all the same and compared.

    `seed`: chooses which; whoever knows it knows where lies are not found. Any thread may use it.
    """

    caches: Substituters
    mode: str = AUTO
    audit: float = 0.0
    seed: bytes = b""
    claimed: dict[Digest, Claimed] = field(default_factory=dict)
    _asked: set[Digest] = field(default_factory=set)
    _offered: dict[Digest, int | None] = field(default_factory=dict)
    _lost: set[Digest] = field(default_factory=set)

    def ask(self, wanted: Mapping[Digest, TensorSpec], stage: Collection[Digest] | None) -> dict[Digest, Claimed]:
        """What is claimed of these derivations; only what was not asked before. `stage`: see Substituters."""
        new = {key: spec for key, spec in wanted.items() if key not in self._asked}
        if not new:
            return {}
        self._asked |= set(new)
        found = self.caches.realisations(new, stage)
        self.claimed |= found
        for claimed in found.values():
            self._offered[claimed.ref.digest] = claimed.ms
        return found

    def add(self, digests: Collection[Digest]) -> None:
        """Hope for blobs that no derivation makes: tensors of sources that are not here."""
        for digest in digests:
            self._offered.setdefault(digest, None)

    def worth(self, ref: TensorRef, inputs: int, *, here: bool) -> bool:
        """Whether a tensor is to be fetched. `inputs`: the bytes that making it reads; `here`: on this machine."""
        if ref.digest not in self._offered or ref.digest in self._lost:
            return False
        fetching = self.caches.seconds(ref.spec.nbytes)
        if self.mode == ALWAYS or not here or fetching is None:
            return True
        ms = self._offered[ref.digest]
        return fetching <= (ms / 1000 if ms is not None else (inputs + ref.spec.nbytes) / RATE)

    def fetch(self, ref: TensorRef, write: Write) -> str | None:
        """Bring a tensor; its XXH3-64. None: nobody has it, and it is not offered any more."""
        xxh3 = self.caches.fetch(ref.digest, ref.spec.nbytes, write)
        if xxh3 is None:
            self._lost.add(ref.digest)
        return xxh3

    def audits(self, key: Digest) -> bool:
        """Whether what is claimed of this derivation is to be checked by making it."""
        drawn = int.from_bytes(blake3(b"kittybuild.audit.v1\0" + self.seed + bytes.fromhex(key.hex)).digest(8), "big")
        return key in self.claimed and drawn < self.audit * 2**64
