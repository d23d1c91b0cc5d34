"""The output's tokenizer files: the lead's, byte for byte where no token is new, else with the new tokens added.

A new token keeps its nature: an added token is found in a text as it stands, a plain one is what the merges (pieces,
scores) of its model make, and these come with it, behind the lead's own. So text without new tokens is split as before
(docs/design, note 11).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kittybuild.errors import PlanError, SourceError
from kittybuild.model.recipe import ModelRef
from kittybuild.tokens.output import Output
from kittybuild.tokens.reading import (
    ADDED,
    CONFIG,
    FILES,
    MERGES,
    SENTENCEPIECE,
    TOKENIZER,
    VOCAB_JSON,
    VOCAB_TXT,
    document,
    model_kind,
    numbered,
)

TokenizerFiles = Mapping[ModelRef, Mapping[str, bytes]]
Document = dict[str, Any]
_PLAIN_ONLY = (VOCAB_JSON, MERGES, VOCAB_TXT, SENTENCEPIECE)
"""Files that list plain tokens and know no added ones."""


@dataclass(frozen=True)
class Written:
    """The tokenizer files of the output by name, and what a person should know of them."""

    files: Mapping[str, bytes]
    notes: tuple[str, ...] = ()


def write_tokenizer(output: Output, files: TokenizerFiles) -> Written:
    """The files of the output's tokenizer. Raises PlanError KB332 where the lead's cannot be added to."""
    lead = {name: files[output.lead][name] for name in FILES if name in files[output.lead]}
    if not output.new:
        return Written(lead)
    if TOKENIZER not in lead:
        message = f"{output.lead} has no tokenizer.json that {len(output.new)} tokens could be added to"
        hint = "load its tokenizer with transformers' AutoTokenizer and save it beside the model: that writes one"
        raise PlanError("KB332", message, hint=hint)
    tokenizer = document(lead, TOKENIZER, str(output.lead))
    plain = {token: ref for token, ref in output.new.items() if ref and token not in output.vocabulary.added}
    givers = [ref for ref in dict.fromkeys(plain.values()) if TOKENIZER in files[ref]]
    notes = _add(tokenizer, output, [_source(ref, files) for ref in givers])
    stale = [name for name in _PLAIN_ONLY if name in lead] if plain else []
    if stale:
        notes.append(f"without {', '.join(stale)}, which would lack tokens: tokenizer.json has them all")
    changed = {name: data for name, data in lead.items() if name not in stale}
    changed[TOKENIZER] = _dumped(tokenizer, lead[TOKENIZER])
    return Written({**changed, **_beside(output, changed)}, tuple(notes))


@dataclass(frozen=True)
class _Source:
    """What makes the plain tokens of a model: merges, as pairs, or the scores of its pieces."""

    prefix: str
    merges: tuple[tuple[str, str], ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Document) -> _Source:
        """From the model of a tokenizer.json; raises ValueError and the like where it is none."""
        prefix = model.get("continuing_subword_prefix") or ""
        kind = model_kind(model)
        if kind == "Unigram":
            return cls(prefix, scores={token: float(score) for token, score in model["vocab"]})
        return cls(prefix, tuple(map(_pair, model["merges"])) if kind == "BPE" else ())

    def product(self, pair: tuple[str, str]) -> str:
        """The token that a merge makes."""
        return pair[0] + pair[1].removeprefix(self.prefix)


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _source(ref: ModelRef, files: TokenizerFiles) -> _Source:
    try:
        return _Source.of(document(files[ref], TOKENIZER, str(ref))["model"])
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        message = f"its merges or scores are not those of a tokenizer: {error}"
        raise SourceError("KB240", message, at=f"{ref}: {TOKENIZER}", hint="download or copy it again") from error


def _add(tokenizer: Document, output: Output, sources: Sequence[_Source]) -> list[str]:
    """The new tokens, written into a tokenizer.json; returns notes."""
    model, ids, added = tokenizer["model"], output.vocabulary.ids, output.vocabulary.added
    listed = {entry["content"]: entry for entry in tokenizer.get("added_tokens") or ()}
    listed |= {token: added[token].to_json() for token in output.new if token in added and token not in listed}
    tokenizer["added_tokens"] = [
        {"id": number} | listed[token] | {"id": number} for token, number in ids.items() if token in listed
    ]
    plain = [token for token in output.new if token not in added]
    if not plain and numbered(tokenizer).ids == ids:
        return []
    # A loader counts the tokens that the model does not list: only what is listed surely keeps its id.
    kind = model_kind(model)
    if kind == "Unigram":
        _add_scored(model, output, sources)
    else:
        model["vocab"].update({token: number for token, number in ids.items() if token not in model["vocab"]})
    if kind != "BPE":
        return []
    merges = _merges(sources, model.get("continuing_subword_prefix") or "", set(plain), ids)
    _append(model, list(merges))
    made = set(merges.values())
    unmade = [token for token in plain if token not in made and len(token) > 1]
    if model.get("ignore_merges") or not unmade:
        return []
    return [f"no text becomes {_some(unmade)}: no merges make them"]


def _add_scored(model: Document, output: Output, sources: Sequence[_Source]) -> None:
    """Pieces with the scores that they have in their own model; the lowest where they have none, which changes nothing
    for other pieces."""
    lowest = min((score for _, score in model["vocab"]), default=0.0)
    scores = {token: score for source in reversed(sources) for token, score in source.scores.items()}
    for number in range(len(model["vocab"]), output.vocabulary.end):
        token = output.vocabulary.tokens[number]
        plain = token in output.new and token not in output.vocabulary.added
        model["vocab"].append([token, scores.get(token, lowest) if plain else lowest])


def _merges(
    sources: Sequence[_Source], prefix: str, wanted: set[str], ids: Mapping[str, int]
) -> dict[tuple[str, str], str]:
    """The merges of other models that make new tokens, and these, in the order of the models and of their merges."""
    return {
        pair: product
        for source in sources
        for pair in source.merges
        if source.prefix == prefix and (product := source.product(pair)) in wanted
        if pair[0] in ids and pair[1] in ids
    }


def _append(model: Document, merges: list[tuple[str, str]]) -> None:
    """More merges, in the form of those that are there; a token with a space in it needs the newer form."""
    old = model["merges"]
    if old and isinstance(old[0], str) and not any(" " in part for pair in merges for part in pair):
        model["merges"] = old + [" ".join(pair) for pair in merges]
    elif merges:
        model["merges"] = [list(_pair(merge)) for merge in old] + [list(pair) for pair in merges]


def _beside(output: Output, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The other files that list added tokens, with the new ones."""
    ids, added = output.vocabulary.ids, output.vocabulary.added
    new = [token for token in output.new if token in added]
    config, changed = document(files, CONFIG, str(output.lead)), dict[str, bytes]()
    decoder = config.get("added_tokens_decoder")
    if decoder is not None:
        decoder.update({str(ids[token]): added[token].to_json() for token in new if str(ids[token]) not in decoder})
        config["added_tokens_decoder"] = dict(sorted(decoder.items(), key=lambda item: int(item[0])))
        changed[CONFIG] = _dumped(config, files[CONFIG])
    if new and (ADDED in files or any(name in files for name in _PLAIN_ONLY)):
        listed = document(files, ADDED, str(output.lead))
        changed[ADDED] = _dumped({**listed, **{token: ids[token] for token in new}}, files.get(ADDED, b"{\n}\n"))
    return changed


def _dumped(value: Document, like: bytes) -> bytes:
    """JSON in the form of `like`: indented or not, with a newline at the end or not."""
    indented = b"\n" in like.strip()[:64]
    text = json.dumps(
        value, indent=2 if indented else None, separators=None if indented else (",", ":"), ensure_ascii=False
    )
    return (text + ("\n" if like.endswith(b"\n") else "")).encode()


def _some(tokens: Sequence[str]) -> str:
    shown = ", ".join(map(repr, tokens[:3]))
    return f"{shown} and {len(tokens) - 3} more" if len(tokens) > 3 else shown
