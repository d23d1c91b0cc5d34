"""References to models: `name`, `path`, `org/name@revision+adapter@revision`, or the mapping form of mergekit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kittybuild.errors import KittybuildError, RecipeError
from kittybuild.model.recipe import At, ModelRef

REFERENCES = "NAME, PATH, org/name@revision or MODEL+ADAPTER"


def parse_reference(value: Any, at: At, problems: list[KittybuildError]) -> ModelRef | None:
    """The reference that a text gives, or None with a problem noted (KB111)."""
    try:
        if isinstance(value, str):
            return _from_text(value, at)
        return _from_mapping(value, at)
    except ValueError as error:
        hint = f"write {REFERENCES}"
        problems.append(RecipeError("KB111", f"not a reference to a model: {error}", at=str(at), hint=hint))
        return None


def _part(text: str) -> tuple[str, str | None]:
    name, sign, revision = text.partition("@")
    if not name or (sign and not revision) or "@" in revision:
        raise ValueError(f"{text!r} is not NAME or NAME@REVISION")
    return name, revision or None


def _from_text(text: str, at: At) -> ModelRef:
    model, sign, adapter = text.strip().partition("+")
    if "+" in adapter or (sign and not adapter):
        raise ValueError(f"{text!r} has not exactly one adapter after the '+'")
    name, revision = _part(model)
    adapter_name, adapter_revision = _part(adapter) if adapter else (None, None)
    return ModelRef(name, revision, adapter_name, adapter_revision, at)


def _from_mapping(value: Any, at: At) -> ModelRef:
    if not isinstance(value, Mapping) or "model" not in value or set(value) - {"model", "lora"}:
        raise ValueError("a mapping has 'model', and 'lora' or not")
    name, revision = _side(value["model"])
    adapter, adapter_revision = _side(value["lora"]) if value.get("lora") is not None else (None, None)
    return ModelRef(name, revision, adapter, adapter_revision, at)


def _side(value: Any) -> tuple[str, str | None]:
    if isinstance(value, str):
        return _part(value)
    if not isinstance(value, Mapping) or set(value) - {"path", "revision"} or not isinstance(value.get("path"), str):
        raise ValueError("a model is a text, or a mapping of 'path' and 'revision'")
    if not value["path"]:
        raise ValueError("the path is empty")
    revision = value.get("revision")
    return value["path"], None if revision is None else str(revision)
