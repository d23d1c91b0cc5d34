"""The exception tree. Every error says what, where and the way out, and has a code and an exit status.

KittybuildError
├── UsageError    KB0xx  exit 2   a command's words
├── RecipeError   KB1xx  exit 3   the recipe's text
├── SourceError   KB2xx  exit 4   a checkpoint that we did not make
├── PlanError     KB3xx  exit 3   recipe and sources do not fit each other
├── BuildError    KB5xx  exit 5   a derivation or an output
├── VerifyError   KB6xx  exit 6   something is not what it says it is
├── StoreError    KB7xx  exit 7   the store
├── RemoteError   KB8xx  exit 8   a cache on another machine, or whom to trust
└── Problems             the exit status of its first error: several errors, reported at once
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any

MOST_NAMED = 20


class KittybuildError(Exception):
    """One problem: `code`, `message`, where (`at`), and the way out (`hint`)."""

    exit_status = 1

    def __init__(self, code: str, message: str, *, at: str | None = None, hint: str | None = None) -> None:
        self.code = code
        self.message = message
        self.at = at
        self.hint = hint
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors travel between processes: the state says it all, whatever a constructor asks for."""
        return _restored, (type(self), self.args, self.__dict__)

    def __str__(self) -> str:
        where = f"{self.at}: " if self.at else ""
        way_out = f"\n  hint: {self.hint}" if self.hint else ""
        return f"{where}{self.code}: {self.message}{way_out}"

    def to_json(self) -> dict[str, str | None]:
        """The error as `--json` prints it."""
        return {"code": self.code, "message": self.message, "at": self.at, "hint": self.hint}


class UsageError(KittybuildError):
    """The words of a command do not fit together."""

    exit_status = 2


class RecipeError(KittybuildError):
    """The text of a recipe is wrong."""

    exit_status = 3


class SourceError(KittybuildError):
    """A source is missing, damaged or of a kind that we cannot read."""

    exit_status = 4


class PlanError(KittybuildError):
    """Recipe and sources do not fit each other."""

    exit_status = 3


class BuildError(KittybuildError):
    """A derivation or an output could not be made."""

    exit_status = 5


class VerifyError(KittybuildError):
    """Something is not what it says it is."""

    exit_status = 6


class StoreError(KittybuildError):
    """The store cannot be read, written or trusted."""

    exit_status = 7


class RemoteError(KittybuildError):
    """A remote cache cannot be used as it was asked for, or somebody who is trusted is wrong."""

    exit_status = 8


class Problems(KittybuildError):
    """Several errors, all found before anything was done."""

    def __init__(self, errors: Iterable[KittybuildError]) -> None:
        self.errors = tuple(errors)
        first = self.errors[0]
        self.exit_status = first.exit_status
        super().__init__(first.code, "\n".join(str(error) for error in self.errors))

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


def _restored(kind: type[KittybuildError], args: tuple[Any, ...], state: dict[str, Any]) -> KittybuildError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


def raise_all(errors: Collection[KittybuildError]) -> None:
    """Raise nothing, the one error, or all of them at once."""
    if len(errors) == 1:
        raise next(iter(errors))
    if errors:
        raise Problems(errors)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known word, or else all of them (the first, if they are many)."""
    words = sorted(set(known))
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    more = f" and {len(words) - MOST_NAMED} more" if len(words) > MOST_NAMED else ""
    return f"known: {', '.join(words[:MOST_NAMED])}{more}" if words else "nothing is known here"
