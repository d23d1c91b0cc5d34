"""The output's vocabulary: the lead's tokens with their ids, then what others add, in the order of the recipe.

The same request over the same files gives the same ids, on every machine: nothing depends on the order of a set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from kittybuild.errors import PlanError, nearest
from kittybuild.model.recipe import ModelRef
from kittybuild.model.tokenizer import ModelToken, TokenizerRequest, TokenRule
from kittybuild.tokens.vocabulary import AddedToken, Vocabulary

Vocabularies = Mapping[ModelRef, Vocabulary]
"""Of the models of a merge, in the order of the recipe."""


@dataclass(frozen=True)
class Output:
    """`lead`: the model whose tokenizer files the output's are made from. `vocabulary`: of the output, with its rows
    before they are rounded up. `new`: the tokens that the lead's tokenizer.json lacks, in the order of their ids, each
    with the model that gives it (None: the recipe itself). A token that is not among the added ones is a plain one:
    text becomes it by the merges, pieces or scores of that model.
    """

    lead: ModelRef
    vocabulary: Vocabulary
    new: Mapping[str, ModelRef | None]


def output_vocabulary(
    request: TokenizerRequest, models: Vocabularies, base: ModelRef | None, *, fillers: bool = True
) -> Output:
    """The vocabulary that a request asks for. Raises PlanError KB331 where it names what is not there.

    The lead is the base model (for `base`, `union` and `truncate`; the first model, where there is none) or the model
    that the request names. New tokens get the ids behind the lead's last, so they take up the fillers of its table
    before it grows. Without `fillers`, those that are left behind the last token are dropped, as mergekit does.
    """
    _check(request, models)
    source = request.source
    lead = source if isinstance(source, ModelRef) else base if base and base in models else next(iter(models))
    first = models[lead]
    if source == "truncate":
        return _truncated(lead, models)
    wanted: dict[str, ModelRef | None] = {}
    for ref, vocabulary in models.items() if source == "union" else ():
        for token in vocabulary.ids:
            if first.row(token) < 0 <= vocabulary.row(token):
                wanted.setdefault(token, ref)
    for rule in request.tokens:
        if first.row(rule.token) < 0:
            wanted.setdefault(rule.token, next((ref for ref, v in models.items() if v.row(rule.token) >= 0), None))
    if not wanted:
        return Output(lead, first if fillers else replace(first, rows=min(first.rows, first.end)), {})
    found = {token: ref for token, ref in wanted.items() if token not in first.ids}
    ids = {**first.ids, **{token: first.end + place for place, token in enumerate(found)}}
    plain = {token for token, ref in found.items() if source == "union" and ref is not None}
    added = {token: flags for token in found if (flags := _flags(token, models, plain=token in plain))}
    end = first.end + len(found)
    rows = max(first.rows, end) if fillers else end
    vocabulary = replace(first, ids=ids, added={**first.added, **added}, rows=rows, unlisted=())
    return Output(lead, vocabulary, {**dict.fromkeys(first.unlisted, lead), **found})


def _truncated(lead: ModelRef, models: Vocabularies) -> Output:
    """The rows that all models have; the lead's tokenizer must do with them."""
    rows = min(vocabulary.rows for vocabulary in models.values())
    vocabulary = replace(models[lead], rows=rows)
    lost = [token for token in vocabulary.beyond() if models[lead].row(token) >= 0]
    if lost:
        short = next(ref for ref, other in models.items() if other.rows == rows)
        message = f"truncate leaves {rows} rows, which is too few for {lost[0]!r} and others of {lead}"
        raise PlanError("KB331", message, hint=f"`tokenizer_source: {short}` takes the tokens of {short}")
    return Output(lead, vocabulary, {})


def _flags(token: str, models: Vocabularies, *, plain: bool) -> AddedToken | None:
    """How a new token is found in a text: as in the first model that has it as an added one; else not at all, if it is
    `plain`; else as it stands."""
    known = (v.added[token] for v in models.values() if token in v.added and v.row(token) >= 0)
    return next(known, None if plain else AddedToken(token))


def _check(request: TokenizerRequest, models: Vocabularies) -> None:
    """Every model and token that the request names is there."""
    known = [str(ref) for ref in models]
    if isinstance(request.source, ModelRef) and request.source not in models:
        hint = f"a model of the merge gives its tokenizer: {nearest(str(request.source), known)}"
        raise PlanError("KB331", f"{request.source} is not merged here", at=str(request.source.at), hint=hint)
    for rule in request.tokens:
        source = rule.source
        model = source.model if isinstance(source, ModelToken) else source
        if not rule.token:
            raise PlanError("KB331", "a token is empty", at=str(rule.at), hint="write the token's text")
        if not isinstance(model, ModelRef):
            continue
        if model not in models:
            message = f"the row of {rule.token!r} shall come from {model}, which is not merged here"
            raise PlanError("KB331", message, at=str(rule.at), hint=nearest(str(model), known))
        if source_row(rule, models) < 0:
            wanted = source if isinstance(source, ModelToken) else f"{model}: {rule.token!r}"
            message = f"the row of {rule.token!r} shall come from the token {wanted}, which is not there"
            hint = f"{model} has {models[model].rows} rows; name a token of its tokenizer, as it stands there"
            raise PlanError("KB331", message, at=str(rule.at), hint=hint)


def source_row(rule: TokenRule, models: Vocabularies) -> int:
    """The row that a rule names in its source, which must be a model or a token of one; -1 where there is none."""
    source = rule.source
    if isinstance(source, ModelRef):
        return models[source].row(rule.token)
    assert isinstance(source, ModelToken)
    vocabulary = models[source.model]
    if source.token is not None:
        return vocabulary.row(source.token)
    number = source.token_id
    return number if number is not None and 0 <= number < vocabulary.rows else -1
