"""`kittybuild lock`: pin the sources of a recipe to what they are now."""

from __future__ import annotations

from typing import Any

import click

from kittybuild import api
from kittybuild.builders.plugins import load
from kittybuild.cli.common import JSON, METHODS, OFFLINE, answers


@click.command("lock")
@click.argument("recipe", type=click.Path(dir_okay=False))
@click.option("--update", metavar="NAME", multiple=True, help="Pin this source anew; may be given again.")
@METHODS
@OFFLINE
@JSON
@answers
def command(
    recipe: str, update: tuple[str, ...], files: tuple[str, ...], offline: bool, as_json: bool
) -> dict[str, Any]:
    """Pin each source of RECIPE in the lock beside it: commits on the Hub, and every file's size and SHA-256."""
    builders = load(files)
    report = api.lock(api.read_recipe(recipe, builders, offline=offline), update, offline, builders)
    if not as_json:
        for name, lines in report.changes.items():
            click.echo(f"{name}:")
            for line in lines:
                click.echo(f"  {line}")
        same = len(report.pins) - sum(name in report.pins for name in report.changes)
        click.echo(f"{report.path}: {len(report.pins)} sources" + (f", {same} as they were" if same else ""))
    changes = {name: list(lines) for name, lines in report.changes.items()}
    return {"ok": True, "lock": report.path, "sources": list(report.pins), "changes": changes}
