"""A folder in the Hugging Face layout: one file of weights, or shards with an index; config and companion files.

No path leaves the folder, and the tensors are exactly those of the index.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from kittybuild.checkpoint.bounded import Bounded
from kittybuild.checkpoint.quantized import dequantized, quantized_note, without
from kittybuild.checkpoint.safetensors_file import read_safetensors
from kittybuild.checkpoint.source import Checkpoint, Companion, Entry, FileId
from kittybuild.checkpoint.state_dict import some
from kittybuild.errors import SourceError, nearest

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
LARGEST_COMPANION = 256 << 20
RIGHTS = "check the path and its rights"
VIEWS = "kittybuild"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".index.json")
_TRAINING = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state.*|random_states.*)\.(bin|pt|pth|safetensors)"
)
_OURS = frozenset({"README.md", "kittybuild.json", "mergekit_config.yml", ".gitattributes", ".gitignore"})


Read = Callable[[str], tuple[dict[str, Entry], tuple[str, ...]]]


@dataclass(frozen=True, slots=True)
class _Format:
    """What files of weights are called: the only one, the index of several, any. `read`: tensors and notes of one."""

    single: str
    index: str
    suffixes: tuple[str, ...]
    read: Read


def read_weights(path: str) -> tuple[dict[str, Entry], tuple[str, ...]]:
    """The tensors of one file of weights, as its suffix says, and notes. Raises SourceError; KB205 for another file."""
    for form in _FORMATS:
        if path.endswith(form.suffixes):
            return form.read(path)
    hint = f"give a folder with weights, or a file: {', '.join((*SUFFIXES, '.gguf'))}"
    raise SourceError("KB205", "not a checkpoint that we can read", at=path, hint=hint)


def read_folder(path: str) -> Checkpoint:
    """The checkpoint in a folder, from its headers. Raises SourceError."""
    entries, weights, index, notes = _weights(path)
    if not entries:
        raise SourceError("KB205", "the checkpoint holds no tensors", at=path, hint="download or copy it again")
    companions = tuple(_companions(path))
    config = read_json(os.path.join(path, CONFIG))
    names = (*weights, *(companion.name for companion in companions), *index)
    try:
        files = tuple(FileId.of(os.path.join(path, name)) for name in names)
    except OSError as error:
        raise SourceError("KB201", f"cannot read: {error.strerror}", at=error.filename, hint=RIGHTS) from error
    plain = dequantized(path, entries, config)
    if plain.config != config:
        companions = tuple(replace(each, derived=each.derived or each.name == CONFIG) for each in companions)
    notes = (*notes, *plain.notes, *quantized_note(plain.entries.values()), *_unread(path, weights))
    return Checkpoint(path, "folder", plain.entries, files, companions, plain.config, notes)


def _weights(path: str) -> tuple[dict[str, Entry], tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Tensors, the names of their files and of the index, if there is one, and notes."""
    for form in _FORMATS:
        if os.path.isfile(os.path.join(path, form.index)):
            entries, files, notes = _sharded(path, form)
            return entries, files, (form.index,), notes
        if os.path.isfile(os.path.join(path, form.single)):
            entries, notes = form.read(inside(path, form.single))
            return entries, (form.single,), (), notes
    name, form = _loose(path)
    entries, notes = form.read(inside(path, name))
    return entries, (name,), (), notes


def _unread(path: str, weights: tuple[str, ...]) -> tuple[str, ...]:
    """A note on files beside the weights that look like weights and are no part of them."""
    others = sorted(name for name in os.listdir(path) if name.endswith(SUFFIXES) and name not in weights)
    others = [name for name in others if not _TRAINING.fullmatch(name)]
    return (f"not read, since the weights are in other files: {some(others)}",) if others else ()


def read_json(path: str) -> dict[str, Any] | None:
    """The JSON object in a file, or None where there is no file. Raises SourceError KB206."""
    try:
        with open(path, "rb") as file:
            value = json.loads(Bounded(file, LARGEST_COMPANION, "the file").read())
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # what cannot be written again is damaged
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(
            "KB206", f"cannot read this JSON: {error}", at=path, hint="download or copy it again"
        ) from error
    if not isinstance(value, dict):
        raise SourceError("KB206", "not a JSON object", at=path, hint="download or copy it again")
    return value


def plain_config(path: str) -> bytes:
    """The config.json at `path` as it fits tensors that are read without their quantisation."""
    return (json.dumps(without(read_json(path) or {}), indent=2, ensure_ascii=False) + "\n").encode()


def inside(folder: str, name: str) -> str:
    """The path of `name` in `folder`; raises SourceError KB204 where it, or the link that it is, would lead out."""
    path = os.path.join(folder, name)
    if os.path.isabs(name) or ".." in name.split("/") or "\\" in name or "\0" in name or not name:
        hint = "the index may only name files beside it"
        raise SourceError("KB204", f"the index names {name!r}, outside its folder", at=folder, hint=hint)
    if not _allowed(os.path.realpath(folder), path):
        hint = "put the file itself there"
        raise SourceError("KB204", f"{name} is a link that leads out of the folder", at=folder, hint=hint)
    return path


def _sharded(path: str, form: _Format) -> tuple[dict[str, Entry], tuple[str, ...], tuple[str, ...]]:
    index_path = inside(path, form.index)
    weight_map = (read_json(index_path) or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise SourceError("KB206", "the index has no weight_map of names", at=index_path, hint="copy it again")
    files = tuple(dict.fromkeys(weight_map.values()))
    missing = [file for file in files if not os.path.isfile(inside(path, file))]
    if missing:
        hint = "download the whole checkpoint again"
        message = f"the index names files that are not there: {some(missing)}"
        raise SourceError("KB205", message, at=path, hint=hint)
    read = {file: form.read(inside(path, file)) for file in files}
    shards = {file: entries for file, (entries, _) in read.items()}
    lost = [name for name, file in weight_map.items() if name not in shards[file]]
    extra = [name for file, entries in shards.items() for name in entries if weight_map.get(name) != file]
    if lost or extra:
        what = "the index names tensors that its shards do not hold" if lost else "shards hold tensors the index lacks"
        hint = "download the whole checkpoint again"
        raise SourceError("KB205", f"{what}: {some(lost or extra)}", at=index_path, hint=hint)
    notes = tuple(f"{file}: {note}" for file, (_, notes) in read.items() for note in notes)
    return {name: shards[file][name] for name, file in weight_map.items()}, files, notes


def _loose(path: str) -> tuple[str, _Format]:
    """The one file of weights in a folder, under another name."""
    try:
        listed = sorted(name for name in os.listdir(path) if not _TRAINING.fullmatch(name))
    except OSError as error:
        message = f"cannot read the folder: {error.strerror}"
        raise SourceError("KB201", message, at=path, hint=RIGHTS) from error
    for form in _FORMATS:
        names = [name for name in listed if name.endswith(form.suffixes)]
        if len(names) == 1:
            return names[0], form
        if names:
            found = f"holds {len(names)} files of weights ({some(names)}) and no index"
            hint = f"name one of the files, or add the {form.index} that belongs to them"
            raise SourceError("KB205", f"the folder {found}", at=path, hint=hint)
    gguf = [name for name in listed if name.endswith(".gguf")]
    hint = (
        f"name the file itself: {some(gguf)}"
        if gguf
        else f"a checkpoint folder has {_FORMATS[0].single}, or shards and {INDEX}"
    )
    raise SourceError("KB205", "the folder holds no file of weights", at=path, hint=hint)


def _safetensors(path: str) -> tuple[dict[str, Entry], tuple[str, ...]]:
    return read_safetensors(path), ()


def _pickled(path: str) -> tuple[dict[str, Entry], tuple[str, ...]]:
    from kittybuild.checkpoint.pickled import read_pickled

    return read_pickled(path)


_FORMATS = (
    _Format("model.safetensors", INDEX, (".safetensors",), _safetensors),
    _Format("pytorch_model.bin", "pytorch_model.bin.index.json", (".bin", ".pt", ".pth"), _pickled),
)
SUFFIXES = tuple(suffix for form in _FORMATS for suffix in form.suffixes)


def _companions(path: str) -> list[Companion]:
    """Every file that is not weights, in the order of the names; folders in it are looked into, links out are not."""
    found = []
    top = os.path.realpath(path)
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            full = os.path.join(folder, name)
            relative = os.path.relpath(full, path).replace(os.sep, "/")
            if not is_companion(relative):
                continue
            if not _allowed(top, full):
                hint = "put the file itself there"
                raise SourceError("KB204", f"{relative} is a link that leads out of the folder", at=path, hint=hint)
            found.append(Companion(relative, full))
    return sorted(found, key=lambda companion: companion.name)


def is_companion(name: str) -> bool:
    """Whether a file of a checkpoint travels with its weights, by its name in the folder."""
    return not (name in _OURS or name.endswith(_WEIGHTS) or any(part.startswith(".") for part in name.split("/")))


def weights_among(names: Collection[str]) -> tuple[str | None, tuple[str, ...]]:
    """Which of a folder's files hold its weights: the index of them, or else the files."""
    for form in _FORMATS:
        if form.index in names:
            return form.index, ()
        if form.single in names:
            return None, (form.single,)
    for form in _FORMATS:
        loose = sorted(name for name in names if name.endswith(form.suffixes) and "/" not in name)
        if loose := [name for name in loose if not _TRAINING.fullmatch(name)]:
            return None, tuple(loose)
    return None, ()


def _allowed(top: str, full: str) -> bool:
    """A file of the folder, or a link as the Hugging Face cache makes them: snapshots/x/name -> blobs/digest, which may
    be a link to blobs/ab/digest of the whole cache. Our views of it are like its snapshots, with blobs of their own."""
    real = os.path.realpath(full)
    if real.startswith(top.rstrip(os.sep) + os.sep):
        return True
    snapshots = os.path.dirname(top)
    repository = os.path.dirname(snapshots)
    blobs = [os.path.join(folder, "blobs") + os.sep for folder in (snapshots, repository, os.path.dirname(repository))]
    return os.path.basename(snapshots) in ("snapshots", VIEWS) and real.startswith(tuple(blobs))


def unknown_source(path: str, near: list[str]) -> SourceError:
    """The error for a path where nothing is."""
    hint = nearest(path, near) if near else None
    if hint is None or not hint.startswith("did"):
        hint = "paths count from the recipe's folder, then from the working folder"
    return SourceError("KB201", f"no such file or folder: {path}", hint=hint)
