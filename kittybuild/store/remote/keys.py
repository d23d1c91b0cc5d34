"""Ed25519 keys by name, written as Nix writes them: `name-1:base64`. The number is for a successor, should one leak.

A name is also the name of a file in a cache: letters, digits, `.`, `_` and `-` only.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kittybuild.errors import RemoteError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}-[0-9]{1,6}")
_HINT = "a key is `name-1:` and base64; `kittybuild cache keygen NAME` makes one"


@dataclass(frozen=True, slots=True)
class PublicKey:
    """Whom to believe: a name and 32 bytes."""

    name: str
    raw: bytes

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """The key written as `name-1:base64`. Raises RemoteError KB804."""
        name, raw = _parts(text, "KB804")
        if len(raw) != 32:
            raise RemoteError("KB804", f"not a public key: {text[:80]!r} has {len(raw)} bytes, not 32", hint=_HINT)
        return cls(name, raw)

    def signed(self, message: bytes, signature: str) -> bool:
        """Whether `signature` (`name-1:base64`) is this key's over `message`."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        name, _, text = signature.partition(":")
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(base64.b64decode(text, validate=True), message)
        except (InvalidSignature, binascii.Error, ValueError):
            return False
        return name == self.name

    def __str__(self) -> str:
        return f"{self.name}:{base64.b64encode(self.raw).decode()}"


@dataclass(frozen=True, slots=True)
class SigningKey:
    """Who claims something: a name and the 32 secret bytes."""

    name: str
    seed: bytes = field(repr=False)

    @classmethod
    def new(cls, name: str) -> SigningKey:
        """A key of that name, `-1` added where it has no number. Raises RemoteError KB804."""
        name = name if re.search(r"-[0-9]+$", name) else f"{name}-1"
        if not NAME.fullmatch(name):
            raise RemoteError("KB804", f"{name!r:.80} cannot name a key", hint="letters, digits, `.`, `_`, `-`: team-1")
        return cls(name, os.urandom(32))

    @classmethod
    def read(cls, path: str) -> SigningKey:
        """The key in a file that nobody else can read. Raises RemoteError KB803."""
        try:
            with open(path, "rb") as file:
                mode, text = os.fstat(file.fileno()).st_mode, file.read(1000).decode("ascii").strip()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "it is no text"
            raise RemoteError("KB803", f"cannot read the key: {why}", at=path, hint=_HINT) from error
        if stat.S_IMODE(mode) & 0o077:
            raise RemoteError("KB803", "others can read this key", at=path, hint=f"chmod 600 {path}")
        name, raw = _parts(text, "KB803", path)
        if len(raw) != 64:
            raise RemoteError("KB803", "not a signing key", at=path, hint=_HINT)
        return cls(name, raw[:32])

    def write(self, path: str) -> None:
        """Keep the key in a new file that nobody else can read. Raises RemoteError KB803."""
        text = f"{self.name}:{base64.b64encode(self.seed + self.public.raw).decode()}\n"
        try:
            os.makedirs(os.path.dirname(path) or ".", mode=0o700, exist_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
                file.write(text)
        except OSError as error:
            hint = "name another file, or another key: a leaked team-1 is followed by team-2"
            raise RemoteError("KB803", f"cannot write the key: {error.strerror}", at=path, hint=hint) from error

    @property
    def public(self) -> PublicKey:
        """The key that others trust."""
        return PublicKey(self.name, self._key().public_key().public_bytes_raw())

    def sign(self, message: bytes) -> str:
        """The signature over `message`, as `name-1:base64`."""
        return f"{self.name}:{base64.b64encode(self._key().sign(message)).decode()}"

    def _key(self) -> Ed25519PrivateKey:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.from_private_bytes(self.seed)


def _parts(text: str, code: str, at: str | None = None) -> tuple[str, bytes]:
    name, _, rest = text.strip().partition(":")
    try:
        raw = base64.b64decode(rest, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if not NAME.fullmatch(name) or not raw:
        shown = f": {text[:80]!r}" if code == "KB804" else ""  # the text of a secret is shown to nobody
        raise RemoteError(code, f"not a key{shown}", at=at, hint=_HINT)
    return name, raw
