"""Provenance that others can trust: a SLSA v1 statement (in-toto), signed as DSSE with an Ed25519 key, in one file.

It holds no time: equal folders, equal attestations. Subjects are the files by SHA-256 and the tensors by their root.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from kittybuild import __version__
from kittybuild.checkpoint.folder import read_json
from kittybuild.checkpoint.sources.cached import digests
from kittybuild.errors import BuildError, SourceError, VerifyError
from kittybuild.model.manifest import Manifest
from kittybuild.publish.folder import ATTESTATION, INDEX, PROVENANCE, index_json, shard_names
from kittybuild.publish.provenance import Provenance
from kittybuild.store.remote.keys import PublicKey, SigningKey
from kittybuild.store.store import Store

PAYLOAD = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:kittybuild:build:v1"
ROOT = "tensors"
ROOT_DIGEST = "kittybuild.merkle.v1"


def attestation(manifest: Manifest, texts: Mapping[str, bytes], store: Store, key: SigningKey) -> bytes:
    """The signed statement on the folder that `manifest` and `texts` will make."""
    told = json.loads(texts[PROVENANCE])
    payload = json.dumps(_statement(told, _files(manifest, texts, store), manifest, key), sort_keys=True).encode()
    signature = key.sign(_dsse(PAYLOAD, payload)).partition(":")[2]
    envelope = {
        "payloadType": PAYLOAD,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": key.name, "sig": signature}],
    }
    return (json.dumps(envelope, indent=1) + "\n").encode()


def attested(folder: str, said: Provenance, trusted: Sequence[PublicKey]) -> tuple[str, ...]:
    """The trusted keys that signed the attestation of a folder, by name; none where no key is trusted.

    Raises VerifyError KB604 where keys are trusted and none of them signed this very kittybuild.json and its root.
    """
    if not trusted:
        return ()
    path = os.path.join(folder, ATTESTATION)
    try:
        envelope = read_json(path)
        if envelope is None:
            raise VerifyError("KB604", f"there is no {ATTESTATION}", at=folder, hint="leave --trusted out, or get it")
        payload, signers = _opened(envelope, trusted)
        statement = json.loads(payload) if signers else {}
    except (SourceError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VerifyError("KB604", "the attestation is damaged", at=path, hint="get the file again") from error
    if not signers:
        names = ", ".join(key.name for key in trusted)
        hint = "trust only keys that you got from their owners"
        raise VerifyError("KB604", f"no trusted key ({names}) signed the attestation", at=path, hint=hint)
    if not _about(statement, folder, said):
        message = "the attestation is about another folder: its kittybuild.json or the root of its tensors differs"
        raise VerifyError("KB604", message, at=path, hint="get the folder and its attestation together")
    return signers


def trusted_keys(words: Sequence[str]) -> tuple[PublicKey, ...]:
    """The public keys that the words are, or that files of these names hold, one a line. Raises RemoteError KB804."""
    found = []
    for word in words:
        if os.path.isfile(word):
            with open(word, encoding="utf-8", errors="replace") as file:
                found += [PublicKey.parse(line) for line in file.read().splitlines() if line.strip()]
        else:
            found.append(PublicKey.parse(word))
    return tuple(found)


def _dsse(kind: str, payload: bytes) -> bytes:
    """What DSSE v1 signs: type and payload, each after its length."""
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)


def _opened(envelope: Mapping[str, Any], trusted: Sequence[PublicKey]) -> tuple[bytes, tuple[str, ...]]:
    payload = base64.b64decode(envelope["payload"], validate=True)
    signed = _dsse(PAYLOAD, payload)  # a statement of another type is none of ours
    signatures = [str(one["sig"]) for one in envelope["signatures"]]
    return payload, tuple(k.name for k in trusted if any(k.signed(signed, f"{k.name}:{one}") for one in signatures))


def _about(statement: Mapping[str, Any], folder: str, said: Provenance) -> bool:
    if (statement.get("_type"), statement.get("predicateType")) != (STATEMENT, PREDICATE):
        return False
    subjects = {one["name"]: one["digest"] for one in statement["subject"]}
    with open(os.path.join(folder, PROVENANCE), "rb") as file:
        told = hashlib.sha256(file.read()).hexdigest()
    return subjects.get(ROOT) == {ROOT_DIGEST: said.root.hex} and subjects.get(PROVENANCE) == {"sha256": told}


def _files(manifest: Manifest, texts: Mapping[str, bytes], store: Store) -> dict[str, str]:
    """The SHA-256 of every file of the folder."""
    found = {name: hashlib.sha256(data).hexdigest() for name, data in texts.items()}
    if len(manifest.shards) > 1:
        found[INDEX] = hashlib.sha256(index_json(manifest)).hexdigest()
    kept = [(file.name, store.file(file.digest)) for file in manifest.files if file.name not in texts]
    kept += zip(shard_names(manifest), [store.pack(shard.pack) for shard in manifest.shards], strict=True)
    for name, path in kept:
        if path is None:
            raise BuildError("KB506", f"the store has lost {name}", hint="build again")
        found[name] = digests(path)[0]
    return found


def _statement(
    told: Mapping[str, Any], files: Mapping[str, str], manifest: Manifest, key: SigningKey
) -> dict[str, Any]:
    subjects: list[dict[str, Any]] = [{"name": name, "digest": {"sha256": files[name]}} for name in sorted(files)]
    lock = told["lock"]
    definition = {
        "buildType": BUILD_TYPE,
        "externalParameters": {"recipe": told["recipe"], "stage": told["stage"]},
        "internalParameters": {"versions": lock["versions"]},
        "resolvedDependencies": [_dependency(name, pin) for name, pin in lock["sources"].items()],
    }
    details = {
        "builder": {"id": f"urn:kittybuild:key:{key.name}", "version": {"kittybuild": __version__}},
        "metadata": {"invocationId": manifest.digest.hex},
    }
    return {
        "_type": STATEMENT,
        "subject": [*subjects, {"name": ROOT, "digest": {ROOT_DIGEST: manifest.root.hex}}],
        "predicateType": PREDICATE,
        "predicate": {"buildDefinition": definition, "runDetails": details},
    }


def _dependency(name: str, pin: Mapping[str, Any]) -> dict[str, Any]:
    """A source of the lock as a resource descriptor: by the content that was read, and by commit where it has one."""
    digest = {"kittybuild.pin.v1": pin["content"]} if "content" in pin else {}
    if "commit" in pin:
        uri = f"pkg:huggingface/{pin['repository']}@{pin['commit']}"
        return {"name": name, "uri": uri, "digest": {**digest, "gitCommit": pin["commit"]}}
    if "package" in pin:
        return {"name": name, "uri": f"pkg:pypi/{pin['package']}@{pin['version']}", "digest": digest}
    return {"name": name, "digest": digest}
