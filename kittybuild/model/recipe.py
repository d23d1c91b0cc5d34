"""A recipe as a value: sources, stages in the order of the text, outputs. Every place in the text is kept beside it.

Positions (`at`) are for messages only: they take no part in equality and never in a key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from kittybuild.model.derivation import KITTY_1
from kittybuild.model.method import Scalar
from kittybuild.tensors import DType

if TYPE_CHECKING:
    from kittybuild.model.tokenizer import ChatTemplate, TokenizerRequest


@dataclass(frozen=True, slots=True)
class At:
    """A place in a recipe's text, counted from one."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


NOWHERE = At("<recipe>", 0, 0)


@dataclass(frozen=True, slots=True)
class Filtered:
    """A value for the tensors that it matches: by name, and by the number of their layer.

    `filter`: a part of the name, or `re:` and a pattern that is searched in it (None or `*`: all). `layers`: the
    half-open range of layers (None: all, and what stands outside the layers); its end None: to the last.
    """

    value: Scalar | tuple[Scalar, ...]
    filter: str | None
    layers: tuple[int, int | None] | None = None
    at: At = field(default=NOWHERE, compare=False)

    def __str__(self) -> str:
        start, end = self.layers or (0, None)
        layers = f"layers {start}..{'' if end is None else end}" if self.layers else ""
        named = "" if self.filter is None else f"the filter {self.filter!r}"
        return " of ".join(part for part in (named, layers) if part) or "the value without a filter"


@dataclass(frozen=True, slots=True)
class Given:
    """A parameter as the recipe gives it: filtered values, of which the first that matches counts."""

    values: tuple[Filtered, ...]
    at: At = field(default=NOWHERE, compare=False)


Parameters = Mapping[str, Given]


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model by name, path or `org/name@revision`, with an adapter on it or none."""

    model: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    at: At = field(default=NOWHERE, compare=False)

    def __str__(self) -> str:
        return "+".join(part for part in (self.base_text, self.adapter_text) if part)

    @property
    def base_text(self) -> str:
        """The reference without its adapter."""
        return _named(self.model, self.revision)

    @property
    def adapter_text(self) -> str | None:
        """The adapter's own reference."""
        return _named(self.adapter, self.adapter_revision) if self.adapter else None

    def parts(self) -> tuple[ModelRef, ...]:
        """The model, and the adapter on it if there is one, each by itself."""
        base = ModelRef(self.model, self.revision, at=self.at)
        return (base, ModelRef(self.adapter, self.adapter_revision, at=self.at)) if self.adapter else (base,)


def _named(name: str, revision: str | None) -> str:
    """Two references have one text only if they are equal: a path that holds a sign of ours stands in quotes."""
    shown = f"'{name}'" if "+" in name or "@" in name else name
    return f"{shown}@{revision}" if revision else shown


@dataclass(frozen=True, slots=True)
class SourceDecl:
    """A source: a folder or file (`path`), or a file inside an installed Python package (`package`, `path`), or a
    repository on the Hub (`hub`, `revision`), all of it or one file (`path`). `maybe`: on the Hub, if nothing here has
    the name; `path` is that name.
    """

    path: str
    package: str | None = None
    at: At = field(default=NOWHERE, compare=False)
    hub: str | None = None
    revision: str | None = None
    maybe: bool = False

    @property
    def words(self) -> dict[str, str]:
        """What a pin repeats of it, for a source that is where it says."""
        if self.hub:
            words = {"hub": self.hub, "revision": self.revision, "file": None if self.maybe else self.path}
        else:
            words = {"package": self.package, "file" if self.package else "path": self.path}
        return {key: word for key, word in words.items() if word}


@dataclass(frozen=True)
class ModelUse:
    """A model in a merge: all its layers, or the half-open range `layers`, with its own parameters.

    Of the names of its tensors that begin with `strip`, `add` takes the place of that.
    """

    model: ModelRef
    layers: tuple[int, int] | None = None
    parameters: Parameters = field(default_factory=dict)
    strip: str = ""
    add: str = ""
    at: At = field(default=NOWHERE, compare=False)


@dataclass(frozen=True)
class Slice:
    """Some layers of the output, merged from as many layers of each source. `method`: its own, else the merge's."""

    sources: tuple[ModelUse, ...]
    method: str | None = None
    base: ModelRef | None = None
    parameters: Parameters = field(default_factory=dict)
    at: At = field(default=NOWHERE, compare=False)


@dataclass(frozen=True)
class Module:
    """A part of a model that is merged by itself, as a stage would be: `models` or `slices`."""

    name: str
    models: tuple[ModelUse, ...] = ()
    slices: tuple[Slice, ...] = ()
    parameters: Parameters = field(default_factory=dict)
    at: At = field(default=NOWHERE, compare=False)


@dataclass(frozen=True)
class MergeStage:
    """A merge, as a mergekit configuration says it: `models` (whole), `slices` (layer ranges) or `modules`.

    `ignore`: the tensors that are left out of all models. `take`: where tensors that no other model has come from.
    `tensors`: whether those that not all models have are an error, left out, or merged of the models that have them.
    `tokenizer`: None where the text says nothing. `numerics`: the class of arithmetic. `allow_nan`: NaN and infinity
    in the output are no error.
    """

    name: str
    method: str
    models: tuple[ModelUse, ...] = ()
    slices: tuple[Slice, ...] = ()
    base: ModelRef | None = None
    parameters: Parameters = field(default_factory=dict)
    modules: tuple[Module, ...] = ()
    ignore: tuple[Filtered, ...] = ()
    take: Literal["base"] | None = None
    tensors: Literal["same", "intersection", "union"] = "same"
    dtype: DType | None = None
    out_dtype: DType | None = None
    tokenizer: TokenizerRequest | None = None
    chat_template: ChatTemplate | None = None
    numerics: str = KITTY_1
    keep: bool = True
    allow_nan: bool = False
    at: At = field(default=NOWHERE, compare=False)
    kind: Literal["merge", "state_dict"] = "merge"

    def references(self) -> tuple[ModelRef, ...]:
        """Every model it names, in the order of the text, each once."""
        slices = (*self.slices, *(part for module in self.modules for part in module.slices))
        bases = (self.base, *(part.base for part in slices))
        return tuple(dict.fromkeys([use.model for use in self.uses()] + [base for base in bases if base]))

    def uses(self) -> tuple[ModelUse, ...]:
        """Every entry of a model, in the order of the text."""
        parts: tuple[MergeStage | Module, ...] = (self, *self.modules)
        sliced = (use for part in parts for one in part.slices for use in one.sources)
        return (*(use for part in parts for use in part.models), *sliced)


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """An adapter and the weight of its difference."""

    adapter: ModelRef
    weight: float = 1.0
    at: At = field(default=NOWHERE, compare=False)


@dataclass(frozen=True)
class ApplyLoraStage:
    """Adapters added to a base: base + sum of weight * scale * B A."""

    name: str
    base: ModelRef
    adapters: tuple[AdapterUse, ...]
    dtype: DType | None = None
    out_dtype: DType | None = None
    keep: bool = True
    allow_nan: bool = False
    at: At = field(default=NOWHERE, compare=False)
    kind: Literal["apply_lora"] = "apply_lora"

    def references(self) -> tuple[ModelRef, ...]:
        """Its base, and the adapters."""
        return (self.base, *(use.adapter for use in self.adapters))


Sides = Literal["no", "yes", "embed", "lm_head"]
"""Neither table, both, or one of them."""


@dataclass(frozen=True, slots=True)
class Approximation:
    """How rows of tokens that the model lacks are made, in the words of mergekit-tokensurgeon.

    `k`: shared tokens that a row is made of, at most. `cosine_similarity`: instead of distances. `magikarp`: tokens
    that nobody trained are no help. `new_vocab_noise`, `new_vocab_scale`: added to new rows, then times.
    """

    approximation_method: str = "omp"
    k: int = 64
    cosine_similarity: bool = False
    weight_scheme: str = "distance_proportional"
    subword_method: str = "mean"
    magikarp: bool = False
    new_vocab_noise: float | None = None
    new_vocab_scale: float | None = None

    @property
    def builder(self) -> str:
        """The builder that makes the tables."""
        fitted = self.approximation_method == "common_interpolation" and self.weight_scheme != "distance_proportional"
        return f"transplant_{'fitted_interpolation' if fitted else self.approximation_method}"


@dataclass(frozen=True)
class TransplantStage:
    """A model with the tokenizer of a donor: tables get a row for each of the donor's tokens."""

    name: str
    model: ModelRef
    donor: ModelRef
    approximation: Approximation = Approximation()
    prefix_match: Sides = "no"
    byte_match: Sides = "no"
    dtype: DType | None = None
    out_dtype: DType | None = None
    keep: bool = True
    allow_nan: bool = False
    at: At = field(default=NOWHERE, compare=False)
    kind: Literal["transplant_tokenizer"] = "transplant_tokenizer"

    def references(self) -> tuple[ModelRef, ...]:
        """Model and donor."""
        return tuple(dict.fromkeys((self.model, self.donor)))


@dataclass(frozen=True)
class Expert:
    """A model whose layers' MLPs become an expert. `positive`, `negative`: prompts that lead to it and away from it.

    `noise`: the scale of normal noise that is added to its matrices; `residual`: the factor of what it adds to the
    residual stream.
    """

    model: ModelRef
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    noise: float | None = None
    residual: float | None = None
    at: At = field(default=NOWHERE, compare=False)


GateMode = Literal["hidden", "hidden_avg", "cheap_embed", "random", "uniform_random"]


@dataclass(frozen=True)
class MoeStage:
    """A mixture of experts: the MLPs of several models side by side in `base`, and a router over them.

    `architecture`: the beginning of the name of the family that is wanted, None to choose. `layout`: a tensor for each
    matrix of each expert, or all experts of a layer stacked.
    """

    name: str
    base: ModelRef
    experts: tuple[Expert, ...]
    shared: tuple[Expert, ...] = ()
    gate_mode: GateMode = "hidden"
    experts_per_token: int = 2
    architecture: str | None = None
    layout: Literal["split", "fused"] = "split"
    dtype: DType | None = None
    out_dtype: DType | None = None
    keep: bool = True
    allow_nan: bool = False
    at: At = field(default=NOWHERE, compare=False)
    kind: Literal["moe"] = "moe"

    def references(self) -> tuple[ModelRef, ...]:
        """The base and the experts, in the order of the text, each once."""
        return tuple(dict.fromkeys((self.base, *(expert.model for expert in (*self.experts, *self.shared)))))

    @property
    def runs_base(self) -> bool:
        """Whether the router's rows come from running the base, so that bits depend on the machine."""
        return self.gate_mode in ("hidden", "hidden_avg")

    @property
    def prompted(self) -> bool:
        """Whether the router's rows come from prompts."""
        return self.runs_base or self.gate_mode == "cheap_embed"


@dataclass(frozen=True, slots=True)
class Rank:
    """How many singular values a module keeps: `most`, or fewer.

    `exact`: `most` of them, of every module. `energy`: as few as keep that share of the sum of squares. `threshold`:
    those above it.
    """

    most: int
    exact: bool = True
    energy: float | None = None
    threshold: float | None = None

    @property
    def adaptive(self) -> bool:
        """Whether the rank depends on the singular values."""
        return self.energy is not None or self.threshold is not None


@dataclass(frozen=True)
class Decomposition:
    """How singular values are found: all of them, or `iterations` of a randomized method; in float64 if `double`.

    `distribute`: both factors take the root of the singular value; else A takes it whole.
    """

    rank: Rank
    iterations: int | None = None
    double: bool = False
    distribute: bool = True


@dataclass(frozen=True)
class ExtractLoraStage:
    """The difference of a model from its base as a PEFT adapter.

    `include`, `exclude`: patterns searched in the names of modules. `embeddings`: their tables and the head as factors,
    saved whole, or left out. `others`: what no factors can hold (norms, biases), saved or left out. `saved`: names of
    modules, or their last parts, that are saved whole. `transposed`: weights are stored [in, out]; None: as the config
    tells.
    """

    name: str
    model: ModelRef
    base: ModelRef
    decomposition: Decomposition
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    embeddings: Literal["lora", "save", "leave"] = "save"
    others: Literal["save", "leave"] = "save"
    saved: tuple[str, ...] = ()
    transposed: bool | None = None
    dtype: DType | None = None
    out_dtype: DType | None = None
    keep: bool = True
    allow_nan: bool = False
    at: At = field(default=NOWHERE, compare=False)
    kind: Literal["extract_lora"] = "extract_lora"

    def references(self) -> tuple[ModelRef, ...]:
        """The model and its base."""
        return (self.model, self.base)


AdapterMethod = Literal["cat", "svd", "linear", "ties", "dare_linear", "dare_ties"]


@dataclass(frozen=True)
class MergeAdaptersStage:
    """Adapters merged to one, without their base.

    `space`: "delta", what they add to the weights is merged, or "factors", each factor by itself as PEFT does it.
    `density`: the share that sparse methods keep. `decomposition`: how the merged differences are cut down; None: the
    ranks add up, or stay.
    """

    name: str
    method: AdapterMethod
    adapters: tuple[AdapterUse, ...]
    space: Literal["delta", "factors"] = "delta"
    density: float = 1.0
    decomposition: Decomposition | None = None
    dtype: DType | None = None
    out_dtype: DType | None = None
    keep: bool = True
    allow_nan: bool = False
    at: At = field(default=NOWHERE, compare=False)
    kind: Literal["merge_adapters"] = "merge_adapters"

    def references(self) -> tuple[ModelRef, ...]:
        """The adapters."""
        return tuple(use.adapter for use in self.adapters)


Stage = MergeStage | ApplyLoraStage | ExtractLoraStage | MergeAdaptersStage | TransplantStage | MoeStage


@dataclass(frozen=True, slots=True)
class Output:
    """A stage that becomes a folder; `shard_size` in bytes."""

    stage: str
    folder: str
    shard_size: int
    at: At = field(default=NOWHERE, compare=False)


@dataclass(frozen=True)
class Recipe:
    """The whole recipe. `text` is what was read, word for word; `dialect` says in whose words.

    `numerics`: the class of the stages that name none, where somebody chose one in place of the text's own.
    """

    name: str
    sources: Mapping[str, SourceDecl]
    stages: Mapping[str, Stage]
    outputs: Mapping[str, Output]
    text: str
    file: str
    dialect: Literal["kittybuild", "mergekit"] = "kittybuild"
    seed: int = 0
    notes: tuple[str, ...] = ()
    numerics: str | None = None

    def without(self, broken: Collection[str]) -> Recipe:
        """The recipe without these stages and sources, and without the stages that need them."""
        gone = set(broken)
        while more := {name for name, stage in self.stages.items() if name not in gone and gone & names_in(stage)}:
            gone |= more
        stages = {name: stage for name, stage in self.stages.items() if name not in gone}
        outputs = {name: output for name, output in self.outputs.items() if name in stages}
        return dataclasses.replace(self, stages=stages, outputs=outputs)


def names_in(stage: Stage) -> set[str]:
    """What a stage calls its models and adapters, with and without their revisions."""
    found = set[str | None]()
    for ref in stage.references():
        found |= {ref.model, ref.base_text, ref.adapter, ref.adapter_text}
    return {name for name in found if name}


def to_json(value: Any) -> Any:
    """A recipe value as plain data, without positions: what two equal recipes have in common."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    return value.value if isinstance(value, DType) else value
