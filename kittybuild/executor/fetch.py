"""Bring what a plan needs of sources onto this machine, before anything is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from kittybuild.executor.events import Events
from kittybuild.planner.fetching import Download

AT_ONCE = 4


def fetch(needed: Sequence[Download], events: Events) -> int:
    """Download and verify; the bytes that came. Raises SourceError; what came is kept for the next time."""
    if not needed:
        return 0
    events.stage("download", sum(each.missing for each in needed))
    threads = ThreadPoolExecutor(AT_ONCE)
    try:
        for done in [threads.submit(_bring, each, events) for each in needed]:
            done.result()
    finally:
        threads.shutdown(cancel_futures=True)
    return sum(each.missing for each in needed)


def _bring(each: Download, events: Events) -> None:
    if each.whole:
        each.cached.bring_whole(each.name, events.advance)
    else:
        each.cached.bring(each.name, each.ranges, events.advance)
