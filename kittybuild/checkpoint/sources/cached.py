"""A pinned repository in the Hugging Face cache: whole files, shared with every other tool, and parts of files.

Layout, in the cache's own folder of the repository: `blobs/<etag>` and `snapshots/<commit>/<name>` are the cache's.
`kittybuild/blobs/<etag>` has ranges of a file, and `kittybuild/<commit>/` looks like the whole checkpoint: its links
lead to the one or the other. Nothing becomes a blob of the cache before its digest was seen to be the lock's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress

from kittybuild.checkpoint.folder import VIEWS
from kittybuild.checkpoint.sources.ranges import Range, Ranges, joined, size_of, without
from kittybuild.checkpoint.sources.web import Resource, Web, differs
from kittybuild.errors import SourceError
from kittybuild.model.lock import FilePin, Pin

Advance = Callable[[int], None]

GAP = 1 << 18  # bytes that cost less than one more request


def nothing(nbytes: int) -> None:
    """Hears how many more bytes came, and does nothing."""


class Cached:
    """The files of one pinned repository. Any thread may use it."""

    def __init__(self, pin: Pin, web: Web) -> None:
        from huggingface_hub import constants

        self.pin, self.web = pin, web
        self.repository, self.commit = pin.facts["repository"], pin.facts["commit"]
        self.folder = os.path.join(constants.HF_HUB_CACHE, f"models--{self.repository.replace('/', '--')}")
        self.view = os.path.join(self.folder, VIEWS, self.commit)
        self.files = {file.name: file for file in pin.files}
        self._have: dict[str, tuple[Range, ...]] = {}

    def path(self, name: str) -> str:
        """Where a file is seen, whole or not."""
        return os.path.join(self.view, *name.split("/"))

    def whole(self, name: str) -> bool:
        """Whether all of a file is here, and was seen to be what the lock says."""
        found = self._found(self.files[name])
        return found is not None and self._seen(self.files[name]) == _stat(found)

    def missing(self, name: str, ranges: Iterable[Range]) -> int:
        """How many bytes of these ranges must be downloaded."""
        file = self.files[name]
        return 0 if self._found(file) else size_of(without(ranges, self._ranges(file).here()))

    def bring(self, name: str, ranges: Iterable[Range], advance: Advance = nothing) -> None:
        """See that these ranges of a file are here; they are not verified. Raises SourceError KB250 to KB259."""
        file, ranges = self.files[name], joined(ranges, GAP)
        found = self._found(file)
        if found is None and not without(ranges, self._have.get(name, ())):
            return
        with _writable(self.folder):
            if found is None:
                self._have[name] = self._fill(file, ranges, advance)
            self._show(file, found or self._ranges(file).path)

    def bring_whole(self, name: str, advance: Advance = nothing) -> None:
        """See that a file is here and what the lock says. Raises SourceError KB250 to KB259."""
        file = self.files[name]
        found = self._found(file)
        with _writable(self.folder):
            if found is None:
                found = self._download(file, advance)
            elif self._seen(file) != _stat(found):
                if not _is(file, found):
                    hint = "delete that file: it is damaged, or another than the lock says"
                    raise SourceError("KB256", f"{self._resource(file)} in the cache is damaged", at=found, hint=hint)
                self._mark(file, found)
            self._show(file, found)

    def place(self, name: str) -> None:
        """Have a file in the view, whatever is here of it."""
        self.bring(name, ((0, min(1, self.files[name].size)),))

    def _found(self, file: FilePin) -> str | None:
        """The whole file in the cache, of the right size."""
        for path in (os.path.join(self.folder, "snapshots", self.commit, *file.name.split("/")), self._blob(file)):
            with suppress(OSError):
                if os.stat(path).st_size == file.size:
                    return path
        return None

    def _blob(self, file: FilePin) -> str:
        return os.path.join(self.folder, "blobs", _etag(file))

    def _ranges(self, file: FilePin) -> Ranges:
        return Ranges(os.path.join(self.folder, VIEWS, "blobs", _etag(file)), file.size)

    def _resource(self, file: FilePin) -> Resource:
        return Resource(self.repository, self.commit, file.name, file.size, _etag(file))

    def _fill(self, file: FilePin, ranges: Iterable[Range], advance: Advance) -> tuple[Range, ...]:
        """Download what is missing of these ranges; all that is here then."""
        with self._ranges(file).writing() as writer:
            for start, stop in without(ranges, writer.done):
                for at, data in self.web.read(self._resource(file), start, stop):
                    writer.write(at, data)
                    advance(len(data))
            return tuple(writer.done)

    def _download(self, file: FilePin, advance: Advance) -> str:
        """The blob of a file, downloaded, verified, and given to the cache."""
        part, blob = self._ranges(file), self._blob(file)
        self._fill(file, ((0, file.size),), advance)
        with part.writing():  # of several processes one gives it to the cache
            if self._found(file) is None:
                if not _is(file, part.path):
                    part.remove()
                    raise differs(self._resource(file), "its content")
                os.makedirs(os.path.dirname(blob), exist_ok=True)
                os.replace(part.path, blob)
                self._mark(file, blob)
        part.remove()
        snapshot = os.path.join(self.folder, "snapshots", self.commit, *file.name.split("/"))
        if not os.path.lexists(snapshot):
            _link(blob, snapshot)
        return blob

    def _show(self, file: FilePin, path: str) -> None:
        seen = self.path(file.name)
        if os.path.realpath(seen) != os.path.realpath(path):
            _link(path, seen)

    # A note on what a file was when its digest was taken, so that it is not taken again and again.

    def _note(self, file: FilePin) -> str:
        return os.path.join(self.folder, VIEWS, "verified", f"{_etag(file)}.json")

    def _mark(self, file: FilePin, path: str) -> None:
        os.makedirs(os.path.dirname(self._note(file)), exist_ok=True)
        with open(self._note(file), "w", encoding="utf-8") as text:
            json.dump(_stat(path), text)

    def _seen(self, file: FilePin) -> list[int] | None:
        with suppress(OSError, ValueError), open(self._note(file), encoding="utf-8") as text:
            return json.load(text)  # type: ignore[no-any-return]  # whatever it is, it is only compared
        return None


def _etag(file: FilePin) -> str:
    """The name that the Hub and its cache have for the bytes of a file."""
    return file.git or file.sha256 or ""


def _stat(path: str) -> list[int]:
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _is(file: FilePin, path: str) -> bool:
    """Whether the bytes at `path` have the digests of a pin."""
    sha256, git = digests(path)
    return (file.sha256 in (None, sha256)) and (file.git in (None, git))


def digests(path: str) -> tuple[str, str]:
    """The SHA-256 of a file and the name that git gives it (SHA-1 of its size and its bytes)."""
    with open(path, "rb") as data:
        sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % os.fstat(data.fileno()).st_size)
        while block := data.read(1 << 20):
            sha256.update(block)
            git.update(block)
    return sha256.hexdigest(), git.hexdigest()


def _link(path: str, name: str) -> None:
    """Make or move the symbolic link `name`, which leads to `path` wherever the cache is moved."""
    folder = os.path.dirname(name)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{os.urandom(8).hex()}")
    os.symlink(os.path.relpath(path, os.path.realpath(folder)), temporary)
    os.replace(temporary, name)


class _writable:
    """Failures to write the cache, in our words."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            hint = "free some space there, or name another place with HF_HOME"
            message = f"cannot write the Hugging Face cache: {error.strerror}"
            raise SourceError("KB259", message, at=self.folder, hint=hint) from error
