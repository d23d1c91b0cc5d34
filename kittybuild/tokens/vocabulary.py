"""A vocabulary as a value: tokens and their ids, which of them are found in a text as they stand, and the table's rows.

Ids may have holes, and a table may have more rows than there are ids, or fewer: `row` is the only way from one to the
other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

Kind = Literal["BPE", "WordPiece", "WordLevel", "Unigram"]

MOST_IDS = 10_000_000
"""No vocabulary has so many; an id beyond would be a table that fills the disk."""


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is found in a text before the text is split, as tokenizer.json describes it.

    `special`: left out where text without special tokens is asked for. `normalized`: looked for in the normalized text.
    `lstrip`, `rstrip`: takes the spaces at its side with it. `single_word`: not inside of words.
    """

    content: str
    special: bool = False
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    def to_json(self) -> dict[str, Any]:
        """The entry in tokenizer.json, without its id."""
        return {
            "content": self.content,
            "single_word": self.single_word,
            "lstrip": self.lstrip,
            "rstrip": self.rstrip,
            "normalized": self.normalized,
            "special": self.special,
        }


@dataclass(frozen=True)
class Vocabulary:
    """`ids`: all tokens, in the order of their ids, which are theirs alone. `added`: those found as they stand.

    `roles`: `eos_token` and the like, to tokens that are in `ids`. `rows`: of the tables that go with it (embedding,
    head). `unlisted`: tokens that the files bring in beside tokenizer.json's own: a loader gives them the next ids.
    """

    kind: Kind
    ids: Mapping[str, int]
    rows: int
    added: Mapping[str, AddedToken] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    unlisted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        numbers = list(self.ids.values())
        if numbers and not (numbers[0] >= 0 and numbers[-1] < MOST_IDS):
            raise ValueError(f"the ids go from {numbers[0]} to {numbers[-1]}")
        twice = next((after for before, after in pairwise(numbers) if before >= after), None)
        if twice is not None:
            raise ValueError(f"the id {twice} stands for two tokens, or out of order")

    @cached_property
    def tokens(self) -> Mapping[int, str]:
        """The token of each id."""
        return {number: token for token, number in self.ids.items()}

    @cached_property
    def end(self) -> int:
        """The first id after all that are used."""
        return max(self.ids.values(), default=-1) + 1

    def row(self, token: str) -> int:
        """The row of a token; -1 where it is unknown, or its id is beyond the table."""
        number = self.ids.get(token, -1)
        return number if number < self.rows else -1

    def spare(self, row: int) -> bool:
        """Whether a row of the table is no token's: a hole, or a filler at the end."""
        return row < self.rows and row not in self.tokens

    def beyond(self) -> tuple[str, ...]:
        """The tokens whose ids are beyond the table."""
        return tuple(token for token, number in self.ids.items() if number >= self.rows)

    def same_tokens(self, other: Vocabulary) -> bool:
        """Whether both have the same tokens with the same ids in tables of one size."""
        return self.rows == other.rows and self.ids == other.ids


def in_order(ids: Mapping[str, int]) -> dict[str, int]:
    """The same tokens, in the order of their ids."""
    return dict(sorted(ids.items(), key=lambda item: item[1]))
