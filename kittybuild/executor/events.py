"""What a build tells while it runs. Listeners only listen: nothing that they do changes a build."""

from __future__ import annotations

from typing import Protocol


class Events(Protocol):
    """A listener; called from several threads."""

    def stage(self, name: str, nbytes: int) -> None:
        """A stage begins that will make or copy so many bytes."""

    def advance(self, nbytes: int) -> None:
        """So many more bytes are made or copied."""

    def note(self, text: str) -> None:
        """Something a person should know."""


class Silent:
    """Hears nothing."""

    def stage(self, name: str, nbytes: int) -> None:
        """See Events."""

    def advance(self, nbytes: int) -> None:
        """See Events."""

    def note(self, text: str) -> None:
        """See Events."""
