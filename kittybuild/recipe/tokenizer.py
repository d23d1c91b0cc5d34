"""From `tokenizer_source` or `tokenizer` of a merge to a TokenizerRequest, in mergekit's words."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from kittybuild.errors import KittybuildError, RecipeError, nearest
from kittybuild.model.recipe import At, ModelRef
from kittybuild.model.tokenizer import ModelToken, TokenizerRequest, TokenRule, TokenSource
from kittybuild.recipe.reference import REFERENCES, parse_reference
from kittybuild.recipe.schema import MergeText, TokenizerText
from kittybuild.recipe.yamltext import Document, Path

Problems = list[KittybuildError]
_KINDS: Mapping[str, tuple[str, ...]] = MappingProxyType({"model_token": ("model", "token", "token_id"), "zero": ()})
_FORMS = f"{REFERENCES}, {{kind: model_token, model: NAME, token: TEXT}} or {{kind: zero}}"


def read_tokenizer(form: MergeText, document: Document, path: Path, problems: Problems) -> TokenizerRequest | None:
    """The request of a merge, or None where it has none; problems are noted."""
    if form.tokenizer is not None and form.tokenizer_source is not None:
        key = str(document.key_at((*path, "tokenizer_source")))
        hint = "keep one of them: `tokenizer_source: X` is `tokenizer: {source: X}`"
        problems.append(RecipeError("KB108", "a merge has either 'tokenizer' or 'tokenizer_source'", at=key, hint=hint))
    if form.tokenizer is not None:
        return _request(form.tokenizer, document, (*path, "tokenizer"), problems)
    if form.tokenizer_source is None:
        return None
    at = document.at((*path, "tokenizer_source"))
    source = _source(form.tokenizer_source, at, problems)
    return TokenizerRequest(source, at=at) if source else None


def _request(form: TokenizerText, document: Document, path: Path, problems: Problems) -> TokenizerRequest | None:
    at = document.at((*path, "source"))
    source = _source(form.source, at, problems)
    rules = []
    for token, rule in (form.tokens or {}).items():
        here = (*path, "tokens", token)
        found = _row(rule.source, document.at((*here, "source")), problems) if rule.source is not None else None
        rules.append(TokenRule(token, found, rule.force, document.key_at(here)))
    for key in ("tokens", "pad_to_multiple_of") if source == "truncate" else ():
        if getattr(form, key):
            message, hint = f"{key!r} has no effect: truncate takes rows as they are", "take it out, or use `union`"
            place = str(document.key_at((*path, key)))
            problems.append(RecipeError("KB105", message, at=place, hint=hint))
            source = None
    return TokenizerRequest(source, tuple(rules), form.pad_to_multiple_of, at) if source else None


def _source(text: Any, at: At, problems: Problems) -> Literal["base", "union", "truncate"] | ModelRef | None:
    if text == "base" or text == "union" or text == "truncate":
        return text  # type: ignore[no-any-return]
    return parse_reference(text, at, problems)


def _row(text: Any, at: At, problems: Problems) -> TokenSource:
    """Where the row of a token comes from."""
    if not isinstance(text, Mapping) or "kind" not in text:
        return parse_reference(text, at, problems)
    kind, given = text["kind"], {key: value for key, value in text.items() if key != "kind"}

    def fail(message: str, hint: str) -> None:
        problems.append(RecipeError("KB103", message, at=str(at), hint=hint))

    if not isinstance(kind, str) or kind not in _KINDS:
        fail(f"unknown kind of token source {kind!r}", nearest(str(kind), _KINDS))
    elif unknown := [key for key in given if key not in _KINDS[kind]]:
        fail(f"a source of kind {kind} has no key {unknown[0]!r}", f"write {_FORMS}")
    elif kind == "zero":
        return "zero"
    else:
        token, number = given.get("token"), given.get("token_id")
        sound = type(number) is int if token is None else isinstance(token, str) and number is None
        model = parse_reference(given["model"], at, problems) if "model" in given else None
        if sound and model:
            return ModelToken(model, token, number)
        if not sound or "model" not in given:
            fail("a token of a model is named by `model` and one of `token` and `token_id`", f"write {_FORMS}")
    return None
