"""A folder in the Hugging Face layout: one safetensors file, or shards with an index; config and companion files.

No path leaves the folder, and the tensors are exactly those of the index.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

from kittybuild.checkpoint.safetensors_file import read_safetensors
from kittybuild.checkpoint.source import Checkpoint, Companion, Entry, FileId
from kittybuild.errors import SourceError, nearest

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_COMPANION = 256 << 20
RIGHTS = "check the path and its rights"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".index.json")
_OURS = frozenset({"README.md", "kittybuild.json", "mergekit_config.yml", ".gitattributes", ".gitignore"})


def read_folder(path: str) -> Checkpoint:
    """The checkpoint in a folder, from its headers. Raises SourceError KB201 to KB206."""
    index = os.path.isfile(os.path.join(path, INDEX))
    if index:
        entries, weights = _sharded(path)
    elif os.path.isfile(os.path.join(path, SINGLE)):
        weights = (SINGLE,)
        entries = read_safetensors(inside(path, SINGLE))
    else:
        weights, entries = _loose(path)
    if not entries:
        raise SourceError("KB205", "the checkpoint holds no tensors", at=path, hint="download or copy it again")
    companions = tuple(_companions(path))
    config = read_json(os.path.join(path, "config.json"))
    names = (*weights, *(companion.name for companion in companions), *([INDEX] if index else []))
    try:
        files = tuple(FileId.of(os.path.join(path, name)) for name in names)
    except OSError as error:
        raise SourceError("KB201", f"cannot read: {error.strerror}", at=error.filename, hint=RIGHTS) from error
    return Checkpoint(path, "folder", entries, files, companions, config, _unread(path, weights))


def _unread(path: str, weights: tuple[str, ...]) -> tuple[str, ...]:
    """A note on safetensors files beside the weights that are no part of them."""
    others = sorted(name for name in os.listdir(path) if name.endswith(".safetensors") and name not in weights)
    return (f"not read, since the weights are in other files: {_some(others)}",) if others else ()


def read_json(path: str) -> dict[str, Any] | None:
    """The JSON object in a file, or None where there is no file. Raises SourceError KB206."""
    try:
        with open(path, "rb") as file:
            value = json.loads(file.read(LARGEST_COMPANION))
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


def _sharded(path: str) -> tuple[dict[str, Entry], tuple[str, ...]]:
    index_path = os.path.join(path, INDEX)
    weight_map = (read_json(index_path) or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise SourceError("KB206", "the index has no weight_map of names", at=index_path, hint="copy it again")
    files = tuple(dict.fromkeys(weight_map.values()))
    missing = [file for file in files if not os.path.isfile(inside(path, file))]
    if missing:
        hint = "download the whole checkpoint again"
        message = f"the index names files that are not there: {_some(missing)}"
        raise SourceError("KB205", message, at=path, hint=hint)
    shards = {file: read_safetensors(inside(path, file)) for file in files}
    lost = [name for name, file in weight_map.items() if name not in shards[file]]
    extra = [name for file, entries in shards.items() for name in entries if weight_map.get(name) != file]
    if lost or extra:
        what = "the index names tensors that its shards do not hold" if lost else "shards hold tensors the index lacks"
        hint = "download the whole checkpoint again"
        raise SourceError("KB205", f"{what}: {_some(lost or extra)}", at=index_path, hint=hint)
    return {name: shards[file][name] for name, file in weight_map.items()}, files


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more


def _loose(path: str) -> tuple[tuple[str, ...], dict[str, Entry]]:
    """A folder whose one safetensors file has another name."""
    try:
        names = sorted(name for name in os.listdir(path) if name.endswith(".safetensors"))
    except OSError as error:
        message = f"cannot read the folder: {error.strerror}"
        raise SourceError("KB201", message, at=path, hint=RIGHTS) from error
    if len(names) == 1:
        return (names[0],), read_safetensors(inside(path, names[0]))
    found = f"holds {len(names)} safetensors files and no index" if names else "holds no safetensors file"
    hint = f"a checkpoint folder has {SINGLE}, or shards and {INDEX}"
    raise SourceError("KB205", f"the folder {found}", at=path, hint=hint)


def _companions(path: str) -> list[Companion]:
    """Every file that is not weights, in the order of the names; folders in it are looked into, links out are not."""
    found = []
    top = os.path.realpath(path)
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            full = os.path.join(folder, name)
            relative = os.path.relpath(full, path).replace(os.sep, "/")
            if relative in _OURS or name.startswith(".") or name.endswith(_WEIGHTS):
                continue
            if not _allowed(top, full):
                hint = "put the file itself there"
                raise SourceError("KB204", f"{relative} is a link that leads out of the folder", at=path, hint=hint)
            found.append(Companion(relative, full))
    return sorted(found, key=lambda companion: companion.name)


def _allowed(top: str, full: str) -> bool:
    """A file of the folder, or a link as the Hugging Face cache makes them (snapshots/x/name -> blobs/digest)."""
    real = os.path.realpath(full)
    if real.startswith(top.rstrip(os.sep) + os.sep):
        return True
    snapshots = os.path.dirname(top)
    blobs = os.path.join(os.path.dirname(snapshots), "blobs")
    return os.path.basename(snapshots) == "snapshots" and real.startswith(blobs + os.sep)


def unknown_source(path: str, near: list[str]) -> SourceError:
    """The error for a path where nothing is."""
    hint = nearest(path, near) if near else None
    if hint is None or not hint.startswith("did"):
        hint = "paths count from the recipe's folder, then from the working folder"
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@\S+)?", path):
            hint += "; a model on the Hub must be downloaded first"
    return SourceError("KB201", f"no such file or folder: {path}", hint=hint)
