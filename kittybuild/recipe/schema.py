"""The shape of recipe texts: the one place where pydantic checks what comes in. Meaning is given in parse.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from kittybuild.errors import KittybuildError, RecipeError, nearest
from kittybuild.recipe.yamltext import Document, Path


class _Text(BaseModel):
    model_config = ConfigDict(extra="forbid")


LayerRange = Annotated[list[StrictInt], Field(min_length=2, max_length=2)]
ReferenceText = StrictStr | dict[str, Any]
Name = Annotated[StrictStr, Field(pattern=r"^[^/+@\s][^/+@]*$")]


class ModelText(_Text):
    """`models[]` of a merge."""

    model: ReferenceText
    parameters: dict[str, Any] | None = None


class SliceSourceText(_Text):
    """`slices[].sources[]`."""

    model: ReferenceText
    layer_range: LayerRange
    parameters: dict[str, Any] | None = None


class SliceText(_Text):
    """`slices[]`."""

    sources: Annotated[list[SliceSourceText], Field(min_length=1)]
    base_model: ReferenceText | None = None
    parameters: dict[str, Any] | None = None
    residual_weight: float | None = None


class _StageText(_Text):
    dtype: StrictStr | None = None
    out_dtype: StrictStr | None = None
    keep: StrictBool = True


class MergeText(_StageText):
    """A merge stage, or a bare mergekit configuration (with `name` in a file of several documents)."""

    kind: Literal["merge"] = "merge"
    name: StrictStr | None = None
    merge_method: StrictStr
    models: list[ModelText] | None = None
    slices: list[SliceText] | None = None
    modules: dict[str, Any] | None = None
    base_model: ReferenceText | None = None
    parameters: dict[str, Any] | None = None
    tokenizer_source: Any = None
    tokenizer: Any = None
    chat_template: StrictStr | None = None


class AdapterText(_Text):
    """`adapters[]` of an apply_lora stage."""

    adapter: ReferenceText
    weight: float = 1.0


class ApplyLoraText(_StageText):
    """An apply_lora stage."""

    kind: Literal["apply_lora"]
    base: ReferenceText
    adapters: Annotated[list[AdapterText], Field(min_length=1)]


class SourceText(_Text):
    """A source: one of `path`, `package` + `file`, `hub`."""

    path: StrictStr | None = None
    package: StrictStr | None = None
    file: StrictStr | None = None
    hub: StrictStr | None = None
    revision: StrictStr | None = None


class OutputText(_Text):
    """An output folder."""

    folder: StrictStr
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
    sources: dict[Name, SourceText] = Field(default_factory=dict)
    defaults: DefaultsText = Field(default_factory=DefaultsText)
    stages: dict[Name, dict[str, Any]] = Field(min_length=1)
    outputs: dict[str, OutputText] = Field(default_factory=dict)


STAGE_KINDS: Mapping[str, type[MergeText | ApplyLoraText]] = MappingProxyType(
    {"merge": MergeText, "apply_lora": ApplyLoraText}
)


Schema = TypeVar("Schema", bound=BaseModel)


def check(
    schema: type[Schema], value: Any, document: Document, problems: list[KittybuildError], path: Path = ()
) -> Schema | None:
    """`value` (which stands at `path`) as `schema`. What is wrong is noted, each with its place.

    Unknown keys are noted and left out, so that the rest can still be looked at; after other problems: None.
    """
    try:
        return schema.model_validate(value)
    except ValidationError as failure:
        problems += _problems(schema, value, failure, document, path)
        unknown = [error["loc"] for error in failure.errors() if error["type"] == "extra_forbidden"]
        if len(unknown) < failure.error_count():
            return None
    return schema.model_validate(_without(value, {_real(loc, value) for loc in unknown}))


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
    seen: set[Path] = set()
    for error in failure.errors(include_url=False, include_context=False):
        loc = _real(error["loc"], value)
        if loc in seen:  # each arm of a union complains
            continue
        seen.add(loc)
        where = ".".join(str(part) for part in (*path, *loc))
        if error["type"] == "extra_forbidden":
            hint = nearest(str(loc[-1]), _fields_at(schema, loc[:-1]))
            yield RecipeError("KB102", f"unknown key {where!r}", at=str(document.key_at((*path, *loc))), hint=hint)
        elif error["type"] == "missing":
            hint = f"add {loc[-1]!r} here"
            yield RecipeError("KB103", f"{where!r} is missing", at=str(document.at((*path, *loc[:-1]))), hint=hint)
        else:
            hint = "a name holds no '/', '+', '@' or space at its start" if loc[-1:] == ("[key]",) else error["msg"]
            found = _value_at(value, loc)
            text = f"{where!r} cannot be {found!r}"
            yield RecipeError("KB103", text, at=str(document.at((*path, *loc))), hint=hint)


def _real(loc: tuple[str | int, ...], value: Any) -> Path:
    """`loc` without the names of union arms, which pydantic puts into it and the text does not hold."""
    found: list[str | int] = []
    for index, part in enumerate(loc):
        last = index == len(loc) - 1
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
