"""`kittybuild diff`: two checkpoints held against each other."""

from __future__ import annotations

from typing import Any

import click

from kittybuild.cli.common import BUDGET, JSON, VERBOSE, WITHIN, Found, answers, cores, note
from kittybuild.errors import VerifyError
from kittybuild.publish.compare import IDENTICAL
from kittybuild.publish.diff import Diff, Pattern, diff, open_side, patterns

_KEYS = 10


@click.command("diff")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@WITHIN
@BUDGET
@JSON
@VERBOSE
@answers
def command(
    a: str, b: str, within: int | None, memory: int, jobs: int | None, as_json: bool, verbose: bool
) -> dict[str, Any]:
    """Compare the checkpoints A and B (folders or files of weights): tensors, config, tokenizer, other files."""
    found = diff(open_side(a), open_side(b), memory=memory, jobs=jobs or cores())
    apart = found.apart(within)
    document = {"a": a, "b": b, "equal": not (apart or found.files), **found.to_json()}
    if not as_json:
        _print(found, verbose)
    if document["equal"]:
        return {"ok": True, **document}
    what = [f"{len(apart)} of {len(found.tensors)} tensors"] if apart else []
    what += [f"{len(found.files)} files"] if found.files else []
    raise Found([VerifyError("KB608", f"they differ in {' and '.join(what)}", at=b, hint=found.cause)], document)


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
