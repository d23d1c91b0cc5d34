"""`kittybuild plan`: what a build would do, from the recipe, the headers and the store."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import click

from kittybuild import api
from kittybuild.builders.plugins import load
from kittybuild.cli.caches import caches_options, offers
from kittybuild.cli.common import (
    BUDGET,
    JSON,
    READING,
    RECIPE,
    STORE,
    amount,
    answers,
    capability,
    cores,
    note,
    store_folder,
)
from kittybuild.planner.estimate import Estimate, estimate
from kittybuild.store.store import Store


@click.command("plan")
@RECIPE
@click.option("--explain", metavar="TENSOR", help="Show how this tensor is made, with where each parameter comes from.")
@STORE
@BUDGET
@READING
@caches_options
@JSON
@answers
def command(
    recipe: str,
    stages: tuple[str, ...],
    explain: str | None,
    store: str | None,
    memory: int,
    jobs: int | None,
    numerics: str | None,
    files: tuple[str, ...],
    offline: bool,
    as_json: bool,
    **asked: Any,
) -> dict[str, Any]:
    """Show what building RECIPE would compute, fetch, link, copy, read and write. Starts no torch."""
    builders = load(files)
    caches = offers(recipe, note, **asked)
    parsed = api.read_recipe(recipe, builders, numerics, offline)
    prepared = api.prepare(parsed, stages, None, builders, capability(), offline, caches=caches is not None)
    folder = store_folder(store, recipe)
    needed = Store.exists(folder) or prepared.absent  # headers of sources that are not here must lie somewhere
    with Store.open(folder) if needed else nullcontext() as opened:
        if explain is not None:
            told = api.explain(prepared, opened, explain, builders, caches)
            if not as_json:
                click.echo("\n".join(line for one in told for line in one.lines()))
            return {"ok": True, "explain": [one.to_json() for one in told]}
        if opened:
            opened.expect_unfinished()
        found = estimate(api.plan(prepared, opened, builders, caches), builders, memory=memory, jobs=jobs or cores())
    if not as_json:
        _print(found)
    return {"ok": True, **found.to_json(), "folders": dict(prepared.folders)}


def _print(found: Estimate) -> None:
    for text in found.notes:
        note(text)
    for name, stage in found.stages.items():
        click.echo(f"{name} ({stage.kind}): {stage.tensors} tensors")
        fetch = f"fetch {stage.fetched} ({amount(stage.fetched_bytes)}), " if stage.fetched else ""
        click.echo(f"  compute {stage.computed}, {fetch}copy {stage.copied}, there already {stage.there}")
        if stage.shards:
            click.echo(f"  shards: {stage.shards - stage.linked} to write, {stage.linked} to link")
        click.echo(f"  read {amount(stage.read)}, write {amount(stage.written)}")
        if stage.files:
            click.echo(f"  files with it: {', '.join(stage.files)}")
    if found.download:
        click.echo(f"download {amount(found.download)}")
    total = sum(stage.written for stage in found.stages.values())
    click.echo(f"peak memory about {amount(found.peak_memory)}, disk {amount(total)}")
