"""Requests to the Hub. The token goes to the Hub's own host only, and no error of ours repeats what a server said.

What may pass (429, 5xx, a cut connection) is tried again, each time after a longer wait; each failure has its way out.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kittybuild import __version__
from kittybuild.errors import SourceError

TRIES = 5
LONGEST_WAIT = 60.0
TIMEOUT = 30.0
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Resource:
    """A file in a repository at a commit, as the lock knows it. `etag`: its SHA-256, or its name in git."""

    repository: str
    commit: str
    name: str
    size: int
    etag: str

    def __str__(self) -> str:
        return f"{self.name} of {self.repository}"


class _Again(Exception):
    """What may go better the next time, after `wait` seconds at least; `error` says it if it does not."""

    def __init__(self, error: SourceError, wait: float = 0.0) -> None:
        super().__init__(error.message)
        self.error, self.wait = error, wait


class Web:
    """The Hub over the network. `offline`: every request is SourceError KB250. `pause`: seconds before a second try."""

    def __init__(self, *, offline: bool = False, pause: float = 0.5, tries: int = TRIES) -> None:
        self.offline, self.pause, self.tries = offline, pause, tries

    def info(self, repository: str, revision: str | None) -> Any:
        """What the Hub says of a repository at a revision, its files with sizes and digests. Raises SourceError."""
        what = f"{repository}@{revision}" if revision else repository
        return self.ask(
            what, lambda api: api.model_info(repository, revision=revision, files_metadata=True, timeout=TIMEOUT)
        )

    def ask(self, what: str, question: Callable[[Any], Any]) -> Any:
        """What `question` answers, given the client's HfApi; what may pass is asked again. Raises SourceError."""
        self._need(what)
        api, failures = self.client(), 0
        while True:
            try:
                with _told(what):
                    return question(api)
            except (
                ValueError,
                TypeError,
                LookupError,
                AttributeError,
                RecursionError,
            ) as error:  # the client's parsing
                raise nonsense(what) from error
            except _Again as again:
                failures += 1
                self._wait(again, failures)

    def client(self) -> Any:
        """The client for all but the bytes of files."""
        from huggingface_hub import HfApi

        return HfApi(library_name="kittybuild", library_version=__version__)

    def read(self, file: Resource, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
        """The bytes from `start` to `stop` of a file, as (offset, bytes); a cut answer is gone on with.

        Raises SourceError KB250 to KB257.
        """
        self._need(str(file))
        failures = 0
        while start < stop:
            before = start
            try:
                for data in self._answer(file, start, stop):
                    yield start, data
                    start += len(data)
                if start < stop:
                    raise _Again(_lies(file, f"the answer ends {stop - start} bytes too early"))
            except _Again as again:
                failures = 1 if start > before else failures + 1
                self._wait(again, failures)

    def _need(self, what: str) -> None:
        if self.offline:
            message = f"{what} is not on this machine, and --offline forbids to connect"
            raise SourceError("KB250", message, hint="run it once without --offline, or name a folder that is here")

    def _wait(self, again: _Again, failures: int) -> None:
        """Before the next try: longer each time, by chance up to twice as long, so that not all come back at once."""
        if failures >= self.tries:
            raise again.error from None
        chance = 1 + os.urandom(1)[0] / 255
        time.sleep(min(LONGEST_WAIT, max(again.wait, self.pause * 2 ** (failures - 1)) * chance))

    def _answer(self, file: Resource, start: int, stop: int) -> Iterator[bytes]:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        headers = build_hf_headers(library_name="kittybuild", library_version=__version__)
        # Compression would change what a range means.
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        url = hf_hub_url(file.repository, file.name, revision=file.commit)
        with _told(str(file)):  # on the way to another host the client leaves the token out
            request = get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT)
            with request as response:
                if response.status_code >= 400:
                    raise _problem(response, str(file))
                at = _begin(file, response, start)
                for data in response.iter_raw():  # as it comes: what waits for a fuller block is lost with a cut
                    wanted = data[max(0, start - at) : max(0, stop - at)]
                    at += len(data)
                    if wanted:
                        yield wanted
                    if at >= stop:
                        return


def _begin(file: Resource, response: Any, start: int) -> int:
    """The offset at which an answer begins; raises SourceError where it is about other bytes than the lock says."""
    first = response.history[0] if response.history else response
    etag = first.headers.get("X-Linked-Etag") or response.headers.get("ETag") or ""
    etag = etag.removeprefix("W/").strip('"')
    if _DIGEST.fullmatch(etag) and len(etag) == len(file.etag) and etag != file.etag:
        raise differs(file, "its ETag")
    if response.status_code == 200:  # the whole file, from a server that knows no ranges
        size = response.headers.get("Content-Length")
        if size is not None and size != str(file.size):
            raise _lies(file, f"the server says {size[:20]} bytes, the lock {file.size}")
        return 0
    match = _RANGE.fullmatch(response.headers.get("Content-Range") or "")
    if response.status_code != 206 or not match or int(match[1]) != start:
        raise _lies(file, "the answer is not the range that was asked for")
    if int(match[3]) != file.size:
        raise _lies(file, f"the server says {match[3]} bytes, the lock {file.size}")
    return start


def differs(file: Resource, what: str) -> SourceError:
    """The error for a file that is not what its pin says."""
    hint = "nothing of it was used. If the change is meant, move the pin with `kittybuild lock RECIPE --update NAME`"
    return SourceError("KB256", f"{file} is not what the lock says: {what} differs", hint=hint)


def nonsense(what: str, why: str = "") -> SourceError:
    """The error for an answer that is none."""
    hint = "try again later; if it stays so, the repository or a proxy on the way is broken"
    return SourceError("KB257", f"the Hub's answer on {what} makes no sense{why}", hint=hint)


def _lies(file: Resource, message: str) -> SourceError:
    hint = "try again later; if it stays so, the repository or a proxy on the way is broken"
    return SourceError("KB257", f"{file}: {message}", hint=hint)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Failures of the client in our words. What it says itself may hold addresses with secrets in them."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.errors import HTTPError as ClientError  # type: ignore[attr-defined]  # httpx's or httpx2's

    try:
        yield
    except OfflineModeIsEnabled:
        hint = "unset HF_HUB_OFFLINE, or have the files in the cache"
        raise SourceError("KB250", f"{what} is not on this machine, and HF_HUB_OFFLINE is set", hint=hint) from None
    except HfHubHTTPError as error:
        raise _problem(error.response, what) from None
    except HFValidationError:
        message = f"{what} cannot be a repository"
        raise SourceError("KB251", message, hint="a repository is ORGANISATION/NAME") from None
    except (ClientError, OSError):
        hint = "check the connection (and HF_ENDPOINT, if it is set); with lock and cache --offline needs none"
        raise _Again(SourceError("KB250", f"no connection to the Hub for {what}", hint=hint)) from None


def _problem(response: Any, what: str) -> Exception:
    """What a failed answer means, and the way out."""
    status, code = response.status_code, response.headers.get("X-Error-Code")
    if status == 429:
        message = f"the Hub asks to wait: too many requests (429), the last for {what}"
        error = SourceError("KB255", message, hint=f"wait some minutes and run it again; or {LOG_IN}")
        return _Again(error, _seconds(response.headers.get("Retry-After")))
    if status == 408 or status >= 500:
        return _Again(SourceError("KB255", f"the Hub fails on {what} (status {status})", hint="run it again later"))
    if code == "GatedRepo":
        hint = f"ask for access on its page on the Hub with your account, then {LOG_IN}"
        return SourceError("KB252", f"{what} is gated: it is for those who accepted its terms", hint=hint)
    if code == "RevisionNotFound":
        hint = "give a branch, a tag or a commit that it has; without `revision` it is `main`"
        return SourceError("KB253", f"{what}: there is no such revision", hint=hint)
    if code == "EntryNotFound":
        hint = "move the pin with `kittybuild lock RECIPE --update NAME`"
        return SourceError("KB254", f"{what} is not there any more", hint=hint)
    refused = response.headers.get("X-Error-Message") == "Invalid credentials in Authorization header"
    if status == 403 or refused:
        message = f"the Hub refuses {what} with this token" if refused else f"the Hub forbids {what} (403)"
        return SourceError("KB252", message, hint=f"use a token that may read it: {LOG_IN}")
    if status in (401, 404):
        hint = f"check the name; if it is private, {LOG_IN}"
        return SourceError("KB251", f"the Hub has no {what} that you may read", hint=hint)
    return SourceError("KB255", f"the Hub fails on {what} (status {status})", hint="run it again later")


def _seconds(text: str | None) -> float:
    return float(text) if text and text.isdecimal() and len(text) < 6 else 0.0
