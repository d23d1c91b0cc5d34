"""The models of a merge brought to one vocabulary, before anything is merged.

Each model whose tables change gets them from a hidden stage of row gathers, which is fused into the merge; what is
merged then has tables of one size, and the merge knows nothing of tokens. Files are read through ModelFiles alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kittybuild.builders.base import Builders
from kittybuild.errors import KittybuildError, PlanError, SourceError
from kittybuild.model.derivation import Derivation, Input, StageTensor, Step
from kittybuild.model.plan import StagePlan
from kittybuild.model.recipe import MergeStage, ModelRef
from kittybuild.model.tokenizer import TokenizerRequest
from kittybuild.planner.files import GENERATION, TOKENIZER_FILES, ModelFiles
from kittybuild.planner.names import is_vocabulary
from kittybuild.planner.peers import rules_of
from kittybuild.planner.tables import gathers, tables_stage
from kittybuild.planner.views import View
from kittybuild.tensors import TensorSpec
from kittybuild.tokens import chat
from kittybuild.tokens.agreement import disagreements
from kittybuild.tokens.align import Gathered
from kittybuild.tokens.compare import unequal
from kittybuild.tokens.config import rows_in, vocabulary_axis, with_rows, with_token_ids
from kittybuild.tokens.outcome import Outcome, carry_out, read_all
from kittybuild.tokens.reading import FILES, UNREAD, read_vocabulary
from kittybuild.tokens.vocabulary import Vocabulary

BASE = TokenizerRequest("base")


@dataclass(frozen=True)
class Aligned:
    """The models of a merge with one vocabulary: `views` by reference. `tables`: the stages that gather their tables.
    `files`: what the output has in place of its donor's files (None: nothing)."""

    views: Mapping[ModelRef, View]
    tables: tuple[StagePlan, ...] = ()
    files: Mapping[str, bytes | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def view(self, ref: ModelRef) -> View:
        """A model of the merge."""
        return self.views[ref]


def aligned(stage: MergeStage, view: Callable[[ModelRef], View], files: ModelFiles, builders: Builders) -> Aligned:
    """The models of a merge as it merges them. Raises SourceError KB240 and KB241, PlanError KB330 to KB335."""
    models = {ref: view(ref) for ref in stage.references()}
    merge = _Merge(stage, models, files)
    request = stage.tokenizer or (BASE if gathers(stage) and merge.has_tokenizer() else None)
    try:
        if request is None or not merge.has_tables(request):
            result = Aligned(models, notes=() if merge.rules.peer else merge.check_equal())
            return merge.with_template(result, merge.donor)
        return merge.carried_out(request, builders)
    except KittybuildError as error:
        error.at = error.at or str((stage.tokenizer or stage).at)
        raise


class _Merge:
    """A merge, its models, and how many rows their tables have."""

    def __init__(self, stage: MergeStage, models: Mapping[ModelRef, View], files: ModelFiles) -> None:
        self.stage, self.models, self._files = stage, models, files
        self.rules = rules_of(stage.numerics)
        self.donor = stage.base or next(iter(models))
        found = {ref: table_rows(model) for ref, model in models.items()}
        self.rows = {ref: rows for ref, rows in found.items() if rows is not None}

    def files_of(self, ref: ModelRef) -> dict[str, bytes]:
        """The tokenizer files of a model, with its chat template."""
        return self._files.of(self.models[ref], TOKENIZER_FILES)

    def has_tokenizer(self) -> bool:
        """Whether a model has one at all."""
        return any(name in FILES for ref in self.models for name in self.files_of(ref))

    def has_tables(self, request: TokenizerRequest) -> bool:
        """Whether the models have tables with a row for each token. Raises PlanError KB332 where some must and lack."""
        lacking = [str(ref) for ref in self.models if ref not in self.rows]
        if not lacking or (request == BASE and not self.rows):
            return not lacking
        hint = "leave `tokenizer` and `tokenizer_source` out"
        raise PlanError("KB332", f"{lacking[0]} has no embedding that has a row for each token", hint=hint)

    def check_equal(self) -> tuple[str, ...]:
        """Notes, where nothing is asked for. Raises PlanError KB330 where the tables cannot be merged row by row."""
        if self._one_donor() and len(set(self.rows.values())) == 1:
            return ()
        files = {ref: self._files.of(self.models[ref], (*FILES, *UNREAD)) for ref in self.rows}
        if all(self._same(ref, self.donor, files) for ref in files):
            return ()
        known: dict[str, Vocabulary] = {}
        notes = []
        for ref, own in files.items():
            try:
                if vocabulary := read_vocabulary(own, self.rows[ref], str(ref)):
                    known[str(ref)] = vocabulary
            except SourceError as error:
                notes.append(f"the tokenizer of {ref} is not compared with others: {error.message}")
        lead = str(self.donor)
        if lead in known and (problem := unequal(known, lead)):
            raise problem
        return tuple(f"{self.stage.at}: {note}" for note in notes)

    def _one_donor(self) -> bool:
        """Whether all models have the files of one, so that there is nothing to compare."""
        first = self.models[self.donor]
        return all((model.donor, model.files) == (first.donor, first.files) for model in self.models.values())

    def _same(self, ref: ModelRef, other: ModelRef, files: Mapping[ModelRef, Mapping[str, bytes]]) -> bool:
        return self.rows[ref] == self.rows.get(other) and files[ref] == files.get(other)

    def carried_out(self, request: TokenizerRequest, builders: Builders) -> Aligned:
        """The request, carried out."""
        files = {ref: self.files_of(ref) for ref in self.models}
        by_row = request.source == "truncate"
        known, notes = read_all(files, self.rows, self.stage.base, by_row=by_row)
        if not known:
            if request == BASE and len(set(self.rows.values())) == 1:
                return self.with_template(Aligned(self.models), self.donor)
            if not by_row:
                hint = "put its tokenizer files into its folder, or write `tokenizer_source: truncate`"
                raise PlanError("KB332", f"{self.donor} has no tokenizer", hint=hint)
            known = {ref: Vocabulary("BPE", {}, rows) for ref, rows in self.rows.items()}
        outcome = carry_out(request, known, files, self.stage.base, fillers=not self.rules.peer)
        tables = self._tables(outcome, builders)
        views = {ref: _put_in(self.models[ref], tables.get(ref)) for ref in self.models}
        lead = self.models[outcome.lead]
        changed = _Renamed(known[self.donor], outcome, lead, self._files.generation(lead))
        donor = views[self.donor]
        config = changed.config(donor.config) if donor.config is not None else None
        views[self.donor] = replace(donor, config=config)
        own = files[outcome.lead]
        wanted = {name: data for name, data in own.items() if name not in FILES} | dict(outcome.files)
        if any(own.get(name) != data for name, data in outcome.files.items()):  # these lack the new tokens
            wanted = {name: data for name, data in wanted.items() if name not in UNREAD}
        generation = changed.generation_config(self._files.generation(self.models[self.donor]))
        made = {} if generation is None else {GENERATION: generation}
        notes = (*notes, *outcome.notes, *changed.notes(str(self.donor)))
        result = Aligned(views, tuple(tables.values()), made, tuple(f"{self.stage.at}: {note}" for note in notes))
        return self.with_template(result, outcome.lead, wanted)

    def _tables(self, outcome: Outcome, builders: Builders) -> dict[ModelRef, StagePlan]:
        """The hidden stages of the models whose tables change."""
        found = {}
        for ref, gathered in outcome.tables.items():
            steps: dict[str, Step] = {}
            for name, given in self.models[ref].tensors.items() if not gathered.whole else ():
                axis = vocabulary_axis(name, given.spec.shape, self.rows[ref])
                if axis is not None and (inputs := self._inputs(name, given, axis, gathered)):
                    shape = (*given.spec.shape[:axis], outcome.rows, *given.spec.shape[axis + 1 :])
                    params = {"axis": axis, "rows": str(gathered.rows)}
                    output = TensorSpec(given.spec.dtype, shape)
                    steps[name] = Derivation("rows", builders["rows"].version, params, inputs, output)
            if steps:
                name = tables_stage(self.stage.name, ref)
                found[ref] = StagePlan(name, "rows", steps, None, None, keep=False, allow_nan=self.stage.allow_nan)
        return found

    def _inputs(self, name: str, given: Input, axis: int, gathered: Gathered) -> tuple[Input, ...] | None:
        """The tables of that name that rows are gathered from; None where a model lacks it, as the merge will say.

        The only table of a model with tied weights stands for its head, too.
        """
        found = []
        for ref in gathered.models:
            tensors = self.models[ref].tensors
            only = [n for n, t in tensors.items() if vocabulary_axis(n, t.spec.shape, self.rows[ref]) is not None]
            table = tensors.get(name) or (tensors[only[0]] if len(only) == 1 else None)
            if table is None:
                return None
            if _beside(table, axis) != _beside(given, axis):
                message = f"{name} of {ref} is {table.spec}: rows of it cannot go into {given.spec}"
                raise PlanError("KB301", message, at=str(ref.at), hint="only tables of one width can be merged")
            found.append(table)
        return tuple(found)

    def with_template(self, result: Aligned, lead: ModelRef, wanted: dict[str, bytes] | None = None) -> Aligned:
        """`result` with the files that the output has: `wanted` are its tokenizer's, with the template of the lead.

        None: they are the donor's.
        """
        wish, notes, own = self.stage.chat_template, list(result.notes), self.models[self.donor].files
        notes += self._disagreements(spoken=wish is None and lead == self.donor)
        if wish is None and wanted is None:
            return replace(result, files={**own, **result.files}, notes=tuple(notes))
        before = self.files_of(self.donor)
        wanted = before if wanted is None else wanted
        if wish:
            templates = {str(ref): chat.read_template(self.files_of(ref), str(ref)) for ref in self.models}
            template = chat.chosen_template(wish.wish, templates, wish.at)
            if template is not None and not any(name in FILES for name in wanted):
                notes.append(f"{wish.at}: the output has no tokenizer, and so no chat template")
            elif template is not None:
                wanted = wanted | chat.with_template(wanted, template, str(lead))
        changed = {name: wanted.get(name) for name in TOKENIZER_FILES if wanted.get(name) != before.get(name)}
        return replace(result, files={**own, **result.files, **changed}, notes=tuple(notes))

    def _disagreements(self, *, spoken: bool) -> list[str]:
        spoken = spoken and not self._one_donor()
        facts = {str(ref): self._files.facts(model, spoken=spoken) for ref, model in self.models.items()}
        return [f"{self.stage.at}: {line}" for line in disagreements(facts, str(self.donor))]


@dataclass(frozen=True)
class _Renamed:
    """The donor's configuration files on their way to the output's vocabulary. `lead`, `generation`: the model whose
    tokenizer the output has, and its generation_config.json, which say what the donor cannot."""

    old: Vocabulary
    outcome: Outcome
    lead: View
    generation: Mapping[str, Any]
    lost: dict[str, None] = field(default_factory=dict)

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json, with rows and ids."""
        sized = with_rows(config, rows_in(config) or self.old.rows, self.outcome.rows)
        return self._ids(sized, self.lead.config or {})

    def generation_config(self, config: Mapping[str, Any]) -> bytes | None:
        """generation_config.json; None where it stays as it is."""
        changed = self._ids(config, self.generation)
        return None if changed == config else (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()

    def _ids(self, config: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
        changed, lost = with_token_ids(config, self.old, self.outcome.vocabulary)
        found = {key: other[key] for key in lost if key in config and key in other}
        self.lost.update(dict.fromkeys(key for key in lost if key not in found))
        return changed | found

    def notes(self, donor: str) -> list[str]:
        """What became of ids without a token."""
        return [f"{key} is that of {donor}, whose token the output lacks: change it by hand" for key in self.lost]


def table_rows(view: View) -> int | None:
    """How many rows a model's tables have: as its config.json says, if one has so many; else by the tables' names."""
    rows = rows_in(view.config or {})
    shapes = {name: given.spec.shape for name, given in view.tensors.items()}
    if rows and any(vocabulary_axis(name, shape, rows) is not None for name, shape in shapes.items()):
        return rows
    counts = {shape[0] for name, shape in shapes.items() if is_vocabulary(name) and len(shape) == 2}
    return counts.pop() if len(counts) == 1 else None


def without_tables(view: View) -> View:
    """A model but for its tables: where they are wrong already, the rest can still be looked at."""
    rows = table_rows(view)
    gone = {n for n, t in view.tensors.items() if rows and vocabulary_axis(n, t.spec.shape, rows) is not None}
    return replace(view, tensors={name: given for name, given in view.tensors.items() if name not in gone})


def _put_in(view: View, tables: StagePlan | None) -> View:
    """A model with its tables as a stage gathers them."""
    if tables is None:
        return view
    made = {name: StageTensor(tables.name, name, step.spec) for name, step in tables.steps.items()}
    return replace(view, tensors={**view.tensors, **made})


def _beside(given: Input, axis: int) -> tuple[int, ...]:
    return (*given.spec.shape[:axis], -1, *given.spec.shape[axis + 1 :])
