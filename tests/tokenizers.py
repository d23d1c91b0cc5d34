"""Small tokenizers by hand, of every kind: byte-level BPE, BPE with byte fallback, WordPiece, unigram, word level."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kittybuild.model.recipe import ModelRef
from kittybuild.tokens.reading import FILES, read_vocabulary
from kittybuild.tokens.vocabulary import Vocabulary
from tests.helpers import pico_llama, write_json

Document = dict[str, Any]
Files = dict[str, bytes]


def byte_letters() -> list[str]:
    """The letters that stand for the 256 bytes in byte-level BPE, as GPT-2 has them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def byte_level(words: Iterable[str], added: Sequence[str] = (), *, first: int = 0, hole: int = 0) -> Document:
    """Byte-level BPE over bytes and words (`Ġ` is a space), each made of itself without its end, and its last letter.

    Ids begin at `first`; so many ids are left out before the words (`hole`).
    """
    vocab = {letter: first + number for number, letter in enumerate(byte_letters())}
    merges: list[list[str]] = []
    number = max(vocab.values()) + 1 + hole
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = number
                merges.append([word[: end - 1], word[end - 1]])
                number += 1
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    model = bpe_model(vocab, merges)
    return tokenizer(model, added, pre_tokenizer=step, decoder=step)


def byte_fallback(words: Iterable[str], added: Sequence[str] = ("<unk>", "<s>", "</s>")) -> Document:
    """BPE as sentencepiece has it: `▁` for a space, bytes as `<0x41>`, special tokens at the front."""
    vocab = {token: number for number, token in enumerate([*added, *(f"<0x{byte:02X}>" for byte in range(256))])}
    merges: list[list[str]] = []
    for letter in sorted({"▁", *"".join(words)}):
        vocab[letter] = len(vocab)
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append([word[: end - 1], word[end - 1]])
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    model = bpe_model(vocab, merges) | {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    normalizer = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoder = {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    return tokenizer(model, added, normalizer=normalizer, decoder=decoder)


def bpe_model(vocab: Mapping[str, int], merges: Sequence[Sequence[str]]) -> Document:
    """The model of a BPE tokenizer."""
    plain = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    plain |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}  # type: ignore[dict-item]
    return {"type": "BPE", **plain, "vocab": dict(vocab), "merges": list(merges)}


def wordpiece(words: Iterable[str], added: Sequence[str] = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")) -> Document:
    """WordPiece over letters and words; pieces inside of words begin with `##`."""
    letters = [chr(code) for code in range(97, 123)]
    tokens = list(dict.fromkeys([*added, *letters, *(f"##{letter}" for letter in letters), *words]))
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    vocab = {token: number for number, token in enumerate(tokens)}
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    model |= {"max_input_chars_per_word": 100, "vocab": vocab}  # type: ignore[dict-item]
    return tokenizer(model, added, pre_tokenizer={"type": "BertPreTokenizer"}, decoder=decoder)


def unigram(pieces: Mapping[str, float], added: Sequence[str] = ("<unk>", "<s>", "</s>")) -> Document:
    """Unigram over letters and pieces with their scores; `▁` for a space."""
    letters = {chr(code): -10.0 for code in [*range(97, 123), 0x2581]}
    vocab = [*([token, 0.0] for token in added), *([token, score] for token, score in {**letters, **pieces}.items())]
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    model = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False}
    return tokenizer(model, added, pre_tokenizer=step, decoder=step)


def word_level(words: Sequence[str], added: Sequence[str] = ("<unk>",)) -> Document:
    """Whole words between spaces."""
    vocab = {token: number for number, token in enumerate([*added, *words])}
    model = {"type": "WordLevel", "unk_token": "<unk>", "vocab": vocab}
    return tokenizer(model, added, pre_tokenizer={"type": "Whitespace"})


def tokenizer(model: Document, added: Sequence[str], **steps: Any) -> Document:
    """A tokenizer.json: added tokens in `<..>` or `[..]` are special; ids of those that the model lacks are counted."""
    pieces = model["vocab"]
    known = {piece[0]: n for n, piece in enumerate(pieces)} if isinstance(pieces, list) else pieces
    listed, number = [], len(known)
    for token in added:
        place = known.get(token, number)
        number = max(number, place + 1)
        listed.append(added_entry(token, place))
    plain = {"truncation": None, "padding": None, "added_tokens": listed, "normalizer": None, "pre_tokenizer": None}
    return {"version": "1.0", **plain, "post_processor": None, "decoder": None, **steps, "model": model}


def added_entry(token: str, number: int, **flags: bool) -> Document:
    """An entry of `added_tokens`."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": token[0] in "<["}
    return {"id": number, "content": token, **plain, **flags}


def files_of(document: Document, config: Document | None = None, **others: Any) -> Files:
    """The files of a tokenizer; `special_tokens_map={...}` is the file of that name."""
    found = {"tokenizer.json": json.dumps(document, indent=2, ensure_ascii=False).encode()}
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    found["tokenizer_config.json"] = json.dumps({**plain, **(config or {})}, indent=2).encode()
    return found | {f"{name}.json": json.dumps(value).encode() for name, value in others.items()}


def vocabularies(rows: Mapping[str, int] | None = None, **models: Files) -> dict[ModelRef, Vocabulary]:
    """The vocabularies of models by name, with as many rows as ids, or those of `rows`."""
    found = {}
    for name, files in models.items():
        vocabulary = read_vocabulary(files, 0, name)
        assert vocabulary is not None
        found[ModelRef(name)] = read_vocabulary(files, (rows or {}).get(name, vocabulary.end), name)
    return found  # type: ignore[return-value]


def by_ref(**models: Files) -> dict[ModelRef, Files]:
    """Files of models by name."""
    return {ModelRef(name): files for name, files in models.items()}


def read_files(folder: str | os.PathLike[str]) -> Files:
    """The tokenizer files in a folder."""
    return {name: (Path(folder) / name).read_bytes() for name in FILES if (Path(folder) / name).is_file()}


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    """A folder with these files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def model_with(folder: Path, seed: int, files: Files, *, rows: int | None = None, **options: Any) -> Path:
    """A pico Llama with this tokenizer, the ids of its roles, and tables of as many rows as it has ids, or `rows`."""
    vocabulary = read_vocabulary(files, 0, folder.name)
    assert vocabulary is not None
    pico_llama(folder, seed, vocab=rows or vocabulary.end, **options)
    numbers = {f"{role}_id": vocabulary.ids[token] for role, token in vocabulary.roles.items()}
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text(encoding="utf-8"))
        write_json(folder / name, {**config, "bos_token_id": None, "eos_token_id": None, **numbers})
    return write_files(folder, files)


def sentencepiece(pieces: Sequence[tuple[str, int]], *, bpe: bool = True) -> bytes:
    """A sentencepiece model of pieces and their types (1 plain, 2 unknown, 3 control, 4 user defined, 6 byte)."""

    def varint(number: int) -> bytes:
        low = bytes([number & 127 | (128 if number > 127 else 0)])
        return low + varint(number >> 7) if number > 127 else low

    def block(field: int, data: bytes) -> bytes:
        return varint(field << 3 | 2) + varint(len(data)) + data

    found = b""
    for text, kind in pieces:
        score = varint(2 << 3 | 5) + struct.pack("<f", -1.0)
        found += block(1, block(1, text.encode()) + score + varint(3 << 3) + varint(kind))
    trainer = varint(3 << 3) + varint(2 if bpe else 1) + varint(50 << 3 | 1) + struct.pack("<d", 0.5)
    return found + block(2, trainer) + block(3, block(1, b"identity"))
