"""A transplant_tokenizer stage lowered to one derivation a table; every other tensor is the model's.

The output takes the donor's tokenizer files and chat template, and its ids of special tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from kittybuild.builders.base import Builders
from kittybuild.errors import KittybuildError, PlanError
from kittybuild.model.derivation import KITTY_1, Derivation, Input, Step
from kittybuild.model.recipe import Approximation, TransplantStage
from kittybuild.model.rows import RowMap
from kittybuild.planner.files import GENERATION, TOKENIZER_FILES
from kittybuild.planner.machine import Machine
from kittybuild.planner.names import before_layers, natural
from kittybuild.planner.views import View
from kittybuild.tensors import TensorSpec
from kittybuild.tokens.config import rotation_in, rows_in, vocabulary_axis, with_rows
from kittybuild.tokens.matching import Matching, Meanings, match, pieces
from kittybuild.tokens.reading import TOKENIZER, read_vocabulary
from kittybuild.tokens.vocabulary import Vocabulary

_ID = re.compile(r"(bos|eos|pad|unk|mask|sep|cls)_token_id")
_PLAIN = frozenset({"mean", "zero", "randn", "john_hewitt", "subword"})
"""Methods to which the donor's table is nothing."""
_BY_DISTANCE = frozenset({"common_interpolation"})
_BY_NUMBER = frozenset({"common_interpolation", "omp", "stb", "mp_rope"})
_DRAWN = frozenset({"randn", "john_hewitt"})
_WEIGHED = MappingProxyType(
    {
        ("first_last", True): "last",
        ("first_last", False): "first",
        ("weighted_mean", True): "rising",
        ("weighted_mean", False): "falling",
    }
)
"""What a method of pieces means for an embedding, and for a head."""


@dataclass(frozen=True)
class Party:
    """The model or the donor: its tensors, tokenizer files and vocabulary."""

    view: View
    files: Mapping[str, bytes]
    vocabulary: Vocabulary

    @cached_property
    def tables(self) -> dict[str, int]:
        """The tensors with a row for each token, and on which axis."""
        rows = self.vocabulary.rows
        axes = {name: vocabulary_axis(name, given.spec.shape, rows) for name, given in self.view.tensors.items()}
        return {name: axis for name, axis in axes.items() if axis is not None}

    def table(self, *, embedding: bool) -> Input | None:
        """The embedding; or the head, which where there is none is the embedding too."""
        wide = [
            name for name, axis in self.tables.items() if axis == 0 and len(self.view.tensors[name].spec.shape) == 2
        ]
        sides = {before_layers(name): self.view.tensors[name] for name in sorted(wide, key=natural, reverse=True)}
        return sides.get(embedding) or sides.get(True)


class TransplantLowering:
    """One stage on its way to steps. `problems` collects what is wrong, `notes` what a person should know."""

    def __init__(
        self,
        stage: TransplantStage,
        views: tuple[View, View],
        files: tuple[Mapping[str, bytes], Mapping[str, bytes]],
        builders: Builders,
        problems: list[KittybuildError],
        seed: int,
        machine: Machine | None,
    ) -> None:
        self.stage, self.builders, self.problems = stage, builders, problems
        self.seed, self.machine = seed, machine
        self.notes: list[str] = []
        parties = [self._party(view, found) for view, found in zip(views, files, strict=True)]
        self.model, self.donor = parties

    def _party(self, view: View, files: Mapping[str, bytes]) -> Party | None:
        """What is known of a model, or None with a problem noted."""
        hint = "put the tokenizer and config.json that belong to it into its folder"
        rows = rows_in(view.config or {})
        try:
            vocabulary = read_vocabulary(files, rows, view.label) if rows else None
        except KittybuildError as error:
            self.problems.append(error)
            return None
        if vocabulary is None:
            message = f"{view.label} has no {'tokenizer' if rows else 'vocab_size in its config.json'}"
            self.problems.append(PlanError("KB340", message, at=str(self.stage.at), hint=hint))
            return None
        party = Party(view, files, vocabulary)
        if party.table(embedding=True) is None:
            message = f"{view.label} has no embedding of {rows} rows"
            self.problems.append(PlanError("KB340", message, at=str(self.stage.at), hint=hint))
            return None
        return party

    def steps(self) -> dict[str, Step]:
        """The steps of all tensors of the model, in natural order."""
        if self.model is None or self.donor is None:
            return {}
        if self.stage.approximation.approximation_method not in _PLAIN and max(self._matching(True).same) < 0:
            message = f"the tokenizers of {self.stage.model} and {self.stage.donor} have no token in common"
            hint = "approximation_method: subword or mean needs none"
            self.problems.append(PlanError("KB341", message, at=str(self.stage.at), hint=hint))
            return {}
        steps: dict[str, Step] = {}
        dtype = self.stage.out_dtype or self.stage.dtype
        for name in sorted(self.model.view.tensors, key=natural):
            given = self.model.view.tensors[name]
            output = given.spec.with_dtype(dtype) if dtype and given.spec.dtype.is_float else given.spec
            if name in self.model.tables:
                steps[name] = self._table(name, given, output)
            elif output != given.spec:
                steps[name] = Derivation("cast", self.builders["cast"].version, {}, (given,), output)
            else:
                steps[name] = given
        return steps

    def _table(self, name: str, given: Input, output: TensorSpec) -> Step:
        """The step of a tensor with a row for each token."""
        model, donor = self._both
        axis, embedding = model.tables[name], before_layers(name)
        shape = list(output.shape)
        shape[axis] = donor.vocabulary.rows
        output = TensorSpec(output.dtype, tuple(shape))
        matching = self._matching(embedding)
        if len(shape) == 2 and axis == 0 and output.dtype.is_float:
            return self._derive(name, given, output, matching, embedding=embedding)
        rows = RowMap.of(((0, row),) if row >= 0 else () for row in self._copied(matching))
        params = {"axis": axis, "rows": str(rows)}
        return Derivation("rows", self.builders["rows"].version, params, (given,), output)

    def _derive(self, name: str, given: Input, output: TensorSpec, matching: Matching, *, embedding: bool) -> Step:
        model, donor = self._both
        how, tokens = self.stage.approximation, donor.vocabulary.tokens
        pairs = [(row, number) for number, row in enumerate(matching.same) if row >= 0]
        made = [
            ((0, row),) if row >= 0 else ((1, n),) if n in tokens else ()
            for n, row in enumerate(self._copied(matching))
        ]
        params: dict[str, Any] = {"rows": str(RowMap.of(made)), **self._options(how, len(pairs))}
        params["anchors"] = str(RowMap.of((((0, row), (1, number)) for row, number in pairs)))
        inputs = [given]
        if how.magikarp or how.approximation_method not in _PLAIN:
            table = donor.table(embedding=embedding)
            assert table is not None  # a Party has an embedding at least
            inputs.append(table)
        if how.approximation_method == "mp_rope":
            params |= self._rotations
        if how.magikarp:
            both = (Meanings(party.vocabulary).unused() for party in (model, donor))
            params["unused"] = [str(RowMap.of(((0, row),) for row in rows)) for rows in both]
        if how.approximation_method in _DRAWN or how.new_vocab_noise:
            params |= {"seed": self.seed, "tensor": name}
        if how.approximation_method == "subword":
            wanted = [n for n, sources in enumerate(made) if how.magikarp or sources[:1] == ((1, n),)]
            params["subword_method"] = _WEIGHED.get((how.subword_method, embedding), how.subword_method)
            params["pieces"] = str(RowMap.of(self._pieces(wanted)))
        builder = self.builders[how.builder]
        numerics = KITTY_1
        if builder.machine:
            assert self.machine is not None  # whoever lowers such a stage says where
            numerics = f"{KITTY_1};{self.machine.numpy_text()}"
        return Derivation(builder.name, builder.version, params, tuple(inputs), output, numerics)

    @cached_property
    def _rotations(self) -> dict[str, Any]:
        """How rows are turned, in the donor's table and in the model's."""
        found = []
        for party in reversed(self._both):
            table = party.table(embedding=True)
            assert table is not None  # a Party has an embedding
            rotation = rotation_in(party.view.config or {}, table.spec.shape[1])
            if rotation is None:
                message = (
                    f"mp_rope turns rows head by head, but the config.json of {party.view.label} has no "
                    f"num_attention_heads into which rows of {table.spec.shape[1]} can be cut"
                )
                hint = "approximation_method: omp does the same without turning them"
                self.problems.append(PlanError("KB342", message, at=str(self.stage.at), hint=hint))
            found.append(rotation or (1, 1.0))
        heads, bases = zip(*found, strict=True)
        return {"heads": list(heads), "bases": list(bases)}

    @property
    def _both(self) -> tuple[Party, Party]:
        assert self.model is not None
        assert self.donor is not None  # else there was a problem, and nobody asks
        return self.model, self.donor

    def _matching(self, embedding: bool) -> Matching:
        model, donor = self._both
        wanted = ("yes", "embed" if embedding else "lm_head")
        by_byte, by_prefix = self.stage.byte_match in wanted, self.stage.prefix_match in wanted
        return match(model.vocabulary, donor.vocabulary, by_byte=by_byte, by_prefix=by_prefix)

    def _copied(self, matching: Matching) -> list[int]:
        """The model's row that each row of the output is a copy of, or -1. Rows that are no token's in either
        vocabulary keep their number."""
        model, donor = (party.vocabulary for party in self._both)
        found = []
        for number, (same, alike) in enumerate(zip(matching.same, matching.alike, strict=True)):
            spare = number if donor.spare(number) and model.spare(number) else -1
            found.append(max(same, alike, spare))
        return found

    def _options(self, how: Approximation, shared: int) -> dict[str, Any]:
        """The parameters that change the bits of this method."""
        method = how.approximation_method
        options: dict[str, Any] = {"k": min(how.k, shared)} if method in _BY_NUMBER else {}
        if method in _BY_DISTANCE:
            options |= {"cosine_similarity": how.cosine_similarity, "weight_scheme": how.weight_scheme}
        if how.new_vocab_noise:
            options["noise"] = how.new_vocab_noise
        if how.new_vocab_scale is not None:
            options["scale"] = how.new_vocab_scale
        return options

    def _pieces(self, wanted: Sequence[int]) -> list[tuple[tuple[int, int], ...]]:
        """The model's rows that each row of the output is split into; nothing for rows that are not wanted."""
        model, donor = self._both
        found: list[tuple[tuple[int, int], ...]] = [()] * donor.vocabulary.rows
        if TOKENIZER not in model.files:
            message = f"{model.view.label} has no tokenizer.json that could split the texts of tokens"
            hint = "load its tokenizer with transformers' AutoTokenizer and save it beside the model: that writes one"
            self.problems.append(PlanError("KB340", message, at=str(self.stage.at), hint=hint))
            return found
        for number, split in zip(wanted, pieces(model.files, model.vocabulary, donor.vocabulary, wanted), strict=True):
            found[number] = tuple((0, row) for row in split)
        return found

    def config(self) -> Mapping[str, Any] | None:
        """The model's config.json with the donor's number of rows and ids of special tokens."""
        model, donor = self._both
        changed = with_rows(model.view.config or {}, model.vocabulary.rows, donor.vocabulary.rows)
        return _with_ids(changed, _ids(donor.view.config or {}))

    def companions(self) -> dict[str, bytes | None]:
        """The donor's tokenizer files in place of the model's, and generation_config.json with the donor's ids."""
        model, donor = self._both
        files: dict[str, bytes | None] = {name: donor.files.get(name) for name in TOKENIZER_FILES}
        if GENERATION in model.files:
            old = json.loads(model.files[GENERATION])
            theirs = {**_ids(donor.view.config or {}), **_ids(json.loads(donor.files.get(GENERATION, b"{}")))}
            files[GENERATION] = (json.dumps(_with_ids(old, theirs), indent=2, ensure_ascii=False) + "\n").encode()
        return files


def _ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of special tokens in a config, wherever they stand; the outermost count."""
    found: dict[str, Any] = {}
    for value in config.values():
        if isinstance(value, Mapping):
            found = {**_ids(value), **found}
    return {**found, **{key: value for key, value in config.items() if _ID.fullmatch(key)}}


def _with_ids(config: Mapping[str, Any], ids: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with these ids in place of its own, at any depth; those that only the other has are added to the top."""
    changed = {key: _replaced(value, ids) if isinstance(value, Mapping) else value for key, value in config.items()}
    own = {key: None for key in config if _ID.fullmatch(key)}
    return {**changed, **own, **ids}


def _replaced(config: Mapping[str, Any], ids: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _replaced(value, ids) if isinstance(value, Mapping) else ids.get(key) if _ID.fullmatch(key) else value
        for key, value in config.items()
    }
