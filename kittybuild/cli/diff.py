"""`kittybuild diff`: two checkpoints held against each other."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from kittybuild import api
from kittybuild.builders.plugins import load
from kittybuild.cli.common import (
    BUDGET,
    JSON,
    READING,
    STORE,
    VERBOSE,
    WITHIN,
    Found,
    answers,
    capability,
    cores,
    note,
)
from kittybuild.cli.store_open import existing
from kittybuild.errors import UsageError, VerifyError
from kittybuild.model.made import read_derivations
from kittybuild.planner.targets import targets
from kittybuild.publish.compare import IDENTICAL
from kittybuild.publish.diff import Diff, Pattern, Side, Told, diff, kept_side, open_side, patterns

if TYPE_CHECKING:
    from kittybuild.builders.base import Builders

_KEYS = 10


@click.command("diff")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@WITHIN
@STORE
@BUDGET
@READING
@JSON
@VERBOSE
@answers
def command(
    a: str,
    b: str,
    within: int | None,
    store: str | None,
    memory: int,
    jobs: int | None,
    numerics: str | None,
    files: tuple[str, ...],
    offline: bool,
    as_json: bool,
    verbose: bool,
) -> dict[str, Any]:
    """Compare A and B, each a folder, a file of weights or RECIPE[:STAGE]: tensors, config, tokenizer, other files."""
    with ExitStack() as held:
        reading = _Reading(load(files), numerics, offline, store)
        one, two = (reading.side(word, held) for word in (a, b))
        found = diff(one, two, memory=memory, jobs=jobs or cores())
    apart = found.apart(within)
    document = {"a": a, "b": b, "equal": not (apart or found.files), **found.to_json()}
    if not as_json:
        _print(found, verbose)
    if document["equal"]:
        return {"ok": True, **document}
    what = [f"{len(apart)} of {len(found.tensors)} tensors"] if apart else []
    what += [f"{len(found.files)} files"] if found.files else []
    raise Found([VerifyError("KB608", f"they differ in {' and '.join(what)}", at=b, hint=found.cause)], document)


@dataclass(frozen=True)
class _Reading:
    """How the words A and B are read."""

    builders: Builders
    numerics: str | None
    offline: bool
    store: str | None

    def side(self, word: str, held: ExitStack) -> Side:
        """A checkpoint, or what the store keeps of a stage; the store stays open, so that nothing of it is deleted."""
        recipe, _, stage = (word, "", "") if os.path.exists(word) else word.rpartition(":")
        if not os.path.isfile(recipe) or not recipe.endswith((".yml", ".yaml")):
            return open_side(word)
        parsed = api.read_recipe(recipe, self.builders, self.numerics)
        if not stage and len(wanted := targets(parsed, ())) != 1:
            hint = f"name it: {recipe}:{wanted[0]}"
            raise UsageError("KB001", f"which of {', '.join(wanted)}?", at=recipe, hint=hint)
        stage = stage or wanted[0]
        store = held.enter_context(existing(self.store, recipe))
        for stages in ((), (stage,)):  # built with all others, or by its name
            prepared = api.prepare(parsed, stages, None, self.builders, capability(), self.offline)
            ready = api.built(prepared, store) if stage in prepared.wanted else None
            if ready:
                record = json.loads(ready[1])
                said = Told(stage, parsed.text, record["lock"], read_derivations(record["derivations"]))
                return kept_side(word, ready[0][stage], said, store)
        hint = f"`kittybuild build {recipe} {stage}` makes it"
        raise UsageError("KB020", f"{stage} is not built, as the recipe is now", at=recipe, hint=hint)


def _print(found: Diff, verbose: bool) -> None:
    for text in found.notes:
        note(text)
    same = sum(one.how == IDENTICAL for one in found.tensors)
    click.echo(f"{same} of {len(found.tensors)} tensors are bit-identical")
    for pattern in patterns(found.tensors):
        if pattern.apart:
            click.echo(f"  {_line(pattern)}")
            for one in pattern.apart if verbose else ():
                click.echo(f"    {one}")
    for file in found.files:
        click.echo(f"{file.name}: {file.how}")
        shown = file.keys if verbose else file.keys[:_KEYS]
        for key, there, here in shown:
            click.echo(f"  {key}: {there if there is not None else 'none'} -> {here if here is not None else 'none'}")
        if len(shown) < len(file.keys):
            click.echo(f"  and {len(file.keys) - len(shown)} more")
    if tokens := found.tokens:
        click.echo(f"tokens: {len(tokens.lost)} only in a, {len(tokens.more)} only in b, {len(tokens.moved)} moved")
    if found.template:
        click.echo("the chat templates differ")
    for change in found.recipe:
        click.echo(f"recipe: {change.path}: {change.was or 'none'} -> {change.now or 'none'}")


def _line(pattern: Pattern) -> str:
    form = pattern.to_json()
    told = [f"{form['apart']} of {form['tensors']} differ" if form["tensors"] > 1 else "differs"]
    numbers = (("max abs", "max_abs"), ("relative", "relative"), ("cosine", "cosine"))
    told += [f"{word} {form[name]:.6g}" for word, name in numbers if form[name] is not None]
    told += [f"{form['ulps']} ulp"] if form["ulps"] is not None else []
    words = [how for how in form["how"] if how.startswith(("only", "other"))]
    return f"{pattern.name}: {', '.join((*words, *told))}"
