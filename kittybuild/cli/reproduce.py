"""`kittybuild reproduce`: build a published merge again, and compare."""

from __future__ import annotations

from typing import Any

import click

from kittybuild.builders.plugins import load
from kittybuild.cli.common import (
    BUDGET,
    JSON,
    READING,
    STORE,
    WITHIN,
    WORKERS,
    Found,
    answers,
    capability,
    cores,
    note,
    store_folder,
)
from kittybuild.cli.progress import shown
from kittybuild.errors import MOST_NAMED, UsageError, VerifyError
from kittybuild.publish.compare import IDENTICAL
from kittybuild.publish.published import open_published
from kittybuild.reproduce import Limits, Reproduction, reproduce
from kittybuild.store.store import Store


@click.command("reproduce")
@click.argument("published", metavar="FOLDER|REPO")
@click.option(
    "--source",
    "sources",
    metavar="NAME=PATH",
    multiple=True,
    help="Where a source of the recipe lies; may be repeated.",
)
@WITHIN
@click.option("--fresh", is_flag=True, help="Compute all of it, in an empty store that is deleted afterwards.")
@STORE
@BUDGET
@WORKERS
@READING
@JSON
@answers
def command(
    published: str,
    sources: tuple[str, ...],
    within: int | None,
    fresh: bool,
    store: str | None,
    memory: int,
    jobs: int | None,
    workers: str,
    numerics: str | None,
    files: tuple[str, ...],
    offline: bool,
    as_json: bool,
) -> dict[str, Any]:
    """Build the merge in FOLDER (or in a repository of the Hub) again from the recipe inside it, and compare."""
    builders = load(files)
    places = dict(_split(word) for word in sources)
    opened = open_published(published, builders, numerics, offline)
    with Store.open(store_folder(store, None)) as kept, shown() as events:
        done = reproduce(
            opened,
            kept,
            places=places,
            limits=Limits(memory, jobs or cores(), workers == "processes", fresh),
            builders=builders,
            capability=capability(),
            offline=offline,
            events=events,
        )
    apart = done.apart(within)
    if not as_json:
        _print(done)
    if apart:
        lines = [str(one) for one in apart[:MOST_NAMED]]
        lines += [f"and {len(apart) - MOST_NAMED} more"] if len(apart) > MOST_NAMED else []
        message = f"{len(apart)} of {len(done.tensors)} tensors came out otherwise:" + "".join(
            f"\n  {x}" for x in lines
        )
        raise Found([VerifyError("KB606", message, at=published, hint=done.cause)], done.to_json())
    return {"ok": True, **done.to_json()}


def _split(word: str) -> tuple[str, str]:
    name, sign, path = word.partition("=")
    if not (name and sign and path):
        raise UsageError("KB013", f"--source {word}", hint="write NAME=PATH, with the name as it stands in the recipe")
    return name, path


def _print(done: Reproduction) -> None:
    for text in done.notes:
        note(text)
    same = sum(one.how == IDENTICAL for one in done.tensors)
    close = [one for one in done.tensors if one.how != IDENTICAL and one.ulps is not None]
    click.echo(
        f"{done.published.where}: rebuilt from its {done.published.found_in}, numerics {', '.join(done.numerics)}"
    )
    click.echo(f"{same} of {len(done.tensors)} tensors are bit-identical")
    if close:
        worst = max(one.ulps or 0 for one in close)
        click.echo(f"{len(close)} are equal within {worst} units in the last place")
