"""The threads of one run: makers of tensors, fetchers, a finisher of packs, and a syncer that keeps the disk busy.

After the first error nothing new is begun, and that error is the one that is raised.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TypeVar

from kittybuild.store.remote.substituters import STREAMS

T = TypeVar("T")


class Crew:
    """A context manager; leaving it waits for what is under way, which `interrupt` cuts short."""

    def __init__(self, jobs: int, interrupt: Callable[[], None]) -> None:
        self._interrupt = interrupt
        self._makers = ThreadPoolExecutor(jobs, "make")
        self._fetchers = ThreadPoolExecutor(STREAMS, "fetch")
        self._finisher = ThreadPoolExecutor(1, "finish")
        self._syncer = ThreadPoolExecutor(1, "sync")
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def make(self, work: Callable[[], T]) -> Future[T]:
        """Have a maker do `work`."""
        return self._makers.submit(self._guarded, work)

    def fetch(self, work: Callable[[], T]) -> Future[T]:
        """Have a fetcher do `work`, which waits for the network, and may wait for makers."""
        return self._fetchers.submit(self._guarded, work)

    def finish(self, work: Callable[[], T]) -> Future[T]:
        """Have the finisher do `work`, which may wait for makers; it is done even after an error, to clean up."""
        return self._finisher.submit(self._noted, work)

    def sync(self, work: Callable[[], None]) -> None:
        """Have the syncer do `work` some time; what goes wrong in it shows elsewhere."""
        self._syncer.submit(work)

    def result(self, future: Future[T]) -> T:
        """What came of it; raises the first error of the whole crew."""
        try:
            return future.result()
        except BaseException as error:
            raise self._first(error) from None

    def _guarded(self, work: Callable[[], T]) -> T:
        if self._error is not None:
            raise CancelledError
        return self._noted(work)

    def _noted(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except BaseException as error:
            self._first(error)
            raise

    def _first(self, error: BaseException) -> BaseException:
        """Stop all; the first error that was not just a stop."""
        with self._lock:
            if self._error is None:
                self._error = error
            return self._error

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._first(error)
        if error is not None and not isinstance(error, Exception):  # a person does not want to wait
            self._interrupt()
        for pool in (self._fetchers, self._makers, self._finisher, self._syncer):
            pool.shutdown(wait=True)
