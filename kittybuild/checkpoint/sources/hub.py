"""Repositories of the Hub: what is in one at a commit, and its headers as a checkpoint before its weights are here."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from kittybuild.checkpoint.adapter import CONFIG as ADAPTER_CONFIG
from kittybuild.checkpoint.adapter import WEIGHTS as ADAPTER_WEIGHTS
from kittybuild.checkpoint.folder import LARGEST_COMPANION, inside, is_companion, read_json, weights_among
from kittybuild.checkpoint.gguf_header import part_names, read_header
from kittybuild.checkpoint.opening import open_source
from kittybuild.checkpoint.safetensors_file import LONGEST_HEADER
from kittybuild.checkpoint.source import Checkpoint, Entry, FileId
from kittybuild.checkpoint.sources.cached import Cached, digests
from kittybuild.checkpoint.sources.ranges import Range
from kittybuild.checkpoint.sources.web import Web, nonsense
from kittybuild.errors import KittybuildError, SourceError
from kittybuild.model.lock import FilePin, Pin

AT_ONCE = 4
FIRST = 1 << 16
_GGUF_FIRST, _GGUF_MOST = 1 << 22, 1 << 28


def pin_repository(words: dict[str, str], web: Web) -> Pin:
    """The pin of what `words` (hub, revision, file) name now: its commit, and all its files. Raises SourceError."""
    return _with_contents(told_pin(words, web), web)


def told_pin(words: dict[str, str], web: Web) -> Pin:
    """The same as the Hub tells it, where small files have no SHA-256. Raises SourceError."""
    repository = words["hub"]
    info = web.info(repository, words.get("revision"))
    files = []
    try:
        for sibling in info.siblings or ():
            lfs = sibling.lfs
            size = lfs.size if lfs else sibling.size
            files.append(
                FilePin(sibling.rfilename, size, lfs.sha256 if lfs else None, None if lfs else sibling.blob_id)
            )
        pin = Pin(words, tuple(files), {"commit": info.sha, "repository": info.id})
        return Pin.from_json(pin.to_json())  # as strictly as a lock is read
    except (ValueError, TypeError, AttributeError) as error:
        raise nonsense(repository, f": {error}" if isinstance(error, ValueError) else "") from error


def _with_contents(pin: Pin, web: Web) -> Pin:
    """The pin with the SHA-256 of files that the Hub knows by git's names only; they are small, and needed anyway."""
    cached = Cached(pin, web)
    small = [file.name for file in pin.files if file.sha256 is None and file.name in _read_whole(cached)]
    _all_whole(cached, small)
    known = {name: digests(cached.path(name))[0] for name in small}
    return replace(pin, files=tuple(replace(f, sha256=known.get(f.name, f.sha256)) for f in pin.files))


def open_pinned(pin: Pin, web: Web) -> tuple[Checkpoint, Cached]:
    """The checkpoint that a pin names, from its headers, and where its bytes are or come to. Raises SourceError."""
    cached = Cached(pin, web)
    label = f"{pin.words['hub']}@{cached.commit[:12]}"
    try:
        weights = _bring_headers(cached)
        file = pin.words.get("file")
        found = open_source(cached.path(file) if file else cached.view)
    except KittybuildError as error:
        if error.at and error.at.startswith(cached.view):
            error.at = label + error.at[len(cached.view) :]
        raise
    real = {os.path.realpath(cached.path(name)) for name in weights}
    others = [file for file in found.files if file.path not in real]
    files = (*(identity(cached, cached.path(name)) for name in weights), *others)
    return replace(found, where=label, files=tuple(file for file in files if file)), cached


def identity(cached: Cached, path: str) -> FileId | None:
    """The identity of a file of weights by its content; None for a path outside the repository."""
    file = cached.files.get(os.path.relpath(path, cached.view).replace(os.sep, "/"))
    if file is None:
        return None
    return FileId(path, file.size, content=file.sha256 or file.git or "", whole=cached.whole(file.name))


def ranges_of(entries: Iterable[Entry]) -> dict[str, list[Range]]:
    """The bytes of tensors, by the paths of their files."""
    found: dict[str, list[Range]] = {}
    for entry in entries:
        for part in (entry, *entry.parts):
            found.setdefault(part.file, []).append((part.offset, part.offset + part.nbytes))
    return found


def entry_here(cached: Cached, entry: Entry) -> bool:
    """Whether the bytes of one tensor are on this machine."""
    found = ranges_of([entry])
    return not any(cached.missing(os.path.relpath(p, cached.view).replace(os.sep, "/"), r) for p, r in found.items())


def bring_entry(cached: Cached, entry: Entry) -> None:
    """See that the bytes of one tensor are here. Raises SourceError."""
    for path, ranges in ranges_of([entry]).items():
        cached.bring(os.path.relpath(path, cached.view).replace(os.sep, "/"), ranges)


def _read_whole(cached: Cached) -> list[str]:
    """The files that are read as they are: companions, configs, indexes."""
    file = cached.pin.words.get("file")
    if file:
        return []
    names = [name for name, pin in cached.files.items() if is_companion(name) and pin.size <= LARGEST_COMPANION]
    index, _ = weights_among(cached.files)
    return [*names, *([index] if index else ())]


def _all_whole(cached: Cached, names: Iterable[str]) -> None:
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for done in [threads.submit(cached.bring_whole, name) for name in names]:
            done.result()


def _bring_headers(cached: Cached) -> tuple[str, ...]:
    """Have in the view what headers need; the names of the files of weights. Raises SourceError."""
    _all_whole(cached, _read_whole(cached))
    weights = _weights(cached)
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for done in [threads.submit(_bring_header, cached, name) for name in weights]:
            done.result()
    return weights


def _weights(cached: Cached) -> tuple[str, ...]:
    names = cached.files
    if file := cached.pin.words.get("file"):
        if file not in names:
            hint = "check the name, or move the pin with `kittybuild lock RECIPE --update NAME`"
            raise SourceError("KB254", f"there is no file {file!r} in {cached.repository}", hint=hint)
        return tuple(name for name in part_names(file) if name in names)
    if ADAPTER_CONFIG in names:
        return next(((name,) for name in ADAPTER_WEIGHTS if name in names), ())
    index, found = weights_among(names)
    if index:
        weight_map = (read_json(cached.path(index)) or {}).get("weight_map")
        listed = list(dict.fromkeys(weight_map.values())) if isinstance(weight_map, dict) else []
        for name in listed:
            inside(cached.view, str(name))
        return tuple(name for name in listed if name in names)
    if len(found) != 1:  # whoever reads the folder says so, and names them
        for name in found or [name for name in names if name.endswith(".gguf")]:
            cached.place(name)
        return ()
    return found


def _bring_header(cached: Cached, name: str) -> None:
    size = cached.files[name].size
    if name.endswith(".gguf"):
        _bring_gguf_header(cached, name, size)
    elif not name.endswith(".safetensors") or size <= FIRST:
        cached.bring_whole(name)  # a pickle says where its tensors are at its end, or in its middle
    else:
        cached.bring(name, ((0, FIRST),))
        with open(cached.path(name), "rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length <= min(LONGEST_HEADER, size - 8):  # else the reader refuses it
            cached.bring(name, ((0, 8 + length),))


def _bring_gguf_header(cached: Cached, name: str, size: int) -> None:
    """As much of the file as the header takes, which only reading it tells."""
    most = _GGUF_FIRST
    while True:
        cached.bring(name, ((0, min(most, size)),))
        try:
            tensors = read_header(cached.path(name)).tensors.values()
            if most >= min((tensor.offset for tensor in tensors), default=size):
                return
        except SourceError:
            if most >= min(size, _GGUF_MOST):
                raise
        if most >= min(size, _GGUF_MOST):
            return
        most *= 4
