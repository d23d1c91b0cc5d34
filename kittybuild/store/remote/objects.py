"""Buckets through obstore: a folder, S3 and what speaks like it, GCS, Azure, HTTP and WebDAV, memory.

obstore is imported when a bucket is opened. It finds credentials as each provider's own tools do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from kittybuild.errors import RemoteError, nearest
from kittybuild.store.remote.bucket import WINDOW, Bucket, Listed, Piece, Retried, Unreachable

if TYPE_CHECKING:
    from obstore import GetResult, ObjectMeta
    from obstore.store import ObjectStore

SCHEMES = ("file", "s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl", "http", "https")
_TIMEOUT = timedelta(seconds=60)
_NO_RANGES = "Received non-partial response when range requested"
_MOST_BEGUN = 32


class Objects:
    """A store of obstore as a bucket."""

    def __init__(self, store: ObjectStore, where: str) -> None:
        self._store = store
        self.where = where
        self._ranges = True
        self._begun: dict[tuple[str, int], _Answer] = {}

    def read(self, name: str, start: int = 0, length: int = WINDOW) -> Piece | None:
        """See Bucket."""
        import obstore
        from obstore.exceptions import BaseError

        if not self._ranges:
            return self._passing(name, start, length)
        with _told(self.where):
            try:
                answer = obstore.get(self._store, name, options={"range": (start, start + length)})
                total = int(answer.meta["size"])
                begin, end = answer.range
                if begin != start or end - begin > length:
                    raise Unreachable(f"{name}: the answer is not the range that was asked for")
                data = memoryview(answer.bytes())
            except FileNotFoundError:
                return None
            except BaseError as error:
                if _NO_RANGES in str(error):
                    self._ranges = False
                    return self._passing(name, start, length)
                if start == 0 and obstore.head(self._store, name)["size"] == 0:  # which has no range
                    return Piece(memoryview(b""), 0)
                raise
        if len(data) != min(length, total - start):
            raise Unreachable(f"{name}: the answer ends too early")
        return Piece(data, total)

    def _passing(self, name: str, start: int, length: int) -> Piece | None:
        """The same from a server that knows no ranges: the next bytes of an answer that was begun, or of a new one."""
        import obstore

        with _told(self.where):
            answer = self._begun.pop((name, start), None)
            try:
                answer = answer or _Answer(obstore.get(self._store, name), start)
            except FileNotFoundError:
                return None
            data = answer.next(length)
        if start + len(data) < answer.total:
            self._begun[(name, start + len(data))] = answer
            while len(self._begun) > _MOST_BEGUN:
                self._begun.pop(next(iter(self._begun)), None)
        return Piece(data, answer.total)

    def put(self, name: str, data: memoryview) -> None:
        """See Bucket."""
        import obstore

        with _told(self.where):
            obstore.put(self._store, name, data, use_multipart=len(data) > 8 * WINDOW and not self._http)

    @property
    def _http(self) -> bool:
        from obstore.store import HTTPStore

        return isinstance(self._store, HTTPStore)

    def head(self, name: str) -> Listed | None:
        """See Bucket."""
        import obstore

        with _told(self.where):
            try:
                return _listed(name, obstore.head(self._store, name))
            except FileNotFoundError:
                return None

    def list(self, folder: str) -> Iterator[Listed]:
        """See Bucket."""
        import obstore

        with _told(self.where):
            try:
                if self._http:
                    yield from self._walk(folder)
                    return
                for some in obstore.list(self._store, folder):
                    for each in some:
                        yield _listed(str(each["path"]), each)
            except FileNotFoundError:
                return

    def _walk(self, folder: str) -> Iterator[Listed]:
        """The same folder by folder: WebDAV servers forbid to list all at once. Their names begin with the URL's path,
        and a folder is listed in itself."""
        import obstore

        base = urlsplit(self.where).path.strip("/") + "/"
        found = obstore.list_with_delimiter(self._store, folder)
        for each in found["objects"]:
            yield _listed(str(each["path"]).removeprefix(base), each)
        for inner in found["common_prefixes"]:
            if (name := str(inner).removeprefix(base)).startswith(f"{folder}/"):
                yield from self._walk(name)

    def delete(self, name: str) -> None:
        """See Bucket."""
        import obstore

        with _told(self.where):
            try:
                obstore.delete(self._store, name)
            except FileNotFoundError:
                return


def _listed(name: str, meta: ObjectMeta) -> Listed:
    return Listed(name, int(meta["size"]), meta["last_modified"].timestamp())


class _Answer:
    """The bytes of a whole object as they come, without the first `skip`."""

    def __init__(self, answer: GetResult, skip: int) -> None:
        self.total = int(answer.meta["size"])
        self._parts = iter(answer.stream(min_chunk_size=1 << 16))
        self._rest = b""
        while skip > 0:
            skip -= len(self.next(min(skip, WINDOW))) or skip

    def next(self, length: int) -> memoryview:
        """At most `length` bytes more, fewer only at the end."""
        data = bytearray(self._rest)
        while len(data) < length and (part := next(self._parts, None)) is not None:
            data += part
        self._rest = bytes(data[length:])
        return memoryview(data)[:length]


@contextmanager
def _told(where: str) -> Iterator[None]:
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, OSError, ValueError) as error:  # ValueError: a name with `..` in it
        raise Unreachable(_short(error)) from error


def _short(error: Exception) -> str:
    """What the library says, without the dump of its own structures."""
    return str(error).partition("\n\nDebug source")[0].strip().replace("\n", " ")[:400] or type(error).__name__


def connect(url: str) -> Bucket:
    """The bucket at a URL, or in a folder; nothing is asked of it yet. Raises RemoteError KB801.

    What stands behind `?` are obstore's own settings: `s3://bucket/team?endpoint=https://...&region=...`.
    """
    from obstore.exceptions import BaseError
    from obstore.store import LocalStore, from_url

    parts = urlsplit(url)
    if "://" not in url or parts.scheme == "file":
        folder = os.path.abspath(os.path.expanduser(parts.path if parts.scheme == "file" else url))
        try:
            os.makedirs(folder, exist_ok=True)
            return Retried(Objects(LocalStore(folder), url))
        except (BaseError, OSError) as error:
            raise RemoteError("KB801", f"cannot use this folder as a cache: {_short(error)}", at=url) from error
    if parts.scheme not in SCHEMES:
        hint = nearest(parts.scheme, SCHEMES)
        raise RemoteError("KB801", f"a cache cannot be at {parts.scheme}://", at=url, hint=hint)
    plain = urlunsplit(parts._replace(query="", fragment=""))
    config: dict[str, Any] = dict(parse_qsl(parts.query))
    options: dict[str, Any] = {"allow_http": True, "timeout": _TIMEOUT, "connect_timeout": timedelta(seconds=10)}
    retry: dict[str, Any] = {
        "max_retries": 4,
        "retry_timeout": _TIMEOUT,
        "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
    }
    try:
        more = {"config": config} if config else {}
        store: Any = from_url(plain, client_options=options, retry_config=retry, **more)  # type: ignore[call-overload]
        return Retried(Objects(store, plain))
    except (BaseError, ValueError, TypeError) as error:
        raise RemoteError("KB801", f"not the address of a cache: {_short(error)}", at=plain) from error
