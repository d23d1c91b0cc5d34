"""The files that travel with the weights: the donor's, byte for byte, but for those that the merge changes."""

from __future__ import annotations

import json

from kittybuild.checkpoint.source import Checkpoint, Companion, FileId
from kittybuild.digest import tagged
from kittybuild.model.manifest import ManifestFile
from kittybuild.model.plan import StagePlan
from kittybuild.planner.files import check_unchanged, read_unchanged
from kittybuild.planner.views import Sources
from kittybuild.store.store import Store


def companion_files(stage: StagePlan, sources: Sources, store: Store) -> tuple[ManifestFile, ...]:
    """The companion files of a stage, put into the store. Raises SourceError KB210 if one changed meanwhile."""
    donor = sources.checkpoints[stage.donor] if stage.donor else None
    found = {name: _made(name, data, store) for name, data in stage.files.items() if data is not None}
    for companion in donor.companions if donor else ():
        if companion.name in stage.files:
            continue
        if donor and companion.name == "config.json" and stage.config is not None and stage.config != donor.config:
            check_unchanged(companion, donor, sources)
            data = (json.dumps(stage.config, indent=2, ensure_ascii=False) + "\n").encode()
            found[companion.name] = _made(companion.name, data, store)
        elif donor:
            found[companion.name] = _taken_over(companion, donor, sources, store)
    return tuple(found[name] for name in sorted(found))


def _made(name: str, data: bytes, store: Store) -> ManifestFile:
    return ManifestFile(name, store.put_file(data), len(data))


def _taken_over(companion: Companion, donor: Checkpoint, sources: Sources, store: Store) -> ManifestFile:
    """A companion as it is. One that is made from a weights file is made once for each such file."""
    check_unchanged(companion, donor, sources)
    key = tagged("kittybuild.companion.v1", [FileId.of(companion.path).key().hex, companion.name])
    if companion.derived and (known := store.shortcut(key)) and (kept := store.read_file(known)) is not None:
        return ManifestFile(companion.name, known, len(kept))
    file = _made(companion.name, read_unchanged(companion, donor, sources), store)
    if companion.derived:
        store.set_shortcut(key, file.digest)
    return file
