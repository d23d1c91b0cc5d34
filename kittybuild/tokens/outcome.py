"""A request for a tokenizer carried out, as far as that goes without weights: files, and where each row comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from kittybuild.errors import PlanError
from kittybuild.model.recipe import ModelRef
from kittybuild.model.tokenizer import TokenizerRequest
from kittybuild.tokens.align import Gathered, align
from kittybuild.tokens.check import check_change, check_reading
from kittybuild.tokens.output import Vocabularies, output_vocabulary
from kittybuild.tokens.reading import read_vocabulary
from kittybuild.tokens.vocabulary import Vocabulary
from kittybuild.tokens.writing import TokenizerFiles, write_tokenizer


@dataclass(frozen=True)
class Outcome:
    """`lead`: the model whose tokenizer files the output takes; `files`: all of the output's, by name. `rows`: of every
    table of the output, rounded up as asked; `tables`: how each model's are gathered. `vocabulary`: of the output.
    """

    lead: ModelRef
    vocabulary: Vocabulary
    rows: int
    files: Mapping[str, bytes]
    tables: Mapping[ModelRef, Gathered]
    notes: tuple[str, ...]


def carry_out(
    request: TokenizerRequest,
    models: Vocabularies,
    files: TokenizerFiles,
    base: ModelRef | None,
    *,
    fillers: bool = True,
) -> Outcome:
    """The outcome of a request for models with these vocabularies and tokenizer files, in the order of the recipe.

    `fillers`: see `output_vocabulary`. Raises SourceError KB240, PlanError KB331 to KB333.
    """
    output = output_vocabulary(request, models, base, fillers=fillers)
    if request.source != "truncate":  # which asks nothing of tokens
        for ref, vocabulary in models.items():
            check_reading(files[ref], vocabulary, str(ref))
    written = write_tokenizer(output, files)
    check_change(output, files[output.lead], written.files)
    tables = align(request, output, models, base)
    rows = next(iter(tables.values())).rows.count
    vocabulary = replace(output.vocabulary, rows=rows)
    return Outcome(output.lead, vocabulary, rows, written.files, tables, written.notes)


def read_all(
    files: TokenizerFiles, rows: Mapping[ModelRef, int], base: ModelRef | None, *, by_row: bool = False
) -> tuple[dict[ModelRef, Vocabulary], tuple[str, ...]]:
    """The vocabularies of models with tables of so many rows, and notes; none of either where no model has a tokenizer.

    A model without one is taken to have the tokens of the base (or of the first that has one). Raises SourceError KB240
    and KB241; PlanError KB332 where the rows of such a model are others, unless rows count `by_row` alone (truncate).
    """
    found = {ref: read_vocabulary(files[ref], rows[ref], str(ref)) for ref in files}
    having = [ref for ref in (base, *found) if ref and found.get(ref)]
    if not having:
        return {}, ()
    assumed = found[having[0]]
    assert assumed is not None
    known, notes = {}, []
    for ref, vocabulary in found.items():
        if vocabulary is None and rows[ref] != assumed.rows and not by_row:
            message = f"{ref} has no tokenizer, and {rows[ref]} rows where {having[0]} has {assumed.rows}"
            hint = "put its tokenizer files into its folder, or write `tokenizer_source: truncate`"
            raise PlanError("KB332", message, hint=hint)
        if vocabulary is None:
            notes.append(f"{ref} has no tokenizer: its rows are taken to stand for the tokens of {having[0]}")
        known[ref] = vocabulary or replace(assumed, rows=rows[ref])
    return known, tuple(notes)
