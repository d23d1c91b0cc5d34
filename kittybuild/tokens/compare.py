"""What two vocabularies have in common, and the error where a recipe merges unequal ones without saying how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kittybuild.errors import PlanError
from kittybuild.tokens.vocabulary import Vocabulary

SHOWN = 4


@dataclass(frozen=True, slots=True)
class Difference:
    """How a vocabulary differs from a first one: tokens that only one of them has, tokens with other ids, and rows."""

    lost: tuple[str, ...]
    more: tuple[str, ...]
    moved: tuple[str, ...]
    rows: tuple[int, int]

    def __bool__(self) -> bool:
        return bool(self.lost or self.more or self.moved or self.rows[0] != self.rows[1])


def compare(first: Vocabulary, other: Vocabulary) -> Difference:
    """How `other` differs from `first`; false where their tables can be merged row by row. Tokens without a row, which
    a loader would number beyond the table, count for nothing."""
    rows = first.rows, other.rows
    if first.ids == other.ids:
        return Difference((), (), (), rows)
    lost = tuple(token for token in first.ids if first.row(token) >= 0 and other.row(token) < 0)
    more = tuple(token for token in other.ids if other.row(token) >= 0 and first.row(token) < 0)
    both = (token for token in first.ids if first.row(token) >= 0 and other.row(token) >= 0)
    return Difference(lost, more, tuple(token for token in both if first.ids[token] != other.ids[token]), rows)


def unequal(vocabularies: Mapping[str, Vocabulary], lead: str, at: str | None = None) -> PlanError | None:
    """The error KB330 for models (by the names that the recipe gives them) of unequal vocabularies, or None.

    `lead`: the model whose tokenizer the output gets, which the others are compared with. The hint is lines to copy.
    """
    first = vocabularies[lead]
    differences = {name: compare(first, vocabulary) for name, vocabulary in vocabularies.items() if name != lead}
    found = [line for name, difference in differences.items() for line in _lines(name, difference, first, vocabularies)]
    if not found:
        return None
    rows = min(vocabulary.rows for vocabulary in vocabularies.values())
    total = len({token for vocabulary in vocabularies.values() for token in vocabulary.ids})
    ways = {
        "base": f"the {len(first.ids)} tokens of {lead}, each with its own rows",
        "union": f"the {total} tokens of all, and where a model lacks one, a row of those that have it",
        "truncate": f"the first {rows} rows of each, row by row, whatever their tokens",
    }
    hint = "say what the output's tokens are, with one of these lines:"
    hint += "".join(f"\n    tokenizer_source: {way:<9} # {effect}" for way, effect in ways.items())
    message = f"the vocabularies of the models differ from that of {lead}:" + "".join(f"\n  {line}" for line in found)
    return PlanError("KB330", message, at=at, hint=hint)


def _lines(name: str, difference: Difference, first: Vocabulary, all_: Mapping[str, Vocabulary]) -> Iterable[str]:
    other = all_[name]
    if difference.rows[0] != difference.rows[1]:
        yield f"{name} has {difference.rows[1]} rows instead of {difference.rows[0]}"
    if difference.more:
        yield f"{name} has {_counted(difference.more)} more: {_some(f'{other.ids[t]} {t!r}' for t in difference.more)}"
    if difference.lost:
        yield f"{name} lacks {_counted(difference.lost)}: {_some(f'{first.ids[t]} {t!r}' for t in difference.lost)}"
    if difference.moved:
        shown = _some(f"{t!r} {other.ids[t]} instead of {first.ids[t]}" for t in difference.moved)
        yield f"{name} has other ids for {_counted(difference.moved)}: {shown}"


def _counted(tokens: tuple[str, ...]) -> str:
    return "1 token" if len(tokens) == 1 else f"{len(tokens)} tokens"


def _some(texts: Iterable[str]) -> str:
    shown = list(texts)
    return ", ".join(shown[:SHOWN]) + (", ..." if len(shown) > SHOWN else "")
