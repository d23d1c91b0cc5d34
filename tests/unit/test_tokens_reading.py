"""Vocabularies as they are read, against what the tokenizers library and transformers themselves number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from kittybuild.errors import SourceError
from kittybuild.tokens.check import check_reading
from kittybuild.tokens.reading import read_vocabulary
from kittybuild.tokens.vocabulary import MOST_IDS, Vocabulary
from tests.tokenizers import (
    Document,
    Files,
    added_entry,
    byte_fallback,
    byte_level,
    files_of,
    sentencepiece,
    unigram,
    word_level,
    wordpiece,
    write_files,
)

KINDS = {
    "BPE": byte_level(["Ġthe", "ing"], ["</s>", "<b>"]),
    "BPE with byte fallback": byte_fallback(["▁the", "ing"]),
    "BPE with a hole": byte_level(["Ġthe"], hole=9),
    "WordPiece": wordpiece(["the", "##ing"]),
    "Unigram": unigram({"▁the": -3.0, "ing": -4.0}, ["<unk>", "</s>"]),
    "WordLevel": word_level(["the", "cat"]),
}


def read(files: Files, rows: int = 1000) -> Vocabulary:
    found = read_vocabulary(files, rows, "model")
    assert found is not None
    return found


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_numbered_as_the_library_does(name: str) -> None:
    files = files_of(KINDS[name])
    found = read(files)
    assert found.ids == Tokenizer.from_str(files["tokenizer.json"].decode()).get_vocab(with_added_tokens=True)
    assert list(found.ids.values()) == sorted(found.ids.values())
    assert found.kind == name.partition(" ")[0]
    assert list(found.added) == [entry["content"] for entry in KINDS[name]["added_tokens"]]
    check_reading(files, found, "model")


def test_an_older_file_does_not_name_its_kind() -> None:
    for document in (KINDS["BPE"], KINDS["WordPiece"], KINDS["Unigram"], KINDS["WordLevel"]):
        model = {key: value for key, value in document["model"].items() if key != "type"}
        assert read(files_of({**document, "model": model})).kind == document["model"]["type"]


def test_ids_are_those_that_loading_gives_whatever_the_file_says() -> None:
    document = byte_level(["Ġthe"])
    end = len(document["model"]["vocab"])
    document["added_tokens"] = [added_entry("<x>", 900), added_entry("Ġthe", 3), added_entry("<y>", 901)]
    found = read(files_of(document))
    assert (found.ids["<x>"], found.ids["<y>"], found.ids["Ġthe"]) == (end, end + 1, end - 1)
    check_reading(files_of(document), found, "model")


def test_rows_and_holes() -> None:
    files = files_of(byte_level(["Ġthe"], hole=5))
    found = read_vocabulary(files, 270, "model")
    assert found is not None
    assert (found.end, found.row("Ġt"), found.row("Ġthe"), found.row("nothing")) == (264, 261, 263, -1)
    assert [row for row in range(300) if found.spare(row)] == [*range(256, 261), *range(264, 270)]
    short = read_vocabulary(files, 262, "model")
    assert short is not None
    assert (short.row("Ġt"), short.row("Ġth"), short.beyond()) == (261, -1, ("Ġth", "Ġthe"))


def decoder(**tokens: int) -> Document:
    return {str(number): added_entry(token, 0, special=True) | {"id": None} for token, number in tokens.items()}


PLAIN = byte_level(["th"], ["</s>"])  # 256 bytes, th 256, </s> 257
BESIDE: dict[str, tuple[Document, Document]] = {
    "nothing": ({"eos_token": "</s>"}, {}),
    "roles that are missing": (
        {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<u>", "additional_special_tokens": ["<x>", "</s>"]},
        {},
    ),
    "roles with flags": ({"mask_token": {"content": "<m>", "lstrip": True, "__type": "AddedToken"}}, {}),
    "a decoder": ({"added_tokens_decoder": decoder(**{"</s>": 257, "zz": 270, "yy": 260})}, {}),
    "a decoder and a role": ({"pad_token": "p", "added_tokens_decoder": decoder(zz=270)}, {}),
    "added_tokens.json": ({}, {"added_tokens": {"bb": 262, "aa": 258}}),
    "both": ({"added_tokens_decoder": decoder(zz=270)}, {"added_tokens": {"aa": 258, "bb": 262}}),
    "a map": ({}, {"special_tokens_map": {"eos_token": "</s>", "pad_token": {"content": "<p>"}}}),
    "a map against the config": ({"eos_token": "<e>"}, {"special_tokens_map": {"eos_token": "</s>"}}),
    "tokens of models that see": ({"extra_special_tokens": {"image_token": "<img>"}}, {}),
    "more special tokens": ({"extra_special_tokens": ["<img>"]}, {}),
}


@pytest.mark.parametrize("name", BESIDE)
def test_tokens_of_other_files_are_numbered_as_transformers_does(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config, others = BESIDE[name]
    files = files_of(PLAIN, config, **others)
    loaded = AutoTokenizer.from_pretrained(write_files(tmp_path / "t", files))
    found = read(files)
    assert found.ids == loaded.get_vocab()
    assert set(found.unlisted) == set(found.ids) - {*PLAIN["model"]["vocab"], "</s>"}
    assert found.roles.get("eos_token") == loaded.eos_token


def test_a_token_that_would_take_the_id_of_another_is_none() -> None:
    """Counted ids may meet those behind a hole; what a loader makes of that has no row of its own."""
    document = byte_level(["th"], hole=1)  # 256 bytes and th 257: 257 tokens
    found = read(files_of(document, {"pad_token": "<pad>"}))
    assert "<pad>" not in found.ids
    assert found.roles == {}


def test_files_of_slow_tokenizers() -> None:
    bpe = {"vocab.json": b'{"b": 1, "a": 0, "ab": 2}', "added_tokens.json": b'{"<x>": 5}'}
    found = read(bpe)
    assert (found.kind, list(found.ids.items())) == ("BPE", [("a", 0), ("b", 1), ("ab", 2), ("<x>", 5)])
    found = read({"vocab.txt": b"[PAD]\r\na\n##b\n"})
    assert (found.kind, dict(found.ids)) == ("WordPiece", {"[PAD]": 0, "a": 1, "##b": 2})


def test_a_sentencepiece_model() -> None:
    pieces = [("<unk>", 2), ("<s>", 3), ("<0x41>", 6), ("▁the", 1), ("[INST]", 4)] + [(f"w{n}", 1) for n in range(200)]
    found = read({"tokenizer.model": sentencepiece(pieces), "added_tokens.json": b'{"<pad>": 300}'})
    assert found.kind == "BPE"
    assert list(found.ids.items())[:5] == [("<unk>", 0), ("<s>", 1), ("<0x41>", 2), ("▁the", 3), ("[INST]", 4)]
    assert found.ids["<pad>"] == 300
    assert {token: flags.special for token, flags in found.added.items()} == {
        "<unk>": True,
        "<s>": True,
        "[INST]": False,
        "<pad>": False,
    }
    assert read({"tokenizer.model": sentencepiece(pieces, bpe=False)}).kind == "Unigram"


def test_the_best_file_is_read() -> None:
    files = {**files_of(PLAIN), "vocab.json": b"{}", "tokenizer.model": b"?", "vocab.txt": b""}
    assert read(files).ids == read(files_of(PLAIN)).ids


def test_no_tokenizer_is_no_vocabulary() -> None:
    assert read_vocabulary({"tokenizer_config.json": b"{}"}, 10, "model") is None


BAD: dict[str, tuple[str, Any]] = {
    "no JSON": ("tokenizer.json", "{"),
    "no object": ("tokenizer.json", []),
    "nothing in it": ("tokenizer.json", {}),
    "an unknown kind": ("tokenizer.json", {"model": {"type": "Magic", "vocab": {}}}),
    "ids that are texts": ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": "1"}, "merges": []}}),
    "one id twice": ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 1, "b": 1}, "merges": []}}),
    "a negative id": ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}),
    "an id that fills the disk": ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": MOST_IDS}, "merges": []}}),
    "half a surrogate": ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"\\ud800": 1}, "merges": []}}'),
    "nested for ever": ("tokenizer.json", "[" * 200_000),
    "added tokens without text": ("tokenizer.json", {**PLAIN, "added_tokens": [{"id": 3}]}),
    "added tokens of numbers": ("tokenizer.json", {**PLAIN, "added_tokens": [{"id": 3, "content": 3}]}),
    "a config that is none": ("tokenizer_config.json", "null"),
    "a decoder of words": ("tokenizer_config.json", {"added_tokens_decoder": {"one": {"content": "x"}}}),
    "a map that is none": ("special_tokens_map.json", "7"),
    "vocab.txt in no UTF-8": ("vocab.txt", b"\xff\xfe"),
    "no sentencepiece": ("tokenizer.model", b"IQ== 0\nIg== 1\n"),
    "half a sentencepiece": ("tokenizer.model", sentencepiece([("a", 1), ("b", 1)])[:-5]),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_files_are_told(name: str) -> None:
    file, content = BAD[name]
    files = {} if file in ("vocab.txt", "tokenizer.model") else files_of(PLAIN)
    files[file] = content if isinstance(content, bytes) else content.encode() if isinstance(content, str) else b""
    if not isinstance(content, (bytes, str)):
        files[file] = json.dumps(content).encode()
    with pytest.raises(SourceError) as caught:
        read_vocabulary(files, 10, "model")
    assert (caught.value.code, str(caught.value.at).partition(":")[0]) == ("KB240", "model")
    assert caught.value.hint


def test_files_that_are_not_read_are_told() -> None:
    with pytest.raises(SourceError, match=r"only in tekken\.json") as caught:
        read_vocabulary({"tekken.json": b"{}"}, 10, "model")
    assert caught.value.code == "KB241"


def test_a_file_that_the_library_reads_otherwise_is_told() -> None:
    files = files_of(PLAIN)
    other = read(files_of(byte_level(["th"], ["</s>", "<more>"])))
    with pytest.raises(SourceError, match="'<more>' has the id None, not 258"):
        check_reading(files, other, "model")
    damaged = {"tokenizer.json": json.dumps({**PLAIN, "pre_tokenizer": {"type": "Magic"}}).encode()}
    with pytest.raises(SourceError, match="not a tokenizer"):
        check_reading(damaged, read(files), "model")


def test_a_million_merges_are_read_in_a_moment() -> None:
    merges = [["a", "b"]] * 1_000_000
    document = {**PLAIN, "model": {**PLAIN["model"], "merges": merges}}
    assert len(read(files_of(document)).ids) == 258
