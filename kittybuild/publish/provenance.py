"""kittybuild.json read back, from strangers: what a folder says that it is. It agrees with itself, or is an error."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kittybuild.checkpoint.folder import read_json
from kittybuild.digest import Digest, canonical
from kittybuild.errors import SourceError, VerifyError
from kittybuild.model.made import Derivations, read_derivations
from kittybuild.model.manifest import Manifest
from kittybuild.publish.folder import INDEX, PROVENANCE, index_json, shard_names
from kittybuild.tensors import TensorRef

FORMAT = 2
README = "README.md"


@dataclass(frozen=True)
class Provenance:
    """What a folder says that it is. `digests`: of its small files by name."""

    stage: str
    dialect: str
    text: str
    numerics: str | None
    manifest: Manifest
    root: Digest
    digests: Mapping[str, Digest]
    listed: frozenset[str]
    lock: Mapping[str, Any]
    derivations: Derivations

    @property
    def tensors(self) -> dict[str, TensorRef]:
        """The tensors by name."""
        return {tensor.name: tensor.ref for tensor in self.manifest.tensors}

    @property
    def shards(self) -> dict[str, tuple[str, ...]]:
        """The names in each shard, by the shard's file."""
        names = shard_names(self.manifest)
        return {file: shard.names for file, shard in zip(names, self.manifest.shards, strict=True)}


def has_provenance(folder: str) -> bool:
    """Whether something that should be read stands there."""
    return os.path.isfile(os.path.join(folder, PROVENANCE))


def read_provenance(folder: str) -> Provenance:
    """What the kittybuild.json in a folder says. Raises VerifyError KB602 for none, or one that contradicts itself."""
    path = os.path.join(folder, PROVENANCE)
    try:
        found = read_json(path)
    except SourceError as error:
        raise _damaged(path, error.message) from error
    if found is None:
        hint = "only an output of kittybuild can be verified; `kittybuild reproduce` takes mergekit's, too"
        raise VerifyError("KB602", f"there is no {PROVENANCE}", at=folder, hint=hint)
    if found.get("format") != FORMAT:
        raise _damaged(path, f"it is of the format {found.get('format')!r:.20}, not {FORMAT}")
    try:
        return _parsed(found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, str(error)) from error


def _parsed(found: Mapping[str, Any]) -> Provenance:
    manifest, recipe = Manifest.from_bytes(canonical(found["manifest"])), found["recipe"]
    if manifest.digest.hex != found["manifest_digest"]:
        raise ValueError("its manifest is not the one that `manifest_digest` names")
    if manifest.root.hex != found["root"]:
        raise ValueError("its tensors are not those of `root`")
    placed = [name for shard in manifest.shards for name in shard.names]
    if sorted(placed) != sorted(tensor.name for tensor in manifest.tensors) or len(set(placed)) != len(placed):
        raise ValueError("its shards do not hold each tensor once")
    digests = {file.name: file.digest for file in manifest.files}
    if len(manifest.shards) > 1:
        digests[INDEX] = Digest.of(index_json(manifest))
    digests |= {name: Digest(text) for name, text in found["texts"].items()}
    listed = frozenset(found["files"])
    for name in (*digests, *listed):
        if name.startswith("/") or {"", ".", ".."} & set(name.split("/")) or "\\" in name or "\0" in name:
            raise ValueError(f"{name!r:.80} is no name of a file in its folder")
    texts = recipe["dialect"], recipe["text"], found["stage"]
    numerics = recipe["numerics"]
    if not all(isinstance(text, str) for text in (*texts, numerics or "")):
        raise ValueError("its recipe is no text")
    return Provenance(
        stage=found["stage"],
        dialect=recipe["dialect"],
        text=recipe["text"],
        numerics=numerics,
        manifest=manifest,
        root=manifest.root,
        digests=digests,
        listed=listed,
        lock=found["lock"],
        derivations=read_derivations(found["derivations"]),
    )


def _damaged(path: str, why: str) -> VerifyError:
    return VerifyError("KB602", f"{PROVENANCE} is damaged or was changed: {why}", at=path, hint="get the file again")
