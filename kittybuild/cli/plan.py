"""`kittybuild plan`: what a build would do, from the recipe, the headers and the store."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import click

from kittybuild import api
from kittybuild.builders.plugins import load
from kittybuild.cli.common import (
    JSON,
    METHODS,
    NUMERICS,
    OFFLINE,
    STORE,
    Size,
    amount,
    answers,
    capability,
    cores,
    store_folder,
)
from kittybuild.planner.estimate import Estimate, estimate
from kittybuild.store.store import Store


@click.command("plan")
@click.argument("recipe", type=click.Path(dir_okay=False))
@click.argument("stages", nargs=-1)
@click.option("--explain", metavar="TENSOR", help="Show how this tensor is made, with where each parameter comes from.")
@STORE
@click.option("--memory", type=Size(), default="4GB", show_default=True, help="The memory budget.")
@click.option("--jobs", type=click.IntRange(1), default=None, help="Tensors made side by side. Default: the cores.")
@NUMERICS
@METHODS
@OFFLINE
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
) -> dict[str, Any]:
    """Show what building RECIPE would compute, link, copy, read and write. Starts neither torch nor transformers."""
    builders = load(files)
    parsed = api.read_recipe(recipe, builders, numerics, offline)
    prepared = api.prepare(parsed, stages, None, builders, capability(), offline)
    folder = store_folder(store, recipe)
    with Store.open(folder) if Store.exists(folder) else nullcontext() as opened:
        if explain is not None:
            told = api.explain(prepared, opened, explain, builders)
            if not as_json:
                click.echo("\n".join(line for one in told for line in one.lines()))
            return {"ok": True, "explain": [one.to_json() for one in told]}
        found = estimate(api.plan(prepared, opened, builders), builders, memory=memory, jobs=jobs or cores())
    if not as_json:
        _print(found)
    return {"ok": True, **found.to_json(), "folders": dict(prepared.folders)}


def _print(found: Estimate) -> None:
    for note in found.notes:
        click.echo(f"note: {note}", err=True)
    for name, stage in found.stages.items():
        click.echo(f"{name} ({stage.kind}): {stage.tensors} tensors")
        click.echo(f"  compute {stage.computed}, copy {stage.copied}, there already {stage.there}")
        if stage.shards:
            click.echo(f"  shards: {stage.shards - stage.linked} to write, {stage.linked} to link")
        click.echo(f"  read {amount(stage.read)}, write {amount(stage.written)}")
        if stage.files:
            click.echo(f"  files with it: {', '.join(stage.files)}")
    if found.download:
        click.echo(f"download {amount(found.download)}")
    total = sum(stage.written for stage in found.stages.values())
    click.echo(f"peak memory about {amount(found.peak_memory)}, disk {amount(total)}")
