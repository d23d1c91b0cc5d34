"""Ed25519 keys as text, `NAME:BASE64`: who signs what, and whether a signature is right. No files are touched here.

The secret is the 32-byte seed of RFC 8032; the public key has the same name.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from kittybuild.errors import UsageError

_NAME = re.compile(r"[\w.-]+", re.ASCII)
_LENGTH = 32


@dataclass(frozen=True, slots=True)
class PublicKey:
    """What a signature is checked with."""

    name: str
    raw: bytes

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """The key in a text; raises UsageError KB014."""
        return cls(*_parsed(text, "public"))

    def __str__(self) -> str:
        return f"{self.name}:{base64.b64encode(self.raw).decode()}"

    def verifies(self, signature: bytes, data: bytes) -> bool:
        """Whether the key's owner signed just this."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, data)
        except (InvalidSignature, ValueError):
            return False
        return True


@dataclass(frozen=True, slots=True)
class SecretKey:
    """What signs. Its text is a secret: it is in no message and no representation."""

    name: str
    seed: bytes = field(repr=False)

    @classmethod
    def generate(cls, name: str, random: Callable[[int], bytes]) -> SecretKey:
        """A new key; `random` gives as many secret bytes as it is asked for. Raises UsageError KB014 for the name."""
        if not _NAME.fullmatch(name):
            raise UsageError("KB014", f"{name!r:.80} cannot be the name of a key", hint="as in `team-1`")
        return cls(name, random(_LENGTH))

    @classmethod
    def parse(cls, text: str) -> SecretKey:
        """The key in a text; raises UsageError KB014."""
        return cls(*_parsed(text, "secret"))

    def text(self) -> str:
        """The secret itself, for the file that keeps it."""
        return f"{self.name}:{base64.b64encode(self.seed).decode()}"

    def sign(self, data: bytes) -> bytes:
        """The signature, 64 bytes; the same for the same data."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.from_private_bytes(self.seed).sign(data)

    @property
    def public(self) -> PublicKey:
        """The key that others check with."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return PublicKey(self.name, Ed25519PrivateKey.from_private_bytes(self.seed).public_key().public_bytes_raw())


def _parsed(text: str, kind: str) -> tuple[str, bytes]:
    name, _, encoded = text.strip().partition(":")
    try:
        raw = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if not _NAME.fullmatch(name) or len(raw) != _LENGTH:
        raise UsageError("KB014", f"not a {kind} key", hint="a key is NAME:BASE64 of 32 bytes, as in `team-1:...`")
    return name, raw
