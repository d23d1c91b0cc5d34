"""A progress bar by bytes, on standard error; silent where that is no terminal."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.progress import Progress

    from kittybuild.executor.events import Events


class Bar:
    """Shows one bar, stage after stage (executor.events.Events)."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None)

    def stage(self, name: str, nbytes: int) -> None:
        """See Events."""
        self._progress.update(self._task, description=name, total=nbytes, completed=0)

    def advance(self, nbytes: int) -> None:
        """See Events."""
        self._progress.advance(self._task, nbytes)

    def note(self, text: str) -> None:
        """See Events."""
        self._progress.console.print(text, markup=False)


class Quiet:
    """Prints notes only."""

    def stage(self, name: str, nbytes: int) -> None:
        """See Events."""

    def advance(self, nbytes: int) -> None:
        """See Events."""

    def note(self, text: str) -> None:
        """See Events."""
        click.echo(text, err=True)


@contextmanager
def shown() -> Iterator[Events]:
    """A listener for one build."""
    if not sys.stderr.isatty():
        yield Quiet()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield Bar(progress)
