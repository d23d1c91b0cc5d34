"""`kittybuild plan`: what a build would do, from the recipe, the headers and the store."""

from __future__ import annotations

from typing import Any

import click

from kittybuild import api
from kittybuild.cli.common import JSON, STORE, Size, amount, answers, cores, store_folder
from kittybuild.planner.estimate import Estimate, estimate
from kittybuild.store.store import Store


@click.command("plan")
@click.argument("recipe", type=click.Path(dir_okay=False))
@click.argument("stages", nargs=-1)
@STORE
@click.option("--memory", type=Size(), default="4GB", show_default=True, help="The memory budget.")
@click.option("--jobs", type=click.IntRange(1), default=None, help="Tensors made side by side. Default: the cores.")
@JSON
@answers
def command(
    recipe: str, stages: tuple[str, ...], store: str | None, memory: int, jobs: int | None, as_json: bool
) -> dict[str, Any]:
    """Show what building RECIPE would compute, link, copy, read and write. Starts neither torch nor transformers."""
    prepared = api.prepare(api.read_recipe(recipe), stages)
    folder = store_folder(store, recipe)
    if Store.exists(folder):
        with Store.open(folder) as opened:
            found = estimate(api.plan(prepared, opened), memory=memory, jobs=jobs or cores())
    else:
        found = estimate(api.plan(prepared, None), memory=memory, jobs=jobs or cores())
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
    total = sum(stage.written for stage in found.stages.values())
    click.echo(f"peak memory about {amount(found.peak_memory)}, disk {amount(total)}")
