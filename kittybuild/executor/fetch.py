"""Bring what a plan needs of sources onto this machine, before anything is made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from threading import Event

from kittybuild.executor.events import Events
from kittybuild.planner.fetching import Download

AT_ONCE = 4


def fetch(needed: Sequence[Download], events: Events) -> int:
    """Download and verify; the bytes that came. Raises SourceError; what came is kept for the next time."""
    if not needed:
        return 0
    over = Event()

    def advance(nbytes: int) -> None:
        events.advance(nbytes)
        if over.is_set():  # another failed, or somebody interrupted: what came is listed, and no more is waited for
            raise CancelledError

    events.stage("download", sum(each.missing for each in needed))
    threads = ThreadPoolExecutor(AT_ONCE)
    try:
        begun = [threads.submit(_bring, each, advance) for each in needed]
        for done in wait(begun, return_when=FIRST_EXCEPTION).done:
            done.result()
    finally:
        over.set()
        threads.shutdown(cancel_futures=True)
    return sum(each.missing for each in needed)


def _bring(each: Download, advance: Callable[[int], None]) -> None:
    if each.whole:
        each.cached.bring_whole(each.name, advance)
    else:
        each.cached.bring(each.name, each.ranges, advance)
