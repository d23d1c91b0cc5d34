"""The output folder: the old model or the new one, never a mixture. Shards are hard links to packs where that works.

The new folder is made beside the old one and takes its place in one step. Files in the old folder that we did not put
there are carried over; a folder that is not ours is never replaced.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping

from kittybuild.errors import BuildError
from kittybuild.model.manifest import Manifest
from kittybuild.model.plan import ADAPTER_CONFIG
from kittybuild.publish.place import alone, place, tidy
from kittybuild.store.problems import failure
from kittybuild.store.store import Store

PROVENANCE = "kittybuild.json"
ATTESTATION = "kittybuild.attestation.json"
INDEX = "model.safetensors.index.json"
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES)
_SECOND = 1_000_000_000


def shard_names(manifest: Manifest) -> tuple[str, ...]:
    """The file names of the shards, as transformers wants them; of an adapter's only one, as PEFT wants it."""
    count = len(manifest.shards)
    if any(file.name == ADAPTER_CONFIG for file in manifest.files):
        return ("adapter_model.safetensors",)
    if count == 1:
        return ("model.safetensors",)
    return tuple(f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))


def index_json(manifest: Manifest) -> bytes:
    """model.safetensors.index.json."""
    names = shard_names(manifest)
    places = {tensor: file for file, shard in zip(names, manifest.shards, strict=True) for tensor in shard.names}
    total = sum(tensor.ref.spec.nbytes for tensor in manifest.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": {t.name: places[t.name] for t in manifest.tensors}}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


def publish(manifest: Manifest, folder: str, texts: Mapping[str, bytes], store: Store) -> bool:
    """Make `folder` the checkpoint of `manifest`, with `texts` beside it. Returns whether anything had to be done.

    Raises BuildError KB504 for a folder that is not ours, StoreError for failing file operations.
    """
    folder = os.path.realpath(folder)  # of a link, what it leads to is replaced, and the link stays
    files = _files(manifest, texts, store)
    try:
        with store.output_lock(folder), alone(folder, store.disk):
            new = tidy(folder, store.disk)
            if _is_current(folder, manifest, files, store):
                return False
            ours = _our_files(folder)
            _fill(new, manifest, files, store)
            _carry_over(folder, new, ours, store)
            place(new, folder, store.disk)
    except OSError as error:
        raise failure(error, "write the output", folder) from error
    return True


def _files(manifest: Manifest, texts: Mapping[str, bytes], store: Store) -> dict[str, bytes]:
    """All small files of the folder by name; ours win over companions of the same name."""
    found = {}
    for file in manifest.files:
        data = store.read_file(file.digest)
        if data is None:
            raise BuildError("KB506", f"the store has lost the companion file {file.name}", hint="build again")
        found[file.name] = data
    if len(manifest.shards) > 1:
        found[INDEX] = index_json(manifest)
    return {**found, **texts}


def _is_current(folder: str, manifest: Manifest, files: Mapping[str, bytes], store: Store) -> bool:
    """Whether the folder holds just these shards (the packs themselves, or copies as we make them) and files."""
    try:
        for name, shard in zip(shard_names(manifest), manifest.shards, strict=True):
            pack = store.pack(shard.pack)
            if pack is None or not _same(os.stat(os.path.join(folder, name)), os.stat(pack)):
                return False
        for name, data in files.items():
            with open(os.path.join(folder, name), "rb") as file:
                if file.read() != data:
                    return False
        return not _leftovers(folder, {*files, *shard_names(manifest)})
    except OSError:
        return False


def _same(shard: os.stat_result, pack: os.stat_result) -> bool:
    """Whether a shard is the pack, or a copy that nobody changed: copies have the pack's time."""
    apart = abs(shard.st_mtime_ns - pack.st_mtime_ns)
    whole = shard.st_mtime_ns % _SECOND == 0  # a file system that keeps no finer times
    same_time = apart == 0 or (whole and apart < 2 * _SECOND)
    return os.path.samestat(shard, pack) or (same_time and shard.st_size == pack.st_size)


def _leftovers(folder: str, wanted: set[str]) -> set[str]:
    return {name for name in _our_files(folder) if name not in wanted and os.path.lexists(os.path.join(folder, name))}


def _our_files(folder: str) -> frozenset[str]:
    """What an earlier build put into the folder; raises BuildError KB504 if the folder is not ours."""
    if not os.path.isdir(folder):
        if os.path.lexists(folder):
            raise BuildError("KB504", "a file stands where the output folder goes", at=folder, hint="move it away")
        return frozenset()
    if not os.listdir(folder):
        return frozenset()
    try:
        with open(os.path.join(folder, PROVENANCE), "rb") as file:
            listed = json.load(file)["files"]
        return frozenset(name for name in listed if isinstance(name, str))
    except (OSError, ValueError, KeyError, TypeError) as error:
        hint = "name another folder, or empty this one"
        raise BuildError(
            "KB504", "the folder holds something that kittybuild did not make", at=folder, hint=hint
        ) from error


def _fill(new: str, manifest: Manifest, files: Mapping[str, bytes], store: Store) -> None:
    disk = store.disk
    disk.makedirs(new)
    for name, shard in zip(shard_names(manifest), manifest.shards, strict=True):
        pack = store.pack(shard.pack)
        if pack is None:
            raise BuildError("KB506", f"the store has lost the pack {shard.pack}", hint="build again")
        _link(pack, os.path.join(new, name), store)
    for name, data in files.items():
        path = os.path.join(new, *name.split("/"))
        disk.makedirs(os.path.dirname(path))
        disk.write_file(path, data, mode=0o644)
    disk.sync_dir(new)


def _link(old: str, path: str, store: Store) -> None:
    """A file under another name; where links do not reach, a copy with the same time."""
    disk = store.disk
    try:
        disk.link(old, path)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        with open(old, "rb") as source:
            stat = os.fstat(source.fileno())
            target = disk.create(path, stat.st_size)
            try:
                disk.copy_range(source.fileno(), 0, target, 0, stat.st_size)
                disk.set_time(target, stat.st_mtime_ns)
                disk.fsync(target)
            finally:
                disk.close(target)


def _carry_over(old: str, new: str, ours: frozenset[str], store: Store, inner: str = "") -> None:
    """What somebody else put into the old folder goes with it: files, links, and folders with nothing in them."""
    for entry in sorted(os.scandir(old), key=lambda entry: entry.name) if os.path.isdir(old) else ():
        target = os.path.join(new, entry.name)
        if entry.is_dir(follow_symlinks=False):
            _carry_over(entry.path, target, ours, store, f"{inner}{entry.name}/")
            if not os.listdir(entry.path):
                store.disk.makedirs(target)
        elif inner + entry.name not in ours and not os.path.lexists(target):
            store.disk.makedirs(new)
            _link(entry.path, target, store)
