"""Opening a source wherever it is: a folder, one file of weights, an adapter, a file in a package."""

from __future__ import annotations

import os
from importlib import metadata

from kittybuild.checkpoint.adapter import is_adapter, read_adapter_folder
from kittybuild.checkpoint.folder import read_folder, read_weights
from kittybuild.checkpoint.gguf_header import part_names
from kittybuild.checkpoint.quantized import dequantized, quantized_note
from kittybuild.checkpoint.source import Checkpoint, FileId
from kittybuild.digest import Digest, tagged
from kittybuild.errors import SourceError


def find(path: str, folders: tuple[str, ...]) -> str | None:
    """The first of `folders` (the recipe's own first) in which `path` exists, joined with it."""
    found = (os.path.join(folder, os.path.expanduser(path)) for folder in folders)
    return next((candidate for candidate in found if os.path.exists(candidate)), None)


def package_file(package: str, file: str) -> str:
    """The path of a file inside an installed Python package. Raises SourceError KB209."""
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError as error:
        hint = f"pip install {package}"
        raise SourceError("KB209", f"the Python package {package!r} is not installed", hint=hint) from error
    for entry in distribution.files or ():
        if entry.as_posix() == file:
            return str(entry.locate())
    raise SourceError(
        "KB209", f"the package {package} {distribution.version} holds no file {file!r}", hint="check its name"
    )


def place_of(path: str, name: str) -> str:
    """Where the file `name` of the source at `path` is: in that folder, or it is that file, or beside it."""
    return os.path.join(path if os.path.isdir(path) else os.path.dirname(path), *name.split("/"))


def package_version(package: str) -> str:
    """The version of an installed package, for the lock; `unknown` for one that is only on the path."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def open_source(path: str) -> Checkpoint:
    """The checkpoint at `path`, from its headers. Raises SourceError."""
    if os.path.isdir(path):
        return read_adapter_folder(path) if is_adapter(path) else read_folder(path)
    if path.endswith(".gguf"):
        from kittybuild.checkpoint.gguf import read_gguf

        return read_gguf(path)
    entries, notes = read_weights(path)
    if not entries:
        raise SourceError("KB205", "the file holds no tensors", at=path, hint="download or copy it again")
    plain = dequantized(path, entries, None)
    notes = (*notes, *plain.notes, *quantized_note(plain.entries.values()))
    return Checkpoint(path, "file", plain.entries, (FileId.of(path),), notes=notes)


def fingerprint(path: str) -> Digest:
    """The identity of a source as far as `stat` can tell, without opening a file. Raises SourceError KB201."""
    try:
        if not os.path.isdir(path):
            return tagged("kittybuild.source.v1", [FileId.of(part).key().hex for part in part_names(path)])
        found = []
        for folder, subfolders, names in os.walk(path):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in sorted(names):
                full = os.path.join(folder, name)
                found.append([os.path.relpath(full, path), FileId.of(full).key().hex])
    except OSError as error:
        raise SourceError(
            "KB201", f"cannot read: {error.strerror}", at=path, hint="check the path and its rights"
        ) from error
    return tagged("kittybuild.source.v1", found)
