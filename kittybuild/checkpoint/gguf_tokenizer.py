"""The header of a GGUF file, and the tokenizer that its metadata describes.

No length in a header is believed before it is checked against the file. The tokenizer's files are written field by
field, so that their bytes depend on the header alone and not on the versions of the libraries.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, BinaryIO

from kittybuild.checkpoint.source import FileId
from kittybuild.errors import SourceError, nearest
from kittybuild.tensors import Shape

Tokens = Mapping[str, tuple[int, int]]  # text -> id and type

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
FILES = (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE)
OTHER_FILES = "use the safetensors files of the model"
OTHER_FOLDER = "name another folder of the model as `tokenizer`"

_DAMAGED = "the file is damaged or incomplete: get it again"
_WINDOW = 1 << 20
_MOST = 1 << 24  # no count and no text of a real header comes near this
_CODES = "BbHhIif?sAQqd"  # the value types, by number: struct's codes, s a text, A an array


@dataclass(frozen=True, slots=True)
class Unread:
    """A metadata array that nobody asked for."""

    count: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as the header has it, but `shape` in Hugging Face order and `offset` from the start of the file."""

    type: str
    shape: Shape
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """The metadata and the tensor table of a GGUF file, tensors by their GGUF names."""

    path: str
    file: FileId
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    def error(self, code: str, message: str, hint: str = _DAMAGED) -> SourceError:
        """An error about this file."""
        return SourceError(code, message, at=self.path, hint=hint)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`, or `default`; an error if it is of another kind."""
        value = self.metadata.get(key, default)
        if value is not None and type(value) is not kind:
            raise self.error("KB218", f"metadata {key} is not one {kind.__name__}: {value!r:.60}", OTHER_FILES)
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """The positive whole number `key`."""
        value = self.get(key, int, default)
        if value is None or value < 1:
            raise self.error("KB218", f"metadata {key} is {'missing' if value is None else value}", OTHER_FILES)
        return int(value)

    def real(self, key: str, default: float | None = None) -> float:
        """The positive number `key`, with the fewest digits that are the same float32."""
        import numpy

        value = self.get(key, float, default)
        if value is None or not 0 < value < math.inf:
            raise self.error("KB218", f"metadata {key} is {'missing' if value is None else value}", OTHER_FILES)
        return float(str(numpy.float32(value)))


class _Cursor:
    """Reads forward through a file and never past its end."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.file, self.path, self.at = file, path, 0
        self.length = os.fstat(file.fileno()).st_size
        self._window, self._start = b"", 0

    def error(self, message: str, code: str = "KB213", hint: str = _DAMAGED) -> SourceError:
        return SourceError(code, message, at=self.path, hint=hint)

    def skip(self, count: int) -> None:
        if count > self.length - self.at:
            raise self.error(f"the header says {count} bytes at {self.at}, past the end of the file ({self.length})")
        self.at += count

    def take(self, count: int) -> bytes:
        begin = self.at - self._start
        self.skip(count)
        if begin + count > len(self._window):
            self._start, begin = self.at - count, 0
            self.file.seek(self._start)
            self._window = self.file.read(max(count, _WINDOW))
            if len(self._window) < count:
                raise self.error("the file became shorter while it was read")
        return self._window[begin : begin + count]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, what: str) -> int:
        number = self.number("Q")
        if number > min(_MOST, self.length):
            raise self.error(f"the header says {number} {what}")
        return int(number)

    def text(self) -> str:
        at = self.at
        try:
            return self.take(self.count("bytes of text")).decode()
        except UnicodeDecodeError:
            raise self.error(f"the text at byte {at} is not UTF-8") from None

    def kind(self) -> str:
        raw = self.number("I")
        if raw >= len(_CODES):
            raise self.error(f"the value type {raw} at byte {self.at - 4} is unknown")
        return _CODES[raw]

    def value(self, keep: bool) -> Any:
        kind = self.kind()
        if kind == "s":
            return self.text()
        return self.array(keep) if kind == "A" else self.number(kind)

    def array(self, keep: bool) -> Any:
        kind, count = self.kind(), self.count("elements")
        if kind == "A":
            raise self.error(f"an array of arrays at byte {self.at}", "KB212", OTHER_FILES)
        if keep and kind == "s":
            return tuple(self.text() for _ in range(count))
        if keep:
            return struct.unpack(f"<{count}{kind}", self.take(count * struct.calcsize(f"<{kind}")))
        if kind == "s":
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            self.skip(count * struct.calcsize(f"<{kind}"))
        return Unread(count)


def read_header(path: str, arrays: Collection[str] = ()) -> Header:
    """The header of the GGUF file at `path`; of the metadata arrays, those named in `arrays` are read."""
    try:
        known = FileId.of(path)
        with open(path, "rb") as file:
            return _header(_Cursor(file, path), known, arrays)
    except OSError as error:
        hint = "check the path and its permissions"
        raise SourceError("KB210", f"cannot be read: {error.strerror}", at=path, hint=hint) from None


def _header(cursor: _Cursor, file: FileId, arrays: Collection[str]) -> Header:
    if cursor.length < 24 or cursor.take(4) != b"GGUF":
        raise cursor.error("not a GGUF file", "KB211", "check the path, and that the file is complete")
    version = cursor.number("I")
    if version not in (2, 3):
        what = "a big-endian GGUF file" if version & 0xFFFF == 0 else f"GGUF version {version}"
        raise cursor.error(f"{what} cannot be read: only little-endian versions 2 and 3", "KB212", OTHER_FILES)
    tensors, pairs = cursor.count("tensors"), cursor.count("metadata pairs")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.text()
        if key in metadata:
            raise cursor.error(f"metadata {key} is there twice")
        metadata[key] = cursor.value(key in arrays)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= _WINDOW or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment is {alignment!r}")
    return Header(cursor.path, file, MappingProxyType(metadata), _table(cursor, tensors, alignment))


def _table(cursor: _Cursor, count: int, alignment: int) -> Mapping[str, Stored]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    raw: dict[str, tuple[str, Shape, int, int]] = {}
    for _ in range(count):
        name, sides = cursor.text(), cursor.number("I")
        if name in raw or not 0 < sides <= 4:
            raise cursor.error(f"tensor {name} is there twice" if name in raw else f"{name} has {sides} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(sides))[::-1]
        number, offset = cursor.number("I"), cursor.number("Q")
        if number not in set(GGMLQuantizationType):
            raise cursor.error(f"tensor {name} has the unknown type {number}", "KB217", OTHER_FILES)
        kind = GGMLQuantizationType(number)
        block, size = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            raise cursor.error(f"tensor {name} of type {kind.name} has the impossible shape {list(shape)}")
        raw[name] = (kind.name, shape, offset, math.prod(shape) // block * size)
    start, end = cursor.at + -cursor.at % alignment, 0
    for name, (_, _, offset, nbytes) in sorted(raw.items(), key=lambda item: item[1][2]):
        if offset < end or offset % alignment or start + offset + nbytes > cursor.length:
            why = "overlaps" if offset < end else "is misaligned" if offset % alignment else "ends past the file"
            raise cursor.error(f"tensor {name} ({nbytes} bytes at {start + offset}) {why}", "KB214")
        end = offset + nbytes
    return MappingProxyType({name: Stored(kind, shape, start + at, n) for name, (kind, shape, at, n) in raw.items()})


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
)


@dataclass(frozen=True, slots=True)
class _Pre:
    """What a value of `tokenizer.ggml.pre` stands for: how text is split, in order, and what goes with it."""

    splits: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_DIGITS = _Pre((r"\p{N}", _GPT2))
_LLAMA3 = _Pre((_WORDS + r"\p{N}{1,3}" + _REST,), ignore_merges=True, add_bos=True)
_PRES = MappingProxyType(
    {
        "default": _Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
        "gpt-2": _Pre((_GPT2,)),
        "llama-bpe": _LLAMA3,
        "llama-v3": _LLAMA3,
        "llama3": _LLAMA3,
        "qwen2": _Pre((_WORDS + r"\p{N}" + _REST,), nfc=True),
        "refact": _DIGITS,
        "smollm": _DIGITS,
        "starcoder": _DIGITS,
        "tekken": _Pre((_CASED + r"\p{N}" + _REST.replace("n]*", "n/]*", 1),), ignore_merges=True, add_bos=True),
    }
)


def check_tokenizer(header: Header) -> None:
    """Raise the error that says why no tokenizer can be made from `header`, if none can."""
    model, pre = header.get("tokenizer.ggml.model", str), header.get("tokenizer.ggml.pre", str)
    if model not in ("gpt2", "llama") or "tokenizer.ggml.tokens" not in header.metadata:
        raise header.error("KB219", f"no tokenizer of the kind {model!r} can be made from the metadata", OTHER_FOLDER)
    if model == "gpt2" and pre not in _PRES:
        what = f"the rule {pre!r} (tokenizer.ggml.pre) by which the tokenizer splits text is unknown"
        raise header.error("KB219", what, f"{OTHER_FOLDER} ({nearest(str(pre), _PRES)})")


def tokenizer_files(path: str, names: Collection[str] = FILES) -> dict[str, bytes]:
    """The tokenizer of the GGUF file at `path` as the files that transformers reads; of them, those in `names`."""
    header = read_header(path, [f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges", "scores")])
    check_tokenizer(header)
    files = {}
    if CHAT_TEMPLATE in names and "tokenizer.chat_template" in header.metadata:
        files[CHAT_TEMPLATE] = header.get("tokenizer.chat_template", str).encode()
    if TOKENIZER in names or TOKENIZER_CONFIG in names:
        tokens = _tokens(header)
        special = _special_tokens(header, tokens)
        if TOKENIZER in names:
            files[TOKENIZER] = _tokenizer(header, tokens, special)
        if TOKENIZER_CONFIG in names:
            files[TOKENIZER_CONFIG] = json_bytes(
                {
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "clean_up_tokenization_spaces": False,
                    "model_max_length": header.size(f"{header.get('general.architecture', str)}.context_length"),
                    **special,
                }
            )
    return files


def token_ids(header: Header) -> dict[str, int]:
    """The ids of the tokens that have a role: of bos, eos, unk and pad those that there are."""
    spm = {"bos": 1, "eos": 2, "unk": 0} if header.get("tokenizer.ggml.model", str) == "llama" else {}
    words = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {role: header.get(f"tokenizer.ggml.{words[role]}_token_id", int, spm.get(role)) for role in words}
    return {role: number for role, number in found.items() if number is not None}


def json_bytes(value: Any, indent: int | None = 2) -> bytes:
    """A companion file: JSON and a newline."""
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode()


def _tokenizer(header: Header, tokens: Tokens, special: Mapping[str, str]) -> bytes:
    of_bytes = header.metadata["tokenizer.ggml.model"] == "gpt2"
    parts, add_bos = _byte_level(header, tokens) if of_bytes else _sentencepiece(header, tokens, special)
    bos = special.get("bos_token") if header.get("tokenizer.ggml.add_bos_token", bool, add_bos) else None
    eos = special.get("eos_token") if header.get("tokenizer.ggml.add_eos_token", bool, False) else None
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, set(special.values())),
        "post_processor": _around(tokens, bos, eos),
        **parts,
    }
    return _loadable(header, json_bytes(document, indent=None))


def _loadable(header: Header, document: bytes) -> bytes:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(document.decode())
    except Exception as error:  # what the library raises is Exception itself
        raise header.error("KB219", f"its tokens and merges are not a tokenizer: {error}", OTHER_FOLDER) from None
    return document


def _list(header: Header, name: str, kind: type, length: int | None = None) -> tuple[Any, ...]:
    values = header.metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, tuple) or not all(type(value) is kind for value in values):
        raise header.error("KB219", f"tokenizer.ggml.{name} is not a list of {kind.__name__}", OTHER_FOLDER)
    if length is not None and len(values) != length:
        raise header.error("KB219", f"tokenizer.ggml.{name} has {len(values)} items for {length} tokens", OTHER_FOLDER)
    return values


def _tokens(header: Header) -> Tokens:
    """Id and type of each token, without the fillers that only round up the embedding."""
    from gguf import TokenType

    texts = _list(header, "tokens", str)
    given = "tokenizer.ggml.token_type" in header.metadata
    types = _list(header, "token_type", int, len(texts)) if given else (int(TokenType.NORMAL),) * len(texts)
    tokens: dict[str, tuple[int, int]] = {}
    for number, (text, kind) in enumerate(zip(texts, types, strict=True)):
        if kind in (TokenType.UNUSED, TokenType.USER_DEFINED) and text == f"[PAD{number}]":
            continue
        if text in tokens:
            raise header.error("KB219", f"tokens {tokens[text][0]} and {number} are both {text!r}", OTHER_FOLDER)
        tokens[text] = number, kind
    return tokens


def _special_tokens(header: Header, tokens: Tokens) -> dict[str, str]:
    texts = {number: text for text, (number, _) in tokens.items()}
    roles = token_ids(header)
    for role, number in roles.items():
        if number not in texts:
            raise header.error("KB219", f"the {role} token {number} is not in the vocabulary", OTHER_FOLDER)
    return {f"{role}_token": texts[number] for role, number in roles.items()}


def _added_tokens(tokens: Tokens, named: Collection[str]) -> list[dict[str, Any]]:
    """The tokens that are found in a text before it is split: control tokens, and those that users defined."""
    from gguf import TokenType

    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    return [
        {"id": number, "content": text, **plain, "special": text in named or kind in special}
        for text, (number, kind) in tokens.items()
        if text in named or kind in (*special, TokenType.USER_DEFINED)
    ]


def _around(tokens: Tokens, bos: str | None, eos: str | None) -> dict[str, Any]:
    def side(name: str, number: int) -> list[dict[str, Any]]:
        ends = [[{"SpecialToken": {"id": end, "type_id": number}}] if end else [] for end in (bos, eos)]
        return [*ends[0], {"Sequence": {"id": name, "type_id": number}}, *ends[1]]

    used = {end: {"id": end, "ids": [tokens[end][0]], "tokens": [end]} for end in (bos, eos) if end}
    single, pair = side("A", 0), side("A", 0) + side("B", 1)
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": used}


def _model(tokens: Tokens, merges: list[list[str]], **fields: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    plain |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {**plain, **fields, "vocab": {text: number for text, (number, _) in tokens.items()}, "merges": merges}


def _byte_level(header: Header, tokens: Tokens) -> tuple[dict[str, Any], bool]:
    pre = _PRES[header.metadata["tokenizer.ggml.pre"]]
    merges = [(merge[:1], *merge[1:].partition(" ")) for merge in _list(header, "merges", str)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    splits = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False} for split in pre.splits
    ]
    parts = {
        "normalizer": {"type": "NFC"} if pre.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "decoder": byte_level,
        "model": _model(
            tokens, [[head + left, right] for head, left, _, right in merges], ignore_merges=pre.ignore_merges
        ),
    }
    return parts, pre.add_bos


def _sentencepiece(header: Header, tokens: Tokens, special: Mapping[str, str]) -> tuple[dict[str, Any], bool]:
    prefix = header.get("tokenizer.ggml.add_space_prefix", bool, True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, replace] if prefix else [replace]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    fields = {"unk_token": special.get("unk_token"), "fuse_unk": True, "byte_fallback": True}
    parts = {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": _model(tokens, _merges(header, tokens), **fields),
    }
    return parts, True


def _merges(header: Header, tokens: Tokens) -> list[list[str]]:
    """The merges that sentencepiece makes: any two pieces that are a third, the best scored third first."""
    from gguf import TokenType

    scores = _list(header, "scores", float, len(header.metadata["tokenizer.ggml.tokens"]))
    ranked = []
    for text, (number, kind) in tokens.items():
        for cut in range(1, len(text) if kind == TokenType.NORMAL else 0):
            left, right = tokens.get(text[:cut]), tokens.get(text[cut:])
            if left and right:
                ranked.append((-scores[number], number, left[0], right[0], text[:cut], text[cut:]))
    return [[left, right] for *_, left, right in sorted(ranked)]
