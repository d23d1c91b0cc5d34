"""The tokenizer that a GGUF file's metadata describes.

Its files are written field by field, so that their bytes depend on the header alone and not on versions of libraries.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from kittybuild.checkpoint.gguf_header import LONGEST, Header, read_header
from kittybuild.errors import nearest

Tokens = Mapping[str, tuple[int, int]]  # text -> id and type

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
FILES = (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE)
OTHER_FOLDER = "use the safetensors files of the model: their folder has the tokenizer"

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
        if len(text) > LONGEST:
            raise header.error("KB219", f"token {number} has {len(text)} characters", OTHER_FOLDER)
        for cut in range(1, len(text) if kind == TokenType.NORMAL else 0):
            left, right = tokens.get(text[:cut]), tokens.get(text[cut:])
            if left and right:
                ranked.append((-scores[number], number, left[0], right[0], text[:cut], text[cut:]))
    return [[left, right] for *_, left, right in sorted(ranked)]
