"""A vocabulary as the rest of a model sees it: the number of rows, the tensors that have them, special tokens' ids."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kittybuild.tensors import Shape
from kittybuild.tokens.vocabulary import Vocabulary

_ROWS = re.compile(r"((padded_|text_|\w*_)?vocab_size|n_vocab|vocabulary_size)")
_INNER = ("text_config", "language_config", "llm_config", "thinker_config", "decoder")
_IN_LAYERS = re.compile(r"\.[0-9]+\.")
_ONE_DIMENSION = re.compile(r"(bias|logit\w*|predictions)$")
_OTHER_TABLE = re.compile(r"wpe|pos(ition)?_?(emb|ids)|token_type|segment")
_ID = re.compile(r"\w*_token_ids?|\w*_token_index")


def rows_in(config: Mapping[str, Any]) -> int | None:
    """The number of rows that a config.json gives to the text embedding."""
    for part in (config, *(config[key] for key in _INNER if isinstance(config.get(key), dict))):
        for key in ("vocab_size", "padded_vocab_size", "n_vocab", "vocabulary_size"):
            if type(part.get(key)) is int:
                return int(part[key])
    return None


def rotation_in(config: Mapping[str, Any], width: int) -> tuple[int, float] | None:
    """How a config.json turns rows of this width by their position: the number of heads, and the base of the angles
    (10,000 where it says none). None where a row cannot be cut into so many heads of pairs."""
    parts = [config, *(config[key] for key in _INNER if isinstance(config.get(key), dict))]
    heads = next((part[key] for part in parts for key in ("num_attention_heads", "n_head") if key in part), None)
    if type(heads) is not int or heads < 1 or width % (2 * heads):
        return None
    parts += [part["rope_parameters"] for part in parts if isinstance(part.get("rope_parameters"), dict)]
    bases = [part["rope_theta"] for part in parts if isinstance(part.get("rope_theta"), (int, float))]
    return heads, float(bases[0]) if bases else 10_000.0


def with_rows(config: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """`config` for tables of `new` rows instead of `old`: every number of rows that is `old`, at any depth."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            changed[key] = with_rows(value, old, new)
        else:
            changed[key] = new if _ROWS.fullmatch(key) and value == old else value
    return changed


def with_token_ids(config: Mapping[str, Any], old: Vocabulary, new: Vocabulary) -> tuple[dict[str, Any], list[str]]:
    """`config` (or generation_config.json) with the ids of special tokens as `new` numbers them, and the keys whose
    token it lacks, which are as they were. Ids without a token are no ids of this vocabulary, and stay."""
    changed: dict[str, Any] = {}
    lost: list[str] = []

    def renamed(key: str, number: Any) -> Any:
        token = old.tokens.get(number) if type(number) is int else None
        if token is not None and token not in new.ids:
            lost.append(key)
        return number if token is None else new.ids.get(token, number)

    for key, value in config.items():
        if isinstance(value, Mapping):
            changed[key], more = with_token_ids(value, old, new)
            lost += more
        elif _ID.fullmatch(key):
            changed[key] = [renamed(key, n) for n in value] if isinstance(value, list) else renamed(key, value)
        else:
            changed[key] = value
    return changed, lost


def vocabulary_axis(name: str, shape: Shape, rows: int) -> int | None:
    """The axis on which a tensor has a row for each token, or None.

    It is outside the layers, is no table of positions, and has a side of `rows`: the first such side (tables are mostly
    [rows, width]). A tensor of one dimension is one by its name only (a head's bias): a norm may happen to be as wide.
    """
    if rows not in shape or _IN_LAYERS.search(name) or _OTHER_TABLE.search(name):
        return None
    if len(shape) == 1 and not _ONE_DIMENSION.search(name):
        return None
    return shape.index(rows)
