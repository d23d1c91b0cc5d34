"""`kittybuild why`: what changed since the last build, and what it makes a build compute again."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import click

from kittybuild import api
from kittybuild.builders.plugins import load
from kittybuild.cli.caches import caches_options, offers
from kittybuild.cli.common import (
    JSON,
    READING,
    RECIPE,
    STORE,
    VERBOSE,
    answers,
    capability,
    note,
    output,
    store_folder,
)
from kittybuild.planner.why import CACHED, COMPUTED, FETCHED, Group, Why
from kittybuild.store.store import Store


@click.command("why")
@RECIPE
@click.option("--tensor", metavar="NAME", help="Show what made this tensor change, back to the first causes.")
@output("The output folder (instead of the recipe's).")
@STORE
@READING
@caches_options
@JSON
@VERBOSE
@answers
def command(
    recipe: str,
    stages: tuple[str, ...],
    tensor: str | None,
    output: str | None,
    store: str | None,
    numerics: str | None,
    files: tuple[str, ...],
    offline: bool,
    as_json: bool,
    verbose: bool,
    **asked: Any,
) -> dict[str, Any]:
    """Show what changed since the last build of RECIPE's outputs (or of the STAGEs), and what a build would compute."""
    builders = load(files)
    parsed = api.read_recipe(recipe, builders, numerics, offline)
    caches = offers(recipe, note, **asked)
    prepared = api.prepare(parsed, stages, output, builders, capability(), offline, caches=caches is not None)
    folder = store_folder(store, recipe)
    needed = Store.exists(folder) or prepared.absent  # headers of sources that are not here must lie somewhere
    with Store.open(folder) if needed else nullcontext() as opened:
        if opened:
            opened.expect_unfinished()
        found = api.why(prepared, opened, builders, offers=caches, tensor=tensor, capability=capability())
    if tensor is not None:
        chains = {one.output: [link.to_json() for link in one.chain] for one in found}
        if not as_json:
            click.echo("\n".join(line for one in found for link in one.chain for line in link.lines()))
        return {"ok": True, "tensor": tensor, "outputs": chains}
    if not as_json:
        for one in found:
            _print(one, verbose)
    changed = any(one.changed for one in found)
    return {"ok": True, "changed": changed, "outputs": {one.output: one.to_json() for one in found}}


def _print(found: Why, verbose: bool) -> None:
    where = f"{found.output} ({found.folder})" if found.folder else found.output
    if not found.changed:
        click.echo(f"{where}: nothing changed since the last build")
        return
    click.echo(f"{where}: {_counts(found.done[COMPUTED], found.done[FETCHED], found.done[CACHED])}")
    if found.last is None:
        click.echo("  there was no build of it that is still known")
    for group in found.groups:
        click.echo(f"  {group}")
        click.echo(f"    {_of_group(group)}")
        if verbose:
            for (stage, name), done in group.tensors.items():
                click.echo(f"      {stage}: {name}: {done}")
    if found.gone:
        click.echo(f"  gone: {', '.join(found.gone) if verbose else f'{len(found.gone)} tensors'}")
    if found.files:
        click.echo(f"  other files: {', '.join(found.files)}")
    write, link = found.shards
    if write or link:
        click.echo(f"  shards: {write} to write, {link} to link")


def _of_group(group: Group) -> str:
    return _counts(*(group.count(what) for what in (COMPUTED, FETCHED, CACHED)))


def _counts(computed: int, fetched: int, cached: int) -> str:
    total = computed + fetched + cached
    come = f"{fetched} fetched, " if fetched else ""
    return f"{total} {'tensor' if total == 1 else 'tensors'}: {computed} to compute, {come}{cached} from the store"
