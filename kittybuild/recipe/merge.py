"""From the text of a merge stage to MergeStage: method, models or slices, parameters at four levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kittybuild.errors import KittybuildError, RecipeError, nearest
from kittybuild.model.method import Method, Param, find
from kittybuild.model.recipe import At, Given, MergeStage, ModelRef, ModelUse, Slice
from kittybuild.recipe.reference import parse_reference
from kittybuild.recipe.schema import MergeText, SliceText
from kittybuild.recipe.settings import parse_setting, scalars
from kittybuild.recipe.yamltext import Document, Path

Problems = list[KittybuildError]


@dataclass(frozen=True, slots=True)
class Scope:
    """Where in the text we stand, what is known, and the problems and notes so far.

    `strict`: words of the peers that have no effect are errors (in a mergekit YAML they are notes). `left_out`: keys of
    the stage that are noted as wrong already.
    """

    document: Document
    path: Path
    methods: tuple[Method, ...]
    problems: Problems
    notes: list[str]
    strict: bool
    left_out: frozenset[str] = frozenset()

    def fail(self, code: str, message: str, at: At, hint: str | None = None) -> None:
        """Note a problem and go on."""
        self.problems.append(RecipeError(code, message, at=str(at), hint=hint))

    def without_effect(self, message: str, at: At, hint: str) -> None:
        """A word that the peers take and ignore."""
        if self.strict:
            self.fail("KB105", message, at, hint)
        else:
            self.notes.append(f"{at}: {message}: it is ignored, as mergekit does")

    def at(self, *path: str | int) -> At:
        """The place of a value below here."""
        return self.document.at((*self.path, *path))


def merge_stage(form: MergeText, scope: Scope) -> MergeStage | None:
    """The stage, without name and dtypes; None where its method is unknown (noted)."""
    _not_yet(form, scope)
    if scope.strict and form.name is not None:
        scope.fail("KB102", "unknown key 'name'", scope.at("name"), "a stage has the name that it stands under")
    method = find(scope.methods, form.merge_method)
    if method is None:
        words = [known.name for known in scope.methods]
        scope.fail(
            "KB104",
            f"unknown merge_method {form.merge_method!r}",
            scope.at("merge_method"),
            nearest(form.merge_method, words),
        )
    given = [key for key in ("models", "slices") if getattr(form, key)]
    if len(given) != 1 and not {"models", "slices"} & scope.left_out:
        found, hint = ("both", "keep one of them") if given else ("neither", "list the models under `models:`")
        scope.fail("KB108", f"a merge has either 'models' or 'slices', here are {found}", scope.at(), hint)
    base = parse_reference(form.base_model, scope.at("base_model"), scope.problems) if form.base_model else None
    per_slice = bool(form.slices) and all(part.base_model for part in form.slices or [])
    if method and method.base == "required" and not base and not per_slice and "base_model" not in scope.left_out:
        scope.fail("KB103", f"{method.name} needs a base_model", scope.at(), "add `base_model: NAME`")
    models = [use for i, item in enumerate(form.models or []) if (use := _use(item, scope, method, "models", i))]
    slices = [part for i, item in enumerate(form.slices or []) if (part := _slice(item, scope, method, i))]
    parameters = _parameters(form.parameters, scope, method, ("parameters",), shared=True)
    if method is None:
        return None
    if method.base == "required":
        _base_parameters(method, [(use, base) for use in models], scope)
        _base_parameters(method, [(use, part.base or base) for part in slices for use in part.sources], scope)
    return MergeStage("", method.name, tuple(models), tuple(slices), base, parameters)


def _base_parameters(method: Method, uses: list[tuple[ModelUse, ModelRef | None]], scope: Scope) -> None:
    """The base of such a method is no input with parameters of its own."""
    for use, base in uses:
        for name, given in use.parameters.items() if use.model == base else ():
            message = f"{name!r} has no effect on the base model: {method.name} works on differences from it"
            scope.without_effect(message, given.at, "take it out")


def _not_yet(form: MergeText, scope: Scope) -> None:
    """What mergekit knows and we do not build yet is an error, never ignored."""
    later = {
        "modules": bool(form.modules),
        "tokenizer_source": form.tokenizer_source not in (None, "base", form.base_model),
        "tokenizer": form.tokenizer is not None,
        "chat_template": form.chat_template is not None,
    }
    for key, used in later.items():
        if used:
            scope.fail(
                "KB109", f"{key!r} is not built yet", scope.at(key), "the base model's tokenizer is taken as it is"
            )


def _use(item: Any, scope: Scope, method: Method | None, *path: str | int) -> ModelUse | None:
    model = parse_reference(item.model, scope.at(*path, "model"), scope.problems)
    parameters = _parameters(item.parameters, scope, method, (*path, "parameters"), shared=False)
    layers = getattr(item, "layer_range", None)
    if layers is not None and not 0 <= layers[0] < layers[1]:
        hint = "[start, end): counted from 0, the end is not taken"
        scope.fail("KB113", f"layer_range {layers} holds no layer", scope.at(*path, "layer_range"), hint)
        return None
    span = (layers[0], layers[1]) if layers else None
    return ModelUse(model, span, parameters, scope.at(*path)) if model else None


def _slice(item: SliceText, scope: Scope, method: Method | None, index: int) -> Slice | None:
    path = ("slices", index)
    base = parse_reference(item.base_model, scope.at(*path, "base_model"), scope.problems) if item.base_model else None
    found = [_use(use, scope, method, *path, "sources", i) for i, use in enumerate(item.sources)]
    uses = tuple(use for use in found if use)
    if len({use.layers[1] - use.layers[0] for use in uses if use.layers}) > 1:
        spans = ", ".join(f"{use.model}: {list(use.layers or ())}" for use in uses)
        hint = "give each source of the slice as many layers"
        scope.fail("KB113", f"the sources of a slice span unequal numbers of layers ({spans})", scope.at(*path), hint)
    if item.residual_weight is not None:
        scope.without_effect("'residual_weight' has no effect", scope.at(*path, "residual_weight"), "take it out")
    parameters = _parameters(item.parameters, scope, method, (*path, "parameters"), shared=True)
    return Slice(uses, base, parameters, scope.at(*path)) if len(uses) == len(item.sources) else None


def _parameters(
    given: dict[str, Any] | None, scope: Scope, method: Method | None, path: Path, *, shared: bool
) -> dict[str, Given]:
    """The settings of one level. A word that no method knows is an error; one without effect here is, too."""
    found: dict[str, Given] = {}
    for name, value in (given or {}).items():
        at = scope.document.key_at((*scope.path, *path, name))
        param = method.param(name) if method else None
        if method and param is None:
            message, hint = f"{method.name} has no parameter {name!r}", nearest(name, [p.name for p in method.params])
            if any(other.param(name) for other in scope.methods):
                scope.without_effect(message, at, hint)
            else:
                scope.fail("KB105", message, at, hint)
        elif param and param.accepted:
            scope.notes.append(f"{at}: {name!r} {param.doc}: it is ignored")
        elif param and param.scope == "shared" and not shared:
            message = f"{name!r} is one value for all models, so it has no effect under one of them"
            scope.without_effect(message, at, "put it under `parameters:` of the slice or of the whole merge")
        elif value is not None and (setting := _setting(name, value, param, scope, at)):
            found[name] = setting
    return found


def _setting(name: str, value: Any, param: Param | None, scope: Scope, at: At) -> Given | None:
    """The setting, if each scalar in it is of the parameter's type and range."""
    try:
        setting = parse_setting(value, at)
    except ValueError as error:
        scope.fail("KB106", f"{name!r} cannot be read: {error}", at)
        return None
    for scalar in scalars(setting) if param else ():
        try:
            param.parse(scalar)  # type: ignore[union-attr]  # without one there is nothing to parse
        except ValueError as error:
            scope.fail("KB106", f"{name!r} cannot be {scalar!r}: it {error}", at)
            return None
    return setting
