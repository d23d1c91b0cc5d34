"""The reference of the merge methods as text: what `kittybuild methods NAME` prints and docs/methods.md holds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from kittybuild.builders.base import Builder, Builders
from kittybuild.model.derivation import KITTY_1
from kittybuild.model.method import Method, Param

_KINDS: Mapping[type, str] = MappingProxyType(
    {float: "number", int: "whole number", bool: "true or false", str: "word"}
)
_COLUMNS = ("| parameter | given | kind | default | |", "|---|---|---|---|---|")
_SCOPES: Mapping[str, str] = MappingProxyType({"input": "for each model", "shared": "for all models"})
_BASES: Mapping[str, str] = MappingProxyType(
    {
        "required": "the base model is required",
        "optional": "works on differences from the base model, if there is one",
        "ordinary": "a base model is one of them",
    }
)


def names(builders: Builders) -> tuple[str, ...]:
    """All methods: those of kitty-1 in their order, then those that only others have."""
    return tuple(dict.fromkeys(m.name for numerics in builders.classes() for m in builders.methods(numerics)))


def classes_of(name: str, builders: Builders) -> tuple[str, ...]:
    """The classes of arithmetic that have a method of that name."""
    return tuple(numerics for numerics in builders.classes() if _method(name, numerics, builders))


def page(name: str, builders: Builders) -> str:
    """The page of one method, as Markdown: our own, then what is otherwise in the peers' classes."""
    first, *others = classes_of(name, builders)
    method = _method(name, first, builders)
    assert method is not None  # the class has it
    lines = [f"## {name}", "", *_head(method), "", *_table(method)]
    if others or first != KITTY_1:
        lines += ["", f"Numerics: {_listed([first, *others])}."]
    apart: dict[tuple[str, ...], list[str]] = {}
    for numerics in others:
        theirs = _method(name, numerics, builders)
        assert theirs is not None  # the class has it
        apart.setdefault(tuple(_apart(method, theirs)), []).append(numerics)
    for difference, classes in apart.items():
        if difference:
            lines += ["", f"In {_listed(classes)}{difference[0]}", *difference[1:]]
    return "\n".join(lines) + "\n"


def to_json(name: str, builders: Builders) -> dict[str, Any]:
    """One method, as `methods --json` prints it: its form in each class that has it."""
    found = {}
    for numerics in classes_of(name, builders):
        builder = builders.get(name, numerics)
        assert builder is not None  # the class has it
        found[numerics] = _form(builder)
    return {"name": name, "numerics": found}


def _form(builder: Builder) -> dict[str, Any]:
    method = builder.method
    assert method is not None  # it is a method's
    fields = ("title", "doc", "paper", "base", "least", "most", "random")
    return {
        "version": builder.version,
        **{name: getattr(method, name) for name in fields},
        "params": [_param_form(param) for param in method.params],
    }


def _param_form(param: Param) -> dict[str, Any]:
    fields = ("name", "scope", "default", "required", "low", "high", "accepted", "doc")
    form = {name: getattr(param, name) for name in fields}
    return form | {"kind": _KINDS[param.kind], "choices": list(param.choices)}


def _method(name: str, numerics: str, builders: Builders) -> Method | None:
    builder = builders.get(name, numerics)
    return builder.method if builder else None


def _head(method: Method) -> Iterator[str]:
    paper = f" ([source]({method.paper}))" if method.paper else ""
    draws = " It draws random numbers: `seed` decides them." if method.random else ""
    doc = f" {method.doc}" if method.doc else ""
    yield f"**{method.title}**{paper}.{doc}{draws}"
    yield ""
    yield f"Takes {method.counts_text()}; {_BASES[method.base]}."


def _table(method: Method) -> Iterator[str]:
    if not method.params:
        yield "It has no parameters."
        return
    yield from _COLUMNS
    yield from map(_row, method.params)


def _row(param: Param) -> str:
    kind = ", ".join(f"`{word}`" for word in param.choices) or _KINDS[param.kind]
    if param.low is not None or param.high is not None:
        kind += f", {param.range_text()}"
    default = f"`{_word(param.default)}`" if param.default is not None else "none"
    default = "required" if param.required else "ignored, with a note" if param.accepted else default
    return f"| `{param.name}` | {_SCOPES[param.scope]} | {kind} | {default} | {param.doc} |"


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _apart(ours: Method, theirs: Method) -> Iterator[str]:
    """What a peer's form of a method has otherwise than ours: the rest of a sentence, then perhaps a table."""
    told = []
    if (theirs.base, theirs.least, theirs.most) != (ours.base, ours.least, ours.most):
        told.append(f" it takes {theirs.counts_text()}; {_BASES[theirs.base]}")
    if lacking := [param.name for param in ours.params if theirs.param(param.name) is None]:
        told.append(f" there is no {_listed(lacking)}")
    if theirs.random and not ours.random:
        told.append(" it draws random numbers")
    rows = [_row(param) for param in theirs.params if ours.param(param.name) != param]
    if told:
        yield f"{';'.join(told)}." if not rows else f"{';'.join(told)}; and:"
    elif rows:
        yield ":"
    if rows:
        yield from ("", *_COLUMNS, *rows)


def _listed(words: list[str]) -> str:
    *some, last = [f"`{word}`" for word in words]
    return f"{', '.join(some)} and {last}" if some else last
