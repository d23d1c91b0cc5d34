"""Which tokens of two vocabularies mean the same, whatever their tokenizers write for a space or a byte; and, for a
token that only one has, what comes nearest to it in the other: a byte's letter, its longest beginning, its pieces.

Pure: nothing depends on the order of a set, and among tokens of one meaning the first id counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kittybuild.errors import SourceError
from kittybuild.tokens.reading import TOKENIZER
from kittybuild.tokens.vocabulary import Vocabulary

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_PLAIN = (*range(33, 127), *range(161, 173), *range(174, 256))
_UNUSED = re.compile(r"unused|reserved|extra_id|(^|[^a-z])(pad|dummy|empty)ding?_?\d", re.IGNORECASE)

Meaning = tuple[str, str | bytes]
"""What a token is: (`role`, `eos_token`), (`special`, text), (`byte`, one byte) or (`text`, UTF-8 with its space)."""


def byte_letters() -> dict[str, int]:
    """The letters that stand for bytes in byte-level BPE (GPT-2's), with their bytes."""
    others = [byte for byte in range(256) if byte not in _PLAIN]
    return {chr(byte): byte for byte in _PLAIN} | {chr(256 + place): byte for place, byte in enumerate(others)}


@dataclass(frozen=True)
class Meanings:
    """The tokens of a vocabulary by what they mean."""

    vocabulary: Vocabulary

    @cached_property
    def _spelling(self) -> Callable[[str], bytes]:
        """What a plain token stands for in a text, with a space at its front where a word begins."""
        kind, ids = self.vocabulary.kind, self.vocabulary.ids
        letters = byte_letters()
        if kind == "WordPiece":
            return lambda token: (token[2:] if token.startswith("##") else f" {token}").encode()
        if kind == "BPE" and "Ġ" in ids:  # the letter of the space
            return lambda t: bytes(letters[c] for c in t) if all(c in letters for c in t) else t.encode()
        if kind == "WordLevel":
            return lambda token: token.encode()
        return lambda token: token.replace("▁", " ").encode()

    def plain(self, token: str) -> bytes | None:
        """What a token stands for in a text; None for special tokens and bytes."""
        meaning = self.of(token)
        return meaning[1] if meaning[0] == "text" and isinstance(meaning[1], bytes) else None

    def of(self, token: str) -> Meaning:
        """What a token means, its role aside."""
        added = self.vocabulary.added.get(token)
        if added is not None and added.special:
            return "special", token
        if match := _BYTE.fullmatch(token):
            return "byte", bytes.fromhex(match[1])
        return "text", token.encode() if added is not None else self._spelling(token)

    @cached_property
    def rows(self) -> Mapping[Meaning, int]:
        """The row of each meaning; roles are meanings of their own, beside that of their token."""
        found: dict[Meaning, int] = {}
        for token in self.vocabulary.ids:
            if (row := self.vocabulary.row(token)) >= 0:
                found.setdefault(self.of(token), row)
        for role, token in self.vocabulary.roles.items():
            if (row := self.vocabulary.row(token)) >= 0:
                found["role", role] = row
        return found

    def unused(self) -> tuple[int, ...]:
        """The rows that nobody trained, as names and holes tell."""
        names = (n for token, n in self.vocabulary.ids.items() if n < self.vocabulary.rows and _UNUSED.search(token))
        return tuple(sorted({*names, *filter(self.vocabulary.spare, range(self.vocabulary.rows))}))


@dataclass(frozen=True)
class Matching:
    """For each row of the donor's table: the model's row of the same meaning (`same`), or one that stands in for it
    (`alike`, if byte or prefix matches are wanted); -1 where there is none, or no token."""

    same: tuple[int, ...]
    alike: tuple[int, ...]


def match(model: Vocabulary, donor: Vocabulary, *, by_byte: bool = False, by_prefix: bool = False) -> Matching:
    """How the model's tokens serve the donor's.

    A token with a role (eos and the like) is first of all the model's token of that role. `by_byte`: `<0x41>` stands in
    for `A`, and the other way round. `by_prefix`: so does the longest beginning of a text that is a token.
    """
    ours, theirs = Meanings(model), Meanings(donor)
    roles: dict[str, list[str]] = {}
    for role, token in donor.roles.items():
        roles.setdefault(token, []).append(role)
    same, alike = [-1] * donor.rows, [-1] * donor.rows
    for token, number in donor.ids.items():
        if number >= donor.rows:
            continue
        meanings: list[Meaning] = [("role", role) for role in roles.get(token, ())]
        meanings.append(theirs.of(token))
        same[number] = next((ours.rows[meaning] for meaning in meanings if meaning in ours.rows), -1)
        kind, text = meanings[-1]
        if same[number] < 0 and by_byte and len(text) == 1 and kind in ("byte", "text"):
            alike[number] = ours.rows.get(("text" if kind == "byte" else "byte", text), -1)
        if same[number] < 0 and alike[number] < 0 and by_prefix and kind == "text":
            beginnings = (ours.rows.get(("text", text[:end]), -1) for end in range(len(text) - 1, 0, -1))
            alike[number] = next((row for row in beginnings if row >= 0), -1)
    return Matching(tuple(same), tuple(alike))


def pieces(files: Mapping[str, bytes], model: Vocabulary, donor: Vocabulary, rows: Sequence[int]) -> list[list[int]]:
    """For each of these rows of the donor's table, the model's rows that its token's text is split into.

    Special tokens are split as their text; rows without a token, and texts that are no UTF-8, have no pieces. The
    model's tokenizer.json must be among its files.
    """
    from tokenizers import Tokenizer

    theirs = Meanings(donor)
    texts = []
    for row in rows:
        token = donor.tokens.get(row, "")
        text = theirs.plain(token) if token else b""
        texts.append(token if text is None else text.decode(errors="ignore"))
    try:
        tokenizer: Any = Tokenizer.from_str(files[TOKENIZER].decode())
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    except Exception as error:  # of whatever kind the library raises
        raise SourceError(
            "KB240", f"not a tokenizer: {error}", at=TOKENIZER, hint="download or copy it again"
        ) from error
    return [[number for number in encoding.ids if number < model.rows] for encoding in encodings]
