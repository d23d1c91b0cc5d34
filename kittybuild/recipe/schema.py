"""The shape of recipe texts: the one place where pydantic checks what comes in. Meaning is given in parse.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from kittybuild.errors import KittybuildError, RecipeError, nearest
from kittybuild.recipe.reference import REFERENCES
from kittybuild.recipe.yamltext import Document, Path


class _Text(BaseModel):
    model_config = ConfigDict(extra="forbid", defer_build=True)  # most texts need a few of the schemas


LayerRange = Annotated[list[StrictInt], Field(min_length=2, max_length=2)]
ReferenceText = StrictStr | dict[str, Any]
Words = Annotated[StrictStr, Field(min_length=1)]
Name = Annotated[StrictStr, Field(pattern=r"^[^/+@\s][^/+@]*$")]


class ModelText(_Text):
    """`models[]` of a merge."""

    model: ReferenceText
    parameters: dict[str, Any] | None = None
    strip: StrictStr = ""
    add: StrictStr = ""


class SliceSourceText(_Text):
    """`slices[].sources[]`."""

    model: ReferenceText
    layer_range: LayerRange
    parameters: dict[str, Any] | None = None
    strip: StrictStr = ""
    add: StrictStr = ""


class SliceText(_Text):
    """`slices[]`."""

    sources: Annotated[list[SliceSourceText], Field(min_length=1)]
    merge_method: StrictStr | None = None
    base_model: ReferenceText | None = None
    parameters: dict[str, Any] | None = None
    residual_weight: float | None = None


class ModuleText(_Text):
    """`modules.NAME`."""

    models: list[ModelText] | None = None
    slices: list[SliceText] | None = None
    parameters: dict[str, Any] | None = None


class _StageText(_Text):
    dtype: StrictStr | None = None
    out_dtype: StrictStr | None = None
    keep: StrictBool = True
    allow_nan: StrictBool | None = None


class TokenRuleText(_Text):
    """`tokenizer.tokens.TOKEN`; the mapping forms of `source` are told apart by their `kind`."""

    source: ReferenceText | None = None
    force: StrictBool = False


class TokenizerText(_Text):
    """`tokenizer` of a merge."""

    source: ReferenceText = "union"
    tokens: dict[str, TokenRuleText] | None = None
    pad_to_multiple_of: Annotated[StrictInt, Field(ge=1)] | None = None


class MergeText(_StageText):
    """A merge stage, or a bare mergekit configuration (with `name` in a file of several documents)."""

    kind: Literal["merge"] = "merge"
    name: StrictStr | None = None
    merge_method: StrictStr
    numerics: StrictStr | None = None
    models: list[ModelText] | None = None
    slices: list[SliceText] | None = None
    modules: dict[Words, ModuleText] | None = None
    base_model: ReferenceText | None = None
    parameters: dict[str, Any] | None = None
    ignore: list[Words] = Field(default_factory=list)
    take: Literal["base"] | None = None
    tokenizer_source: ReferenceText | None = None
    tokenizer: TokenizerText | None = None
    chat_template: Words | None = None


class StateDictText(MergeText):
    """A state_dict stage: a merge of whole files, which need not have the same tensors."""

    kind: Literal["state_dict"]  # type: ignore[assignment]  # a kind of its own
    tensors: Literal["same", "intersection", "union"] = "same"


class AdapterText(_Text):
    """`adapters[]` of an apply_lora stage."""

    adapter: ReferenceText
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0


class ApplyLoraText(_StageText):
    """An apply_lora stage."""

    kind: Literal["apply_lora"]
    base: ReferenceText
    adapters: Annotated[list[AdapterText], Field(min_length=1)]


Sides = StrictBool | Literal["no", "yes", "embed", "lm_head"]


class TransplantText(_StageText):
    """A transplant_tokenizer stage; its options are those of mergekit-tokensurgeon."""

    kind: Literal["transplant_tokenizer"]
    model: ReferenceText
    donor: ReferenceText
    approximation_method: Literal[
        "omp",
        "common_interpolation",
        "subword",
        "mean",
        "zero",
        "randn",
        "john_hewitt",
        "landmark_pca",
        "stb",
        "mp_rope",
    ] = "omp"
    k: Annotated[StrictInt, Field(ge=1)] = 64
    cosine_similarity: StrictBool = False
    weight_scheme: Literal["distance_proportional", "barycentric", "least_squares"] = "distance_proportional"
    subword_method: Literal["mean", "sum", "weighted_mean", "first_last"] = "mean"
    prefix_match: Sides = "no"
    byte_match: Sides = "no"
    magikarp: StrictBool = False
    new_vocab_noise: Annotated[float, Field(allow_inf_nan=False, ge=0)] | None = None
    new_vocab_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None


class ExpertText(_Text):
    """`experts[]` and `shared_experts[]` of a moe stage."""

    source_model: ReferenceText
    positive_prompts: list[StrictStr] | None = None
    negative_prompts: list[StrictStr] | None = None
    noise_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None
    residual_scale: Annotated[float, Field(allow_inf_nan=False)] | None = None


class MoeText(_StageText):
    """A moe stage, or a bare mergekit-moe configuration (with `name` in a file of several documents)."""

    kind: Literal["moe"] = "moe"
    name: StrictStr | None = None
    base_model: ReferenceText
    experts: Annotated[list[ExpertText], Field(min_length=1)]
    shared_experts: list[ExpertText] | None = None
    gate_mode: Literal["hidden", "hidden_avg", "cheap_embed", "random", "uniform_random"] = "hidden"
    experts_per_token: StrictInt = 2
    architecture: Words | None = None
    layout: Literal["split", "fused"] = "split"


class RankText(_Text):
    """`rank` of stages that make adapters; a number alone is `most`, of every module."""

    most: Annotated[StrictInt, Field(ge=1)]
    exact: StrictBool = False
    energy: Annotated[float, Field(gt=0, le=1)] | None = None
    threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


Rank = Annotated[RankText, BeforeValidator(lambda rank: {"most": rank, "exact": True} if type(rank) is int else rank)]


class ExtractLoraText(_StageText):
    """An extract_lora stage."""

    kind: Literal["extract_lora"]
    model: ReferenceText
    base: ReferenceText
    rank: Rank
    svd: Literal["exact", "randomized"] = "exact"
    iterations: Annotated[StrictInt, Field(ge=0, le=64)] = 10
    float64: StrictBool = False
    distribute_scale: StrictBool = True
    include: list[Words] = Field(default_factory=list)
    exclude: list[Words] = Field(default_factory=list)
    embeddings: Literal["lora", "save", "leave"] = "save"
    others: Literal["save", "leave"] = "save"
    modules_to_save: list[Words] = Field(default_factory=list)
    fan_in_fan_out: StrictBool | None = None


class MergeAdaptersText(_StageText):
    """A merge_adapters stage."""

    kind: Literal["merge_adapters"]
    method: Literal["cat", "svd", "linear", "ties", "dare_linear", "dare_ties"]
    adapters: Annotated[list[AdapterText], Field(min_length=1)]
    space: Literal["delta", "factors"] = "delta"
    density: Annotated[float, Field(gt=0, le=1)] = 1.0
    rank: Rank | None = None
    svd: Literal["exact", "randomized"] = "exact"
    iterations: Annotated[StrictInt, Field(ge=0, le=64)] = 10
    float64: StrictBool = False
    distribute_scale: StrictBool = True


class SourceText(_Text):
    """A source: one of `path`, `package` + `file`, `hub`."""

    path: Words | None = None
    package: Words | None = None
    file: Words | None = None
    hub: Words | None = None
    revision: Words | None = None


class OutputText(_Text):
    """An output folder."""

    folder: Words
    shard_size: StrictStr | StrictInt = "1GB"


class DefaultsText(_Text):
    """What every stage takes that does not say otherwise."""

    dtype: StrictStr | None = None
    out_dtype: StrictStr | None = None
    seed: StrictInt = 0


class RecipeText(_Text):
    """A whole recipe."""

    kittybuild: Literal[1]
    name: StrictStr | None = None
    dialect: Literal["kittybuild", "mergekit"] = "kittybuild"
    sources: dict[Name, SourceText] = Field(default_factory=dict)
    defaults: DefaultsText = Field(default_factory=DefaultsText)
    numerics: StrictStr | None = None
    allow_nan: StrictBool = False
    stages: dict[Name, dict[str, Any]] = Field(min_length=1)
    outputs: dict[str, OutputText] = Field(default_factory=dict)


StageText = MergeText | ApplyLoraText | ExtractLoraText | MergeAdaptersText | TransplantText | MoeText
STAGE_KINDS: Mapping[str, type[StageText]] = MappingProxyType(
    {
        "merge": MergeText,
        "state_dict": StateDictText,
        "apply_lora": ApplyLoraText,
        "transplant_tokenizer": TransplantText,
        "moe": MoeText,
        "extract_lora": ExtractLoraText,
        "merge_adapters": MergeAdaptersText,
    }
)


Schema = TypeVar("Schema", bound=BaseModel)


def check(
    schema: type[Schema],
    value: Any,
    document: Document,
    problems: list[KittybuildError],
    path: Path = (),
    deep: int = 1,
) -> tuple[Schema | None, frozenset[str]]:
    """`value` (which stands at `path`) as `schema`, and its keys that had to be left out. Problems are noted.

    So that the rest can still be looked at, unknown keys are left out, and of what is wrong the entry that the first
    `deep` keys lead to; None where nothing is left.
    """
    try:
        return schema.model_validate(value), frozenset()
    except ValidationError as failure:
        problems += _problems(schema, value, failure, document, path)
        errors = [(_real(error["loc"], value), error["type"]) for error in failure.errors()]
    left_out = {loc if kind == "extra_forbidden" else loc[:deep] for loc, kind in errors}
    try:
        return schema.model_validate(_without(value, left_out)), frozenset(str(loc[0]) for loc in left_out if loc)
    except ValidationError:
        return None, frozenset()


def _without(value: Any, paths: set[Path], here: Path = ()) -> Any:
    """`value` without the keys at `paths`."""
    if isinstance(value, Mapping):
        kept = {key: item for key, item in value.items() if (*here, key) not in paths}
        return {key: _without(item, paths, (*here, key)) for key, item in kept.items()}
    if isinstance(value, list):
        return [_without(item, paths, (*here, index)) for index, item in enumerate(value)]
    return value


def _problems(
    schema: type[BaseModel], value: Any, failure: ValidationError, document: Document, path: Path
) -> Iterator[RecipeError]:
    found: dict[Path, list[Any]] = {}  # each arm of a union complains, and is no problem of its own
    for error in failure.errors(include_url=False):
        found.setdefault(_real(error["loc"], value), []).append(error)
    for loc, errors in found.items():
        where, kind = ".".join(str(part) for part in (*path, *loc)), errors[0]["type"]
        at = str(document.at((*path, *loc)))
        if kind == "extra_forbidden":
            hint = nearest(str(loc[-1]), _fields_at(schema, loc[:-1]))
            yield RecipeError("KB102", f"unknown key {where!r}", at=str(document.key_at((*path, *loc))), hint=hint)
        elif kind == "missing":
            above = str(document.at((*path, *loc[:-1])))
            yield RecipeError("KB103", f"{where!r} is missing", at=above, hint=f"add {loc[-1]!r} here")
        elif errors[0]["loc"][-1] == "[key]":
            hint = "a name holds no '/', '+', '@' and no space at its start"
            key_at = str(document.key_at((*path, *loc)))
            yield RecipeError("KB103", f"{str(loc[-1])!r} cannot be a name", at=key_at, hint=hint)
        else:
            text = f"{where!r} cannot be {_short(_value_at(value, loc))}"
            yield RecipeError("KB103", text, at=at, hint=f"write {_wanted(loc, errors)}")


_WANTED: Mapping[str, str] = MappingProxyType(
    {
        "string_type": "a text, in quotes if it looks like a number",
        "string_too_short": "a text that is not empty",
        "int_type": "a whole number",
        "bool_type": "true or false",
        "float_type": "a number",
        "float_parsing": "a number",
        "finite_number": "a finite number",
        "greater_than_equal": "a number of at least 1",
        "list_type": "a list: lines that start with '- '",
        "dict_type": "keys with values, one below the other",
        "model_type": "keys with values, one below the other",
    }
)


def _wanted(loc: Path, errors: list[Any]) -> str:
    """What should stand there, for a person."""
    kinds = {error["type"] for error in errors}
    if loc == ("kittybuild",):
        return "`kittybuild: 1`, the format that this version reads"
    if kinds == {"string_type", "dict_type"}:
        return REFERENCES
    if kinds == {"string_type", "int_type"}:
        return "a size such as 500MB or 4GB"
    if loc == ("dialect",):
        return "kittybuild or mergekit"
    if loc == ("tensors",):
        return "same, intersection or union"
    if loc == ("take",):
        return "`take: base`, or leave it out"
    if loc[-1] == "layer_range":
        return "[start, end): the first layer and the one behind the last"
    if "too_short" in kinds:
        return "at least one"
    return _WANTED.get(errors[0]["type"], str(errors[0]["msg"]))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _real(loc: tuple[str | int, ...], value: Any) -> Path:
    """`loc` without the names of union arms, which pydantic puts into it and the text does not hold."""
    found: list[str | int] = []
    for index, part in enumerate(loc):
        last = index == len(loc) - 1 and part != "[key]"
        if isinstance(value, Mapping) and (part in value or last):
            found.append(part)
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            found.append(part)
            value = value[part]
    return tuple(found)


def _value_at(value: Any, path: Path) -> Any:
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return part
    return value


def _fields_at(schema: Any, path: Path) -> tuple[str, ...]:
    """The known keys of the model that stands at `path` below `schema`."""
    model = schema
    for part in path:
        field = model.model_fields.get(part)  # an index or a free name: the model was found a step before
        inner = _types_in(field.annotation) if field else iter(())
        model = next((arg for arg in inner if hasattr(arg, "model_fields")), model)
    return tuple(model.model_fields)


def _types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for arg in get_args(annotation):
        yield from _types_in(arg)
