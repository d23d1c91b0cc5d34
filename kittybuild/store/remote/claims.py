"""What a signer claims: outputs of derivations, one or a whole stage, and the tensors of a source file.

The signature is over a domain tag and the canonical JSON of the whole claim, its subject included: a claim that is
altered, or repeated about another subject, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kittybuild.digest import Digest, Json, canonical, tagged
from kittybuild.store.remote.keys import PublicKey, SigningKey
from kittybuild.store.remote.names import SOURCES, STAGES, TRACES
from kittybuild.tensors import TensorRef

LARGEST_CLAIM = 64 << 20
LARGEST_TRACE = 4096


class Refused(Exception):
    """A claim that is not believed; the text says why."""


@dataclass(frozen=True, slots=True)
class Output:
    """A derivation's key makes `ref`; its signer took `ms` milliseconds for it, or does not say."""

    key: Digest
    ref: TensorRef
    ms: int | None = None

    def to_json(self) -> list[Json]:
        """`[key, digest, dtype, shape, ms]`."""
        return [self.key.hex, *self.ref.to_json(), self.ms]

    @classmethod
    def from_json(cls, value: Any) -> Output:
        """The inverse of `to_json`; raises ValueError for anything else."""
        match value:
            case [str(key), *ref, int() | None as ms] if ms is None or ms >= 0:
                return cls(Digest(key), TensorRef.from_json(ref), ms)
        raise ValueError(f"not an output: {value!r:.80}")


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """What is in a file of `size` bytes. `whole`: the digest of all of it, if the cache has it as a blob.

    `header`: digest and size of its first bytes, enough to read its header. `tensors`: their digests, by the names
    that memos of pinned files have for them.
    """

    size: int
    whole: Digest | None
    header: tuple[Digest, int] | None
    tensors: Mapping[str, Digest]

    def to_json(self) -> dict[str, Json]:
        """The claim's own part."""
        return {
            "size": self.size,
            "whole": self.whole.hex if self.whole else None,
            "header": [self.header[0].hex, self.header[1]] if self.header else None,
            "tensors": {name: digest.hex for name, digest in self.tensors.items()},
        }

    @classmethod
    def from_json(cls, form: Any) -> SourceFacts:
        """The inverse of `to_json`; raises ValueError for anything else."""
        match form:
            case {"size": int(size), "whole": str() | None as blob, "header": header, "tensors": dict(tensors)}:
                head = None
                if header is not None:
                    digest, nbytes = header
                    if type(nbytes) is not int or not 0 <= nbytes <= size:
                        raise ValueError("a header that is longer than its file")
                    head = Digest(str(digest)), nbytes
                found = {str(name): Digest(str(digest)) for name, digest in tensors.items()}
                return cls(size, Digest(blob) if blob else None, head, found)
        raise ValueError("not what is known of a file")


def stage_key(keys: Iterable[Digest]) -> Digest:
    """The subject of a claim about a whole stage: the keys of its derivations, in its order."""
    return tagged("kittybuild.remote-stage.v1", [key.hex for key in keys])


def outputs_claim(kind: str, about: Digest, outputs: Iterable[Output], key: SigningKey) -> bytes:
    """A signed claim about a derivation (TRACES) or a stage (STAGES)."""
    return _signed(kind, about.hex, {"outputs": [output.to_json() for output in outputs]}, key)


def source_claim(sha256: str, facts: SourceFacts, key: SigningKey) -> bytes:
    """A signed claim about a source file."""
    return _signed(SOURCES, sha256, facts.to_json(), key)


def outputs_of(kind: str, about: Digest, data: bytes, key: PublicKey) -> tuple[Output, ...]:
    """What `key` claims about a derivation or a stage. Raises Refused."""
    form = _opened(kind, about.hex, data, key)
    try:
        found = tuple(Output.from_json(value) for value in form["outputs"])
    except (KeyError, TypeError, ValueError) as error:
        raise Refused("signed, but it makes no sense") from error
    right = [about] if kind == TRACES else None
    if (right and [output.key for output in found] != right) or (
        kind == STAGES and stage_key(output.key for output in found) != about
    ):
        raise Refused("it is about other derivations")
    return found


def source_of(sha256: str, data: bytes, key: PublicKey) -> SourceFacts:
    """What `key` claims about a source file. Raises Refused."""
    try:
        return SourceFacts.from_json(_opened(SOURCES, sha256, data, key))
    except (TypeError, ValueError) as error:
        raise Refused("signed, but it makes no sense") from error


def signer_of(data: bytes) -> str:
    """Who says that he signed it, for messages only."""
    try:
        return str(json.loads(data)["signer"])[:100]
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""


def _message(kind: str, form: Mapping[str, Json]) -> bytes:
    return f"kittybuild.claim.{kind}.v1".encode() + b"\0" + canonical(form)


def _signed(kind: str, about: str, body: Mapping[str, Json], key: SigningKey) -> bytes:
    form: dict[str, Json] = {"kittybuild.claim": 1, "about": about, "signer": key.name, **body}
    return canonical({**form, "signature": key.sign(_message(kind, form))})


def _opened(kind: str, about: str, data: bytes, key: PublicKey) -> dict[str, Any]:
    """The form of a claim that `key` made about just this. Raises Refused."""
    try:
        form = json.loads(data)
        signature = form.pop("signature")
        message = _message(kind, form)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Refused("not a claim") from error
    if form.get("signer") != key.name:
        raise Refused(f"signed by {str(form.get('signer'))[:100]!r}, which is not the key that is trusted")
    if not isinstance(signature, str) or not key.signed(message, signature):
        raise Refused("its signature is wrong")
    if form.get("kittybuild.claim") != 1 or form.get("about") != about:
        raise Refused("it is about something else")
    return dict(form)
