"""From text to Recipe: our own format and bare mergekit YAML. All problems of a text are reported at once."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kittybuild.errors import KittybuildError, RecipeError, nearest, raise_all
from kittybuild.model.derivation import KITTY_1
from kittybuild.model.lock import REPOSITORY
from kittybuild.model.method import Catalogue
from kittybuild.model.recipe import Output, Recipe, SourceDecl, Stage, names_in
from kittybuild.recipe.merge import Problems
from kittybuild.recipe.schema import OutputText, RecipeText, SourceText, check
from kittybuild.recipe.stage import Reading, read_dtypes, read_numerics, read_stage
from kittybuild.recipe.yamltext import Document, read_documents

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(i?)[bB]?")


def parse_size(text: str | int) -> int:
    """Bytes from `500MB`, `4GiB`, `1B` (a count of bytes) or a number; raises ValueError."""
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a size such as 500MB or 4GB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit.lower() or " "))


def parse_recipe(text: str, file: str, catalogue: Catalogue, numerics: str | None = None) -> Recipe:
    """The recipe that `text` says; `file` is its name in messages. Raises RecipeError, or Problems with all of them.

    `numerics`: the class of the stages that name none, in place of the recipe's own.
    """
    recipe, problems = parse_partly(text, file, catalogue, numerics)
    raise_all(problems)
    assert recipe is not None  # without problems there is one
    return recipe


def parse_partly(
    text: str, file: str, catalogue: Catalogue, numerics: str | None = None
) -> tuple[Recipe | None, Problems]:
    """The recipe of the stages that are sound, if any can be read, and the problems of the others, in the text's order.

    A stage is sound if nothing is wrong with it, nor with a stage or source that it names. Raises RecipeError for a
    text that is no recipe at all.
    """
    documents = read_documents(text, file)
    if not documents:
        raise RecipeError("KB103", "the recipe is empty", at=file, hint="start with `kittybuild: 1` or `merge_method:`")
    for document in documents:
        if not isinstance(document.value, dict):
            hint = "start with `kittybuild: 1` or `merge_method:`"
            raise RecipeError("KB103", "a recipe is a mapping of keys", at=str(document.at(())), hint=hint)
    own = any("kittybuild" in document.value for document in documents)
    if own and len(documents) > 1:
        hint = "put all stages under one `stages:`"
        raise RecipeError("KB103", "a recipe of ours is one YAML document", at=str(documents[1].at(())), hint=hint)
    problems: Problems = []
    readings = [Reading(document, catalogue, numerics or KITTY_1, problems) for document in documents]
    recipe = _own(readings[0], text, given=numerics) if own else _mergekit(readings, text)
    if recipe:
        loops = _check_references(recipe, problems)
        broken = {name for reading in readings for name in reading.broken} | loops
        recipe = replace(recipe, notes=(*recipe.notes, *_unused(recipe)), numerics=numerics)
        recipe = recipe.without(broken) if broken else recipe
    return recipe, sorted(problems, key=_place)


def _place(error: KittybuildError) -> tuple[int, ...]:
    """Problems are told in the order of the text."""
    return tuple(int(number) for number in (error.at or "").split(":")[-2:] if number.isdigit())


def _own(reading: Reading, text: str, given: str | None) -> Recipe | None:
    document, problems = reading.document, reading.problems
    form, _ = check(RecipeText, document.value, document, problems, deep=2)
    if form is None:  # the stages are looked at all the same, so that their problems come along
        stages = document.value.get("stages")
        for name, stage in stages.items() if isinstance(stages, dict) else ():
            if isinstance(stage, dict):
                read_stage(name, stage, reading)
        return None
    defaults = {"dtype": form.defaults.dtype, "out_dtype": form.defaults.out_dtype}
    sound = read_dtypes(defaults, document, ("defaults",), problems)
    reading = replace(
        reading,
        defaults={key: word if sound[key] else None for key, word in defaults.items()},
        numerics=given or read_numerics(form.numerics, reading, ("numerics",)),
        allow_nan=form.allow_nan,
        strict=form.dialect == "kittybuild",
    )
    sources = {name: _source(name, source, document, problems) for name, source in form.sources.items()}
    stages = {name: _stage(name, stage, reading) for name, stage in form.stages.items()}
    reading.broken.update(name for name, source in sources.items() if source is None)
    outputs = {name: _output(name, output, document, problems) for name, output in form.outputs.items()}
    _check_folders(outputs, problems)
    for name in sorted(set(sources) & set(stages)):
        at = str(document.key_at(("stages", name)))
        problems.append(RecipeError("KB110", f"{name!r} is a source and a stage", at=at, hint="rename one of them"))
    return Recipe(
        name=form.name or _stem(document.file),
        sources={name: source for name, source in sources.items() if source},
        stages={name: stage for name, stage in stages.items() if stage},
        outputs={name: output for name, output in outputs.items() if output},
        text=text,
        file=document.file,
        seed=form.defaults.seed,
        notes=tuple(reading.notes),
    )


def _mergekit(readings: Sequence[Reading], text: str) -> Recipe:
    stages: dict[str, Stage] = {}
    for reading in readings:
        document, problems = reading.document, reading.problems
        name = document.value.get("name")
        name = name if isinstance(name, str) else "moe" if "experts" in document.value else "merge"
        if "+" in name or "@" in name:
            at, hint = str(document.at(("name",))), "a name holds no '+' and no '@'"
            problems.append(RecipeError("KB103", f"{name!r} cannot be a name", at=at, hint=hint))
        elif name in stages:
            at = str(document.key_at(("name",)))
            hint = "give each document a `name`; at most one goes without"
            problems.append(RecipeError("KB110", f"two documents are called {name!r}", at=at, hint=hint))
        elif stage := _stage(name, document.value, reading, path=()):
            stages[name] = stage
    file = readings[0].document.file
    notes = tuple(note for reading in readings for note in reading.notes)
    return Recipe(_stem(file), {}, stages, {}, text, file, dialect="mergekit", notes=notes)


def _stage(name: str, value: dict[str, Any], reading: Reading, **where: Any) -> Stage | None:
    """The stage; what is wrong with it is noted, and that it is."""
    before = len(reading.problems)
    stage = read_stage(name, value, reading, **where)
    if len(reading.problems) > before:
        reading.broken.add(name)
    return stage


def _stem(file: str) -> str:
    return os.path.splitext(os.path.basename(file))[0]


def _source(name: str, form: SourceText, document: Document, problems: Problems) -> SourceDecl | None:
    at = document.at(("sources", name))
    given = {key for key in ("path", "package", "file", "hub", "revision") if getattr(form, key) is not None}
    if given == {"path"}:
        return SourceDecl(form.path or "", at=at)
    if given == {"package", "file"}:
        return SourceDecl(form.file or "", form.package, at)
    message = f"source {name!r} is none of the three kinds"
    hint = "write {path: FOLDER}, {package: NAME, file: FILE} or {hub: ORGANISATION/NAME, revision: REVISION}"
    if form.hub is not None and given <= {"hub", "revision", "file"}:
        if REPOSITORY.fullmatch(form.hub):
            return SourceDecl(form.file or "", at=at, hub=form.hub, revision=form.revision)
        message = f"{form.hub!r} is no repository of the Hub"
        hint = "write {hub: ORGANISATION/NAME, revision: BRANCH, TAG OR COMMIT}"
    problems.append(RecipeError("KB103", message, at=str(at), hint=hint))
    return None


def _check_folders(outputs: Mapping[str, Output | None], problems: Problems) -> None:
    """Two outputs in one folder would take each other's place."""
    folders: dict[str, str] = {}
    for name, output in outputs.items():
        other = folders.setdefault(os.path.normpath(output.folder), name) if output else name
        if output and other != name:
            message, hint = f"the outputs {other!r} and {name!r} go into one folder", "give each its own"
            problems.append(RecipeError("KB114", message, at=str(output.at), hint=hint))


def _output(name: str, form: OutputText, document: Document, problems: Problems) -> Output | None:
    at = document.key_at(("outputs", name))
    stages = document.value["stages"]
    if name not in stages:
        message = f"the output {name!r} is not a stage"
        problems.append(RecipeError("KB107", message, at=str(at), hint=nearest(name, stages)))
        return None
    try:
        size = parse_size(form.shard_size)
        if size < 1:
            raise ValueError("a shard holds at least one byte")
    except ValueError as error:
        problems.append(RecipeError("KB103", str(error), at=str(document.at(("outputs", name, "shard_size")))))
        return None
    return Output(name, form.folder, size, at)


def _unused(recipe: Recipe) -> list[str]:
    """Sources that take no part in any stage."""
    named = {name for stage in recipe.stages.values() for name in names_in(stage)}
    return [
        f"{decl.at}: no stage names the source {name!r}" for name, decl in recipe.sources.items() if name not in named
    ]


def _check_references(recipe: Recipe, problems: list[KittybuildError]) -> set[str]:
    """No stage may need itself, and none has revisions. (Whether a path exists is asked when sources are opened.)

    The stages of which this is not true.
    """
    done: set[str] = set()
    broken: set[str] = set()
    for stage in recipe.stages.values():
        for ref in stage.references():
            if ref.model in recipe.stages and ref.revision is not None:
                hint = f"write {ref.model!r} alone"
                message = f"{ref.base_text} gives a revision, but {ref.model!r} is a stage of this recipe"
                problems.append(RecipeError("KB111", message, at=str(ref.at), hint=hint))
                broken.add(stage.name)

    def visit(name: str, chain: tuple[str, ...]) -> None:
        stage = recipe.stages[name]
        if name in chain:
            loop = " -> ".join((*chain[chain.index(name) :], name))
            hint = "a stage's name goes before a path: for a folder of that name write ./NAME"
            message = f"stages need each other in a circle: {loop}"
            problems.append(RecipeError("KB112", message, at=str(stage.at), hint=hint))
            done.update(chain)
            broken.update(chain)
        elif name not in done:
            for ref in [part for named in stage.references() for part in named.parts()]:
                if ref.model in recipe.stages and ref.model not in recipe.sources:
                    visit(ref.model, (*chain, name))
            done.add(name)

    for name in recipe.stages:
        visit(name, ())
    return broken
