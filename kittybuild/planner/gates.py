"""Routers lowered: the prompts' tokens, the base's hidden states layer by layer, and a row for each expert.

Hidden states of all prompts are one tensor a layer, each of a hidden stage of its own: they are kept, the next layer's
are made of them, and running the base takes one layer's weights at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kittybuild.builders.base import Builders
from kittybuild.errors import KittybuildError, PlanError, SourceError
from kittybuild.model.derivation import KITTY_1, Derivation, Input, StageTensor
from kittybuild.model.recipe import Expert, MoeStage
from kittybuild.model.rows import RowMap
from kittybuild.planner.machine import Machine
from kittybuild.planner.moe_families import assumed
from kittybuild.planner.views import View
from kittybuild.tensors import DType, TensorSpec
from kittybuild.tokens.reading import TOKENIZER, read_vocabulary

EMBEDDING = "model.embed_tokens.weight"
STATES = "states"
_IRRELEVANT = frozenset({"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"})

Side = tuple[int, int, int]
"""The prompts of one side of an expert among the hidden states: the first row, how many prompts, rows of each."""


@dataclass
class Prompts:
    """The token ids of the prompts that a router needs, side by side as batches, shorter ones filled on the left.

    `ids`: those of all rows. `lengths`: for each batch, the tokens of each of its prompts.
    """

    ids: list[int] = field(default_factory=list)
    lengths: list[list[int]] = field(default_factory=list)

    def add(self, batch: Sequence[Sequence[int]], filler: int | None) -> Side:
        """One batch. `filler` None: its prompts are one text, end to end."""
        start = len(self.ids)
        if filler is None:
            self.ids += [token for tokens in batch for token in tokens]
            return start, 1, len(self.ids) - start
        longest = max(map(len, batch))
        for tokens in batch:
            self.ids += [filler] * (longest - len(tokens)) + list(tokens)
        self.lengths.append([len(tokens) for tokens in batch])
        return start, len(batch), longest


class Gates:
    """The rows of a stage's routers. `made`: the hidden states behind them, by the stage that makes them, in order."""

    def __init__(
        self,
        stage: MoeStage,
        base: View,
        files: Mapping[str, bytes],
        builders: Builders,
        seed: int,
        machine: Machine | None,
        problems: list[KittybuildError],
    ) -> None:
        self.stage, self.base, self.builders, self.seed, self.machine = stage, base, builders, seed, machine
        self.made: dict[str, Derivation] = {}
        self.sides: dict[int, tuple[Side, Side | None]] = {}
        if stage.prompted:
            self.prompts = self._prompts(_Tokens(base, files, str(stage.at), problems), problems)

    def _prompts(self, tokens: _Tokens, problems: list[KittybuildError]) -> Prompts:
        found = Prompts()
        filler = tokens.filler if self.stage.runs_base else None
        for expert in (*self.stage.experts, *self.stage.shared):
            batches = [[tokens.of(prompt, expert) for prompt in side] for side in (expert.positive, expert.negative)]
            if batches[0]:  # shared experts go without, where nothing weighs them
                sides = [found.add(batch, filler) if batch else None for batch in batches]
                assert sides[0] is not None  # a batch that is not empty has rows
                self.sides[id(expert)] = sides[0], sides[1]
        return found

    def rows(self, experts: Sequence[Expert], layer: int, name: str, dtype: DType) -> Derivation:
        """The rows of these experts in a layer's router, which is called `name`."""
        width = self.base.tensors[EMBEDDING].spec.shape[1]
        output = TensorSpec(dtype, (len(experts), width))
        if not self.stage.prompted:
            normal = self.stage.gate_mode == "random"
            params = {"normal": normal, "seed": self.seed, "tensor": name}
            return Derivation("router_random", self.builders["router_random"].version, params, (), output)
        sides = [[list(side) if side else None for side in self.sides[id(expert)]] for expert in experts]
        if not self.stage.runs_base:
            builder, params = "router_embeddings", {"experts": sides}
        else:
            builder, params = "router_states", {"experts": sides, "average": self.stage.gate_mode == "hidden_avg"}
        states = self._states(layer if self.stage.runs_base else 0)
        return Derivation(builder, self.builders[builder].version, params, (states,), output, self._class(builder))

    def _class(self, builder: str) -> str:
        if builder == "router_embeddings":
            return KITTY_1
        return f"{KITTY_1};{self.machine.text(numpy=False, transformers=True)}" if self.machine else KITTY_1

    def _states(self, layer: int) -> StageTensor:
        """What goes into a layer, for all prompts."""
        name = f"{self.stage.name}/into layer {layer}"
        if name not in self.made:
            self.made[name] = self._after(layer - 1) if layer else self._embedded()
        return StageTensor(name, STATES, self.made[name].output)

    def _embedded(self) -> Derivation:
        table = self.base.tensors[EMBEDDING]
        dtype = DType.BF16 if self.stage.runs_base else table.spec.dtype
        rows = RowMap.of(((0, token),) for token in self.prompts.ids)
        output = TensorSpec(dtype, (rows.count, table.spec.shape[1]))
        return Derivation("rows", self.builders["rows"].version, {"axis": 0, "rows": str(rows)}, (table,), output)

    def _after(self, layer: int) -> Derivation:
        before = self._states(layer)
        start = f"model.layers.{layer}."
        names = [name for name in self.base.tensors if name.startswith(start)]
        inputs: tuple[Input, ...] = (before, *(self.base.tensors[name] for name in names))
        config = {key: value for key, value in (self.base.config or {}).items() if key not in _IRRELEVANT}
        params = {
            "config": json.dumps(config, sort_keys=True),
            "layer": layer,
            "names": [name.removeprefix(start) for name in names],
            "prompts": self.prompts.lengths,
        }
        builder = self.builders["decoder_layer"]
        return Derivation(builder.name, builder.version, params, inputs, before.spec, self._class(builder.name))


class _Tokens:
    """Prompts as ids of the base's tokenizer, each after the token that begins a text."""

    def __init__(self, base: View, files: Mapping[str, bytes], at: str, problems: list[KittybuildError]) -> None:
        self.base, self.problems = base, problems
        limit = assumed(base.config or {"model_type": ""}).get("max_position_embeddings")
        self.limit = limit if type(limit) is int else None
        table = base.tensors[EMBEDDING].spec.shape[0]
        self.begin, self.filler, self._tokenizer = "", 0, None
        try:
            vocabulary = read_vocabulary(files, table, base.label)
            if vocabulary is None or TOKENIZER not in files:
                hint = "save it beside the model with transformers' AutoTokenizer, or choose `gate_mode: random`"
                raise PlanError("KB352", f"{base.label} has no {TOKENIZER}, which prompts need", at=at, hint=hint)
            self.begin = vocabulary.roles.get("bos_token", "")
            self.filler = vocabulary.ids.get(self.begin or vocabulary.roles.get("eos_token", ""), 0)
            self._tokenizer = _tokenizer(files[TOKENIZER], base.label)
        except KittybuildError as error:
            problems.append(error)

    def of(self, prompt: str, expert: Expert) -> list[int]:
        """The ids of one prompt; a prompt without tokens, or with more than the base takes, is noted."""
        if self._tokenizer is None:
            return [self.filler]
        try:
            ids: list[int] = self._tokenizer.encode(self.begin + prompt, add_special_tokens=False).ids
        except Exception as error:  # of whatever kind the library raises
            self.problems.append(_damaged(error, self.base.label))
            return [self.filler]
        shown = repr(prompt) if len(prompt) <= 40 else f"{prompt[:37]!r}..."
        rows = self.base.tensors[EMBEDDING].spec.shape[0]
        problem = hint = ""
        if not ids:
            problem, hint = f"the prompt {shown} has no token", "write some words"
        elif self.limit and len(ids) > self.limit:
            problem = f"the prompt {shown} has {len(ids)} tokens, and {self.base.label} takes {self.limit}"
            hint = "shorten it"
        elif max(ids) >= rows:
            problem = f"the prompt {shown} has the token {max(ids)}, and the table of {self.base.label} has {rows} rows"
            hint = "is the tokenizer the model's own?"
        if problem:
            self.problems.append(PlanError("KB353", problem, at=str(expert.at), hint=hint))
        return ids or [self.filler]


def _tokenizer(data: bytes, where: str):  # type: ignore[no-untyped-def]  # tokenizers has no types of its own
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(data.decode())
    except Exception as error:  # of whatever kind the library raises
        raise _damaged(error, where) from error


def _damaged(error: Exception, where: str) -> SourceError:
    return SourceError(
        "KB240", f"not a tokenizer: {error}", at=f"{where}: {TOKENIZER}", hint="download or copy it again"
    )
