"""Where each row of the output's tables comes from, for each model: its own row, else what the others have.

All tables of a merge then have the same rows, and the merge goes on as if the models had one vocabulary. The rules for
rows that a model lacks are mergekit's (0.1.5), with three differences: fillers and holes are kept, a token that no
model has gets zeros, and a rule without a source means what is usual for its token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kittybuild.model.recipe import ModelRef
from kittybuild.model.rows import RowMap, Sources
from kittybuild.model.tokenizer import ModelToken, TokenizerRequest, TokenRule
from kittybuild.tokens.output import Output, Vocabularies, source_row


@dataclass(frozen=True, slots=True)
class Gathered:
    """The rows of a model's table: a map over the tables of `models`. `whole`: it is the model's own table as it is."""

    models: tuple[ModelRef, ...]
    rows: RowMap
    whole: bool


def align(
    request: TokenizerRequest, output: Output, models: Vocabularies, base: ModelRef | None
) -> Mapping[ModelRef, Gathered]:
    """What each model's tables are gathered from. All have `output.vocabulary.rows` rows, rounded up as is asked.

    Row by row: with a token, the model's own row of that token, unless a rule forces another; without one (a hole or a
    filler of the lead's table), the model's own row of that number if that is no token's there either. Where a model
    has none: the row that a rule names; else that of the only model that has one; the base's; the average of all that
    have one, in the order of the recipe; zeros. Rows that round up are the mean of all rows of the table.
    """
    vocabulary, numbers = output.vocabulary, list(models)
    truncate = request.source == "truncate"
    columns = [list(range(vocabulary.rows)) if truncate else _own(ref, output, models) for ref in numbers]
    rules = {vocabulary.ids[rule.token]: rule for rule in request.tokens}
    table = _Table(models, columns, rules, numbers.index(base) if base and base in models else None)
    means = -vocabulary.rows % (request.pad_to_multiple_of or 1)
    found = {}
    for number, ref in enumerate(numbers):
        rows = RowMap.of(table.rows(number), means)
        inputs = rows.inputs()
        whole = rows.is_whole(number, models[ref].rows)
        found[ref] = Gathered(tuple(numbers[place] for place in inputs), rows.renumbered(inputs), whole)
    return found


def _own(ref: ModelRef, output: Output, models: Vocabularies) -> list[int]:
    """The model's own row for each row of the output, or -1."""
    model, lead, token_of = models[ref], models[output.lead], output.vocabulary.tokens
    found = []
    for row in range(output.vocabulary.rows):
        token = token_of.get(row)
        if token is not None:
            found.append(model.row(token))
        else:
            found.append(row if lead.spare(row) and model.spare(row) else -1)
    return found


@dataclass(frozen=True)
class _Table:
    """Each model's own row for each row of the output (`columns`), and what holds where one has none."""

    models: Vocabularies
    columns: Sequence[Sequence[int]]
    rules: Mapping[int, TokenRule]
    base: int | None

    def rows(self, number: int) -> Iterator[Sources]:
        """What each row of the table of that model is made of, by the numbers of the models."""
        for row, place in enumerate(self.columns[number]):
            rule = self.rules.get(row)
            yield ((number, place),) if place >= 0 and not (rule and rule.force) else self._instead(row, rule)

    def _instead(self, row: int, rule: TokenRule | None) -> Sources:
        source = rule.source if rule else None
        if source == "zero":
            return ()
        if rule and source:
            model = source.model if isinstance(source, ModelToken) else source
            return ((list(self.models).index(model), source_row(rule, self.models)),)
        having = tuple((number, column[row]) for number, column in enumerate(self.columns) if column[row] >= 0)
        return tuple(place for place in having if place[0] == self.base) or having
