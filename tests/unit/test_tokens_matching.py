"""Tokens that mean the same in two vocabularies, whatever stands for a space; and what stands in for the others."""

from __future__ import annotations

import pytest

from kittybuild.tokens.matching import Meanings, match, pieces
from kittybuild.tokens.vocabulary import Vocabulary
from tests.surgery import SPECIAL, tokenizers, vocabulary
from tests.tokenizers import Files, byte_fallback, byte_level, files_of, unigram, wordpiece

WORDS = ["the", "cat", "ing"]
BYTES = files_of(byte_level(["Ġthe", "cat", "ing", "Ã©t"], ["</s>"]), {"eos_token": "</s>"})
PIECES = files_of(byte_fallback(["▁the", "cat", "ing", "ét"], SPECIAL), {"eos_token": "</s>"})
WORDPIECE = files_of(wordpiece(["the", "##cat", "##ing"]))
UNIGRAM = files_of(unigram({"▁the": -1.0, "cat": -2.0, "ing": -3.0}))


def pairs(model: Files, donor: Files, **options: bool) -> dict[str, str]:
    """The model's token for each of the donor's that has one."""
    ours, theirs = vocabulary(model), vocabulary(donor)
    found = match(ours, theirs, **options)
    rows = [max(same, alike) for same, alike in zip(found.same, found.alike, strict=True)]
    return {theirs.tokens[n]: ours.tokens[row] for n, row in enumerate(rows) if row >= 0 and n in theirs.tokens}


@pytest.mark.parametrize(
    ("donor", "the", "inside"),
    [(PIECES, "▁the", "cat"), (WORDPIECE, "the", "##cat"), (UNIGRAM, "▁the", "cat"), (BYTES, "Ġthe", "cat")],
)
def test_a_word_is_the_same_however_its_space_is_written(donor: Files, the: str, inside: str) -> None:
    found = pairs(BYTES, donor)
    assert found[the] == "Ġthe"
    assert found[inside] == "cat"


def test_bytes_are_letters_in_utf8() -> None:
    found = pairs(BYTES, PIECES)
    assert found["ét"] == "Ã©t"
    assert "é" not in found or found["é"] == "Ã©"  # and not the letter that stands for the byte 0xE9


def test_special_tokens_match_by_role_then_by_text() -> None:
    model = files_of(byte_level([], ["<end>", "<x>", "</s>"]), {"eos_token": "<end>"})
    donor = files_of(byte_level([], ["</s>", "<x>", "<y>"]), {"eos_token": "</s>"})
    found = pairs(model, donor)
    assert (found["</s>"], found["<x>"]) == ("<end>", "<x>")
    assert "<y>" not in found


def test_bytes_stand_in_for_letters_where_that_is_wanted() -> None:
    assert "<0x41>" not in pairs(BYTES, PIECES)
    found = pairs(BYTES, PIECES, by_byte=True)
    assert (found["<0x41>"], found["<0x0A>"], found["<0xE9>"]) == ("A", "Ċ", "é")
    assert pairs(PIECES, BYTES, by_byte=True)["A"] == "<0x41>"


def test_beginnings_stand_in_the_longest_first_and_never_for_special_tokens() -> None:
    donor = files_of(byte_level(["Ġthey", "cats"], ["<pad>"]))
    found = pairs(BYTES, donor, by_prefix=True)
    assert (found["Ġthey"], found["cats"]) == ("Ġthe", "cat")
    assert "<pad>" not in found
    assert match(vocabulary(BYTES), vocabulary(donor), by_prefix=True).same[vocabulary(donor).ids["Ġthey"]] == -1


def test_rows_without_a_token_match_nothing_and_ids_beyond_the_table_are_none() -> None:
    ours = vocabulary(BYTES)
    found = match(ours, vocabulary(BYTES, ours.end + 3))
    assert found.same == (*range(ours.end), -1, -1, -1)
    assert match(vocabulary(BYTES, 100), ours).same == (*range(100), *[-1] * (ours.end - 100))


def test_a_text_is_split_as_the_models_tokenizer_does() -> None:
    from tokenizers import Tokenizer

    files = tokenizers()
    ours, theirs = vocabulary(files["one"]), vocabulary(files["three"])
    rows = [theirs.ids[token] for token in ("▁they", "<mask>", "<0x41>")]
    tokenizer = Tokenizer.from_str(files["one"]["tokenizer.json"].decode())
    wanted = [tokenizer.encode(text, add_special_tokens=False).ids for text in (" they", "<mask>", "<0x41>")]
    assert pieces(files["one"], ours, theirs, rows) == wanted


def test_unused_rows_are_known_by_their_names_and_by_having_none() -> None:
    ids = {"a": 0, "<unused1>": 1, "<|reserved_special_token_2|>": 2, "padding": 3, "<extra_id_7>": 5}
    assert Meanings(Vocabulary("WordLevel", ids, 7)).unused() == (1, 2, 4, 5, 6)
