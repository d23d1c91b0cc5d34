"""From the text of a merge stage to MergeStage: methods, models or slices, parameters at four levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kittybuild.errors import KittybuildError, RecipeError, nearest
from kittybuild.model.method import Catalogue, Method, Param, find
from kittybuild.model.recipe import At, Filtered, Given, MergeStage, ModelRef, ModelUse, Module, Slice
from kittybuild.model.tokenizer import ChatTemplate
from kittybuild.recipe.reference import parse_reference
from kittybuild.recipe.schema import MergeText, ModuleText, SliceText, StateDictText
from kittybuild.recipe.settings import entries, parse_entry, scalars
from kittybuild.recipe.tokenizer import read_tokenizer
from kittybuild.recipe.yamltext import Document, Path

Problems = list[KittybuildError]
CONTENTS = ("models", "slices", "modules")


@dataclass(frozen=True, slots=True)
class Scope:
    """Where in the text we stand, what is known, and the problems and notes so far.

    `numerics`: the class of arithmetic, of which there are the methods `known`. `strict`: words of the peers that have
    no effect are errors (in a mergekit YAML they are notes). `left_out`: keys of the stage that are noted as wrong
    already.
    """

    document: Document
    path: Path
    catalogue: Catalogue
    numerics: str
    problems: Problems
    notes: list[str]
    strict: bool
    left_out: frozenset[str] = frozenset()

    @property
    def known(self) -> tuple[Method, ...]:
        """The methods of the class."""
        return self.catalogue[self.numerics]

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
    if scope.strict and form.name is not None:
        scope.fail("KB102", "unknown key 'name'", scope.at("name"), "a stage has the name that it stands under")
    method = _method(form.merge_method, scope, "merge_method")
    given = [key for key in CONTENTS if getattr(form, key)]
    if len(given) != 1 and not scope.left_out.intersection(CONTENTS):
        found, hint = (
            (" and ".join(given), "keep one of them") if given else ("none", "list the models under `models:`")
        )
        message = f"a merge has one of 'models', 'slices' and 'modules', here are {found}"
        scope.fail("KB108", message, scope.at(), hint)
    base = parse_reference(form.base_model, scope.at("base_model"), scope.problems) if form.base_model else None
    both: list[tuple[MergeText | ModuleText, Scope, str]] = [(form, scope, "")]
    for name, module in (form.modules or {}).items():
        both.append((module, replace(scope, path=(*scope.path, "modules", name)), name))
    found_in = [_contents(part, inside, method, base, name) for part, inside, name in both]
    used = tuple({one.name: one for methods, _ in found_in for one in methods if one}.values())
    unknown = any(one is None for methods, _ in found_in for one in methods)
    parameters = _parameters(form.parameters, scope, () if unknown else used, ("parameters",), shared=True)
    tokenizer = read_tokenizer(form, scope.document, scope.path, scope.problems)
    if method is None:
        return None
    for methods, contents in found_in:
        _bases_parameters(methods, contents, base, scope)
    (_, own), *modules = found_in
    ignore = tuple(entry for index, text in enumerate(form.ignore) if (entry := _ignored(text, index, scope)))
    if form.take and not base and "base_model" not in scope.left_out:
        scope.fail("KB103", "'take: base' needs a base_model", scope.at("take"), "add `base_model: NAME`")
    rest: dict[str, Any] = {"ignore": ignore, "take": form.take, "numerics": scope.numerics}
    if isinstance(form, StateDictText):
        for key in ("slices", "modules", "name"):
            if getattr(form, key):
                scope.fail("KB102", f"unknown key {key!r}", scope.at(key), "a state_dict stage merges whole files")
        rest |= {"tensors": form.tensors, "kind": "state_dict"}
    rest["modules"] = tuple(module for _, module in modules)
    rest["tokenizer"] = tokenizer
    if form.chat_template:
        rest["chat_template"] = ChatTemplate(form.chat_template, scope.at("chat_template"))
    return MergeStage("", method.name, own.models, own.slices, base, parameters, **rest)


def _contents(
    form: MergeText | ModuleText, scope: Scope, method: Method | None, base: ModelRef | None, name: str
) -> tuple[tuple[Method | None, ...], Module]:
    """The methods, and the models or slices, of a whole merge or (with its name and parameters) of a module."""
    if name and bool(form.models) == bool(form.slices):
        scope.fail("KB108", f"the module {name!r} has either 'models' or 'slices'", scope.at(), "keep one of them")
    texts = form.slices or []
    methods = [_slice_method(item, index, method, scope) for index, item in enumerate(texts)]
    if not base and "base_model" not in scope.left_out:
        lacking = [own for own, item in zip(methods, texts, strict=True) if not item.base_model]
        _need_base(lacking if form.slices else [method], scope)
    models = [use for i, item in enumerate(form.models or []) if (use := _use(item, scope, method, "models", i))]
    parts = [_slice(item, scope, own, i) for i, (item, own) in enumerate(zip(texts, methods, strict=True))]
    everywhere = (method, *methods)
    used = tuple({one.name: one for one in everywhere if one}.values()) if all(everywhere) else ()
    parameters = _parameters(form.parameters, scope, used, ("parameters",), shared=True) if name else {}
    slices = tuple(part for part in parts if part)
    return everywhere, Module(name, tuple(models), slices, parameters, scope.at())


def _bases_parameters(methods: Sequence[Method | None], module: Module, base: ModelRef | None, scope: Scope) -> None:
    """Parameters of the base of a whole merge or of a module, and of its slices, which have these methods."""
    method, *own = methods
    if method:
        _base_parameters(method, module.models, base, scope)
    if len(own) == len(module.slices):  # else some slices are wrong, which is noted
        for part, found in zip(module.slices, own, strict=True):
            if found:
                _base_parameters(found, part.sources, part.base or base, scope)


def _ignored(text: str, index: int, scope: Scope) -> Filtered | None:
    """A pattern of `ignore`, which is written as a filter is."""
    at = scope.at("ignore", index)
    try:
        return parse_entry({"value": True, "filter": text}, at)
    except ValueError as error:
        scope.fail("KB106", f"'ignore' cannot be read: {error}", at)
        return None


def _slice_method(item: SliceText, index: int, method: Method | None, scope: Scope) -> Method | None:
    """The method of a slice: its own, else the merge's."""
    return _method(item.merge_method, scope, "slices", index, "merge_method") if item.merge_method else method


def _method(name: str, scope: Scope, *path: str | int) -> Method | None:
    """The method of that name in the stage's class; None where there is none (noted)."""
    found = find(scope.known, name)
    if found is None:
        message, hint = f"unknown merge_method {name!r}", nearest(name, [known.name for known in scope.known])
        if others := [numerics for numerics, methods in scope.catalogue.items() if find(methods, name)]:
            message = f"{scope.numerics} has no merge_method {name!r}"
            hint = f"{', '.join(others)} {'has' if len(others) == 1 else 'have'} it: write `numerics: {others[0]}`"
        scope.fail("KB104", message, scope.at(*path), hint)
    return found


def _need_base(methods: Sequence[Method | None], scope: Scope) -> None:
    """Note that there is no base for one of these methods."""
    needing = next((method for method in methods if method and method.base == "required"), None)
    if needing:
        scope.fail("KB103", f"{needing.name} needs a base_model", scope.at(), "add `base_model: NAME`")


def _base_parameters(method: Method, uses: Sequence[ModelUse], base: ModelRef | None, scope: Scope) -> None:
    """The base of a method on differences is no input with parameters of its own."""
    if method.base == "ordinary":
        return
    use = next((use for use in uses if use.model == base), None)
    for name, given in use.parameters.items() if use else ():
        message = f"{name!r} has no effect on the base model: {method.name} works on differences from it"
        scope.without_effect(message, given.at, "take it out")


def _use(item: Any, scope: Scope, method: Method | None, *path: str | int) -> ModelUse | None:
    model = parse_reference(item.model, scope.at(*path, "model"), scope.problems)
    parameters = _parameters(item.parameters, scope, (method,) if method else (), (*path, "parameters"), shared=False)
    layers = getattr(item, "layer_range", None)
    if layers is not None and not 0 <= layers[0] < layers[1]:
        hint = "[start, end): counted from 0, the end is not taken"
        scope.fail("KB113", f"layer_range {layers} holds no layer", scope.at(*path, "layer_range"), hint)
        return None
    span = (layers[0], layers[1]) if layers else None
    return ModelUse(model, span, parameters, item.strip, item.add, scope.at(*path)) if model else None


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
    parameters = _parameters(item.parameters, scope, (method,) if method else (), (*path, "parameters"), shared=True)
    own = method.name if method and item.merge_method else None
    return Slice(uses, own, base, parameters, scope.at(*path)) if len(uses) == len(item.sources) else None


def _parameters(
    given: Mapping[str, Any] | None, scope: Scope, methods: Sequence[Method], path: Path, *, shared: bool
) -> dict[str, Given]:
    """The settings of one level, for the methods that it counts for (none: they are unknown, which is noted).

    A word that no method knows is an error; one without effect here is, too.
    """
    found: dict[str, Given] = {}
    for name, value in (given or {}).items():
        at = scope.document.key_at((*scope.path, *path, name))
        params = [param for method in methods if (param := method.param(name))]
        if methods and not params:
            _unknown(name, scope, methods, at)
        elif params and all(param.accepted for param in params):
            scope.notes.append(f"{at}: {name!r} {params[0].doc}: it is ignored")
        elif params and not shared and all(param.scope == "shared" for param in params):
            message = f"{name!r} is one value for all models, so it has no effect under one of them"
            scope.without_effect(message, at, "put it under `parameters:` of the slice or of the whole merge")
        elif value is not None and (setting := _setting(name, value, params, scope, (*path, name), at)):
            found[name] = setting
    return found


def _unknown(name: str, scope: Scope, methods: Sequence[Method], at: At) -> None:
    """None of the methods has such a parameter."""
    names = " and ".join(method.name for method in methods)
    message = f"{names} {'has' if len(methods) == 1 else 'have'} no parameter {name!r}"
    hint = nearest(name, [param.name for method in methods for param in method.params])
    if any(other.param(name) for known in scope.catalogue.values() for other in known):
        scope.without_effect(message, at, hint)
    else:
        scope.fail("KB105", message, at, hint)


def _setting(name: str, value: Any, params: Sequence[Param], scope: Scope, path: Path, at: At) -> Given | None:
    """The setting, if each scalar in it is of the parameter's type and range."""
    found: list[Filtered] = []
    for way, item in entries(value):
        place = scope.at(*path, *way) if way else at
        try:
            entry = parse_entry(item, place)
        except ValueError as error:
            scope.fail("KB106", f"{name!r} cannot be read: {error}", place)
            return None
        for scalar in scalars(entry):
            for param in params:
                if not param.accepted and not _fits(param, scalar, place, scope):
                    return None
        found.append(entry)
    return Given(tuple(found), at)


def _fits(param: Param, scalar: Any, at: At, scope: Scope) -> bool:
    try:
        param.parse(scalar)
    except ValueError as error:
        hint = nearest(str(scalar), param.choices) if param.choices else None
        scope.fail("KB106", f"{param.name!r} cannot be {scalar!r}: it {error}", at, hint)
        return False
    return True
