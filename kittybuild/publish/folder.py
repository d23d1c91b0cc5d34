"""The output folder: the old model or the new one, never a mixture. Shards are hard links to packs where that works.

The new folder is made beside the old one and takes its place in one step. Files in the old folder that we did not put
there are carried over; a folder that is not ours is never replaced.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping

from kittybuild.errors import BuildError, StoreError
from kittybuild.model.manifest import Manifest
from kittybuild.store.store import Store

PROVENANCE = "kittybuild.json"
_NEW = ".kittybuild-new"
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES)


def shard_names(count: int) -> tuple[str, ...]:
    """The file names of the shards, as transformers wants them."""
    if count == 1:
        return ("model.safetensors",)
    return tuple(f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))


def index_json(manifest: Manifest) -> bytes:
    """model.safetensors.index.json."""
    names = shard_names(len(manifest.shards))
    places = {tensor: file for file, shard in zip(names, manifest.shards, strict=True) for tensor in shard.names}
    total = sum(tensor.ref.spec.nbytes for tensor in manifest.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": {t.name: places[t.name] for t in manifest.tensors}}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


def publish(manifest: Manifest, folder: str, texts: Mapping[str, bytes], store: Store) -> bool:
    """Make `folder` the checkpoint of `manifest`, with `texts` beside it. Returns whether anything had to be done.

    Raises BuildError KB504 for a folder that is not ours, StoreError for failing file operations.
    """
    files = _files(manifest, texts, store)
    with store.output_lock(folder):
        if _is_current(folder, manifest, files, store):
            return False
        ours = _our_files(folder)
        new = os.path.abspath(folder) + _NEW
        try:
            if os.path.lexists(new):
                store.disk.rmtree(new)
            _fill(new, manifest, files, store)
            _carry_over(folder, new, ours, store)
            _put_in_place(new, folder, store)
        except OSError as error:
            raise _failed(error, folder) from error
    return True


def _failed(error: OSError, folder: str) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            "KB704", "the disk is full", at=folder, hint="free some space and build again; nothing is lost"
        )
    return StoreError("KB705", f"cannot write the output: {error.strerror}", at=folder, hint="may you write there?")


def _files(manifest: Manifest, texts: Mapping[str, bytes], store: Store) -> dict[str, bytes]:
    """All small files of the folder by name; ours win over companions of the same name."""
    found = {}
    for file in manifest.files:
        data = store.read_file(file.digest)
        if data is None:
            raise BuildError("KB506", f"the store has lost the companion file {file.name}", hint="build again")
        found[file.name] = data
    if len(manifest.shards) > 1:
        found["model.safetensors.index.json"] = index_json(manifest)
    return {**found, **texts}


def _is_current(folder: str, manifest: Manifest, files: Mapping[str, bytes], store: Store) -> bool:
    """Whether the folder holds just these shards (the packs themselves, or copies as large) and files."""
    try:
        for name, shard in zip(shard_names(len(manifest.shards)), manifest.shards, strict=True):
            there, pack = os.stat(os.path.join(folder, name)), store.pack(shard.pack)
            linked = pack is not None and os.path.samestat(there, os.stat(pack))
            if not linked and (_same_device(folder, store.root) or there.st_size != shard.size):
                return False
        for name, data in files.items():
            with open(os.path.join(folder, name), "rb") as file:
                if file.read() != data:
                    return False
        return not _leftovers(folder, {*files, *shard_names(len(manifest.shards))})
    except OSError:
        return False


def _same_device(folder: str, root: str) -> bool:
    return os.stat(folder).st_dev == os.stat(root).st_dev


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
    for name, shard in zip(shard_names(len(manifest.shards)), manifest.shards, strict=True):
        pack = store.pack(shard.pack)
        if pack is None:
            raise BuildError("KB506", f"the store has lost the pack {shard.pack}", hint="build again")
        _link(pack, os.path.join(new, name), shard.size, store)
    for name, data in files.items():
        path = os.path.join(new, *name.split("/"))
        disk.makedirs(os.path.dirname(path))
        disk.write_file(path, data, mode=0o644)
    disk.sync_dir(new)


def _link(pack: str, path: str, size: int, store: Store) -> None:
    """The pack itself under another name; where links do not reach, a copy of it."""
    disk = store.disk
    try:
        disk.link(pack, path)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        source = os.open(pack, os.O_RDONLY)
        target = disk.create(path, size)
        try:
            disk.copy_range(source, 0, target, 0, size)
            disk.fsync(target)
        finally:
            os.close(source)
            disk.close(target)


def _carry_over(folder: str, new: str, ours: frozenset[str], store: Store) -> None:
    """Files that somebody else put into the old folder go with it."""
    for top, _, names in os.walk(folder) if os.path.isdir(folder) else ():
        for name in names:
            relative = os.path.relpath(os.path.join(top, name), folder).replace(os.sep, "/")
            target = os.path.join(new, relative)
            if relative not in ours and not os.path.lexists(target):
                store.disk.makedirs(os.path.dirname(target))
                store.disk.link(os.path.join(top, name), target)


def _put_in_place(new: str, folder: str, store: Store) -> None:
    """Swap the folders in one step; where the system cannot, the old one is moved aside for a moment."""
    disk, folder = store.disk, os.path.abspath(folder)
    parent = os.path.dirname(folder)
    if not os.path.isdir(folder):
        disk.rename(new, folder)
    else:
        try:
            disk.exchange(new, folder)
        except OSError:
            aside = folder + ".kittybuild-old"
            if os.path.lexists(aside):
                disk.rmtree(aside)
            disk.rename(folder, aside)
            disk.rename(new, folder)
            disk.sync_dir(parent)
            disk.rmtree(aside)
            return
        disk.sync_dir(parent)
        disk.rmtree(new)
    disk.sync_dir(parent)
