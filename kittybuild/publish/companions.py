"""The files that travel with the weights: the donor's, byte for byte, but for those that the merge changes."""

from __future__ import annotations

import json
from collections.abc import Iterator

from kittybuild.checkpoint.source import Checkpoint, Companion, FileId
from kittybuild.digest import Digest, tagged
from kittybuild.model.manifest import Manifest, ManifestFile
from kittybuild.model.plan import StagePlan
from kittybuild.planner.files import check_unchanged, read_unchanged
from kittybuild.planner.views import Sources
from kittybuild.publish.extraction import REPORT
from kittybuild.store.store import Store


def companion_files(stage: StagePlan, sources: Sources, store: Store) -> tuple[ManifestFile, ...]:
    """The companion files of a stage, put into the store. Raises SourceError KB210 if one changed meanwhile."""
    found = {
        name: _made(name, data, store) if isinstance(data, bytes) else _taken_over(*data, sources, store)
        for name, data in _companions(stage, sources)
    }
    return tuple(found[name] for name in sorted(found))


def other_companions(stage: StagePlan, sources: Sources, manifest: Manifest, store: Store | None) -> tuple[str, ...]:
    """The names of companion files that a manifest has otherwise, or has not, or has alone. Puts nothing anywhere."""
    before = {file.name: file.digest for file in manifest.files if file.name != REPORT}
    now = {}
    for name, data in _companions(stage, sources):
        if isinstance(data, bytes):
            now[name] = Digest.of(data)
        else:
            known = store.shortcut(_made_name(data[0])) if store and data[0].derived else None
            now[name] = known or Digest.of(read_unchanged(*data, sources))
    return tuple(name for name in sorted({*before, *now}) if before.get(name) != now.get(name))


def _companions(stage: StagePlan, sources: Sources) -> Iterator[tuple[str, bytes | tuple[Companion, Checkpoint]]]:
    """The companion files of a stage by name: bytes that the plan has, or files of the donor as they are."""
    donor = sources.checkpoints[stage.donor] if stage.donor else None
    yield from ((name, data) for name, data in stage.files.items() if data is not None)
    for companion in donor.companions if donor else ():
        if companion.name in stage.files:
            continue
        if donor and companion.name == "config.json" and stage.config is not None and stage.config != donor.config:
            check_unchanged(companion, donor, sources)
            yield companion.name, (json.dumps(stage.config, indent=2, ensure_ascii=False) + "\n").encode()
        elif donor:
            yield companion.name, (companion, donor)


def _made(name: str, data: bytes, store: Store) -> ManifestFile:
    return ManifestFile(name, store.put_file(data), len(data))


def _taken_over(companion: Companion, donor: Checkpoint, sources: Sources, store: Store) -> ManifestFile:
    """A companion as it is. One that is made from a weights file is made once for each such file."""
    check_unchanged(companion, donor, sources)
    key = _made_name(companion)
    if companion.derived and (known := store.shortcut(key)) and (kept := store.read_file(known)) is not None:
        return ManifestFile(companion.name, known, len(kept))
    file = _made(companion.name, read_unchanged(companion, donor, sources), store)
    if companion.derived:
        store.set_shortcut(key, file.digest)
    return file


def _made_name(companion: Companion) -> Digest:
    """Under which name the store remembers a companion that is made from a weights file."""
    return tagged("kittybuild.companion.v1", [FileId.of(companion.path).key().hex, companion.name])
