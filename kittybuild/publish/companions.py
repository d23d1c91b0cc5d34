"""The files that travel with the weights: the donor's, byte for byte, but for a config.json that the merge changes, and
files that a stage puts in their place."""

from __future__ import annotations

import json
from contextlib import suppress

from kittybuild.checkpoint.reading import read_companion
from kittybuild.checkpoint.source import Checkpoint, Companion, FileId
from kittybuild.digest import tagged
from kittybuild.errors import SourceError
from kittybuild.model.manifest import ManifestFile
from kittybuild.model.plan import StagePlan
from kittybuild.planner.views import Sources
from kittybuild.store.store import Store


def companion_files(stage: StagePlan, sources: Sources, store: Store) -> tuple[ManifestFile, ...]:
    """The companion files of a stage, put into the store. Raises SourceError KB210 if one changed meanwhile."""
    if stage.donor is None:
        return ()
    donor = sources.checkpoints[stage.donor]
    found = []
    for companion in donor.companions:
        _unchanged(companion, donor, sources)
        if companion.name in stage.files:
            continue
        if companion.name == "config.json" and stage.config is not None and stage.config != donor.config:
            data = (json.dumps(stage.config, indent=2, ensure_ascii=False) + "\n").encode()
            found.append(ManifestFile(companion.name, store.put_file(data), len(data)))
        else:
            found.append(_taken_over(companion, store))
            _unchanged(companion, donor, sources)
    own = [(name, data) for name, data in stage.files.items() if data is not None]
    found += [ManifestFile(name, store.put_file(data), len(data)) for name, data in own]
    return tuple(sorted(found, key=lambda file: file.name)) if stage.files else tuple(found)


def _taken_over(companion: Companion, store: Store) -> ManifestFile:
    """A companion as it is. One that is made from a weights file is made once for each such file."""
    key = tagged("kittybuild.companion.v1", [FileId.of(companion.path).key().hex, companion.name])
    if companion.derived and (known := store.shortcut(key)) and (kept := store.read_file(known)) is not None:
        return ManifestFile(companion.name, known, len(kept))
    data = read_companion(companion)
    digest = store.put_file(data)
    if companion.derived:
        store.set_shortcut(key, digest)
    return ManifestFile(companion.name, digest, len(data))


def _unchanged(companion: Companion, donor: Checkpoint, sources: Sources) -> None:
    """The file is still the one that was there when the headers were read."""
    with suppress(OSError):
        found = sources.identity(companion.path)
        if found.content or found in donor.files:
            return
    hint = "build again when nothing writes to it"
    raise SourceError("KB210", "the file changed during the build", at=companion.path, hint=hint)
