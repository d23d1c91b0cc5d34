"""A model's tokenizer files as a Vocabulary: the ids that a loader gives, which are not always those that are written.

Read are tokenizer.json, else vocab.json, vocab.txt, or a sentencepiece tokenizer.model; with tokenizer_config.json,
special_tokens_map.json and added_tokens.json. Not read: tiktoken and tekken files, and other names of sentencepiece
models, whose tokens only the model's own Python class knows how to number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from kittybuild.errors import SourceError
from kittybuild.tokens.sentencepiece import read_pieces
from kittybuild.tokens.vocabulary import AddedToken, Kind, Vocabulary, in_order

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
ADDED = "added_tokens.json"
VOCAB_JSON = "vocab.json"
MERGES = "merges.txt"
VOCAB_TXT = "vocab.txt"
SENTENCEPIECE = "tokenizer.model"
TABLES = (TOKENIZER, VOCAB_JSON, VOCAB_TXT, SENTENCEPIECE)
"""The files that list tokens, the best first."""
FILES = (*TABLES, MERGES, CONFIG, SPECIAL, ADDED)
"""All files that a tokenizer consists of, beside its chat template."""
UNREAD = ("tekken.json", "spiece.model", "sentencepiece.bpe.model", "qwen.tiktoken", "vocab.bpe", "tokenizer.tok.json")
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE = ("additional_special_tokens", "extra_special_tokens")
_WITH_TRANSFORMERS = "load it with transformers' AutoTokenizer and save it beside the model: that writes tokenizer.json"
_COPY = "download or copy it again"


def read_vocabulary(files: Mapping[str, bytes], rows: int, where: str) -> Vocabulary | None:
    """The vocabulary of a model with tables of `rows` rows, or None where there is no tokenizer.

    `where` names the model in messages. Raises SourceError KB240 for damaged files, KB241 for kinds that are not read.
    """
    table = next((name for name in TABLES if name in files), None)
    if table is None:
        unread = next((name for name in UNREAD if name in files), None)
        if unread is None:
            return None
        message = f"its tokenizer is only in {unread}, which is not read"
        raise SourceError("KB241", message, at=where, hint=_WITH_TRANSFORMERS)
    try:
        return _read(files, table, rows, where)
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise SourceError("KB240", f"not a tokenizer: {error}", at=f"{where}: {table}", hint=_COPY) from error


def document(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    """The JSON object in a file, empty where there is no such file. Raises SourceError KB240."""
    try:
        value = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        message = f"cannot read this JSON: {error}"
        raise SourceError("KB240", message, at=f"{where}: {name}", hint=_COPY) from error
    if not isinstance(value, dict):
        raise SourceError("KB240", "not a JSON object", at=f"{where}: {name}", hint=_COPY)
    return value


def model_kind(model: Mapping[str, Any]) -> Kind:
    """The kind of the model in a tokenizer.json; older files do not name it."""
    if model.get("type") in ("BPE", "WordPiece", "WordLevel", "Unigram"):
        return model["type"]  # type: ignore[no-any-return]
    if "type" in model:
        raise ValueError(f"a model of the kind {model['type']!r}")
    if isinstance(model["vocab"], list):
        return "Unigram"
    return "BPE" if "merges" in model else "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def model_ids(model: Mapping[str, Any]) -> dict[str, int]:
    """The tokens of the model in a tokenizer.json, without the added ones."""
    vocab = model["vocab"]
    if isinstance(vocab, list):
        vocab = {entry[0]: number for number, entry in enumerate(vocab)}
    if not all(type(token) is str and type(number) is int for token, number in vocab.items()):
        raise ValueError("its vocab is no list of tokens and ids")
    "".join(vocab).encode()  # what cannot be written again is damaged
    return dict(vocab)


def added_token(entry: Mapping[str, Any] | str) -> AddedToken:
    """An added token as any of the files write it; a bare text is a special token."""
    if isinstance(entry, str):
        return AddedToken(entry, special=True)
    if type(entry["content"]) is not str:
        raise ValueError(f"an added token without text: {entry['content']!r}")
    flags = ("special", "normalized", "lstrip", "rstrip", "single_word")
    return AddedToken(entry["content"], **{flag: bool(entry.get(flag, False)) for flag in flags})


def _read(files: Mapping[str, bytes], table: str, rows: int, where: str) -> Vocabulary:
    config, special = document(files, CONFIG, where), document(files, SPECIAL, where)
    kind, numbering = _listed(files, table, where)
    ids = numbering.ids
    listed = set(ids)
    decoder = config.get("added_tokens_decoder")
    beside = {int(number): added_token(entry) for number, entry in (decoder or {}).items()}
    if decoder is None:  # the older form: these files count only without it
        config = {**config, **special}
        legacy = document(files, ADDED, where)
        beside = {int(number): AddedToken(token) for token, number in legacy.items()}
    for number, token in sorted(beside.items()):
        numbering.add_unlisted(token, None if table == TOKENIZER else number)
    roles = {role: added_token(config[role]) for role in ROLES if isinstance(config.get(role), (str, dict))}
    for token in (*roles.values(), *_more(config)):
        numbering.add_unlisted(replace(token, special=True), None)
    ids = in_order(ids)
    return Vocabulary(
        kind,
        ids,
        rows,
        {token: numbering.added[token] for token in ids if token in numbering.added},
        {role: token.content for role, token in roles.items() if token.content in ids},
        tuple(token for token in ids if token not in listed),
    )


def _more(config: Mapping[str, Any]) -> Iterator[AddedToken]:
    """The special tokens without a role of their own."""
    for key in _MORE:
        value = config.get(key) or ()
        yield from map(added_token, value.values() if isinstance(value, dict) else value)


def _listed(files: Mapping[str, bytes], table: str, where: str) -> tuple[Kind, Numbering]:
    """The tokens of the file `table`."""
    if table == TOKENIZER:
        tokenizer = document(files, table, where)
        return model_kind(tokenizer["model"]), numbered(tokenizer)
    if table == VOCAB_JSON:
        return "BPE", Numbering(model_ids({"vocab": document(files, table, where)}))
    if table == VOCAB_TXT:
        lines = files[table].decode().removesuffix("\n").split("\n")
        return "WordPiece", Numbering({line.removesuffix("\r"): number for number, line in enumerate(lines)})
    pieces, bpe = read_pieces(files[table])
    numbering = Numbering({piece.text: number for number, piece in enumerate(pieces)})
    for piece in pieces:
        if piece.control or piece.user_defined:
            numbering.add(AddedToken(piece.text, special=piece.control), None)
    return "BPE" if bpe else "Unigram", numbering


def numbered(tokenizer: Mapping[str, Any]) -> Numbering:
    """The tokens of a tokenizer.json with the ids that loading it gives."""
    numbering = Numbering(model_ids(tokenizer["model"]))
    for entry in tokenizer.get("added_tokens") or ():
        numbering.add(added_token(entry), None)
    return numbering


class Numbering:
    """Ids as the tokenizers library gives them: a token of the model keeps its own, others are counted on.

    The count starts at the number of the model's tokens, even where their ids have holes.
    """

    def __init__(self, ids: dict[str, int]) -> None:
        self.ids = ids
        self.added: dict[str, AddedToken] = {}
        self._used = set(ids.values())
        self._next = len(ids)

    def add(self, token: AddedToken, number: int | None) -> None:
        """A token of the tokenizer's own list."""
        if token.content:
            wanted = self._next if number is None else number
            number = self.ids.setdefault(token.content, wanted)
            self.added.setdefault(token.content, token)
            self._used.add(number)
            self._next = max(self._next, number + 1)

    def add_unlisted(self, token: AddedToken, number: int | None) -> None:
        """A token of another file; one that would get the id of another token is none."""
        wanted = self._next if number is None else number
        if token.content in self.ids or wanted not in self._used:
            self.add(token, number)
