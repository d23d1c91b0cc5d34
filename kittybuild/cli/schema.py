"""`kittybuild schema`: the shape of recipes, for editors."""

from __future__ import annotations

import json
from typing import Any

import click

from kittybuild.builders.plugins import load
from kittybuild.cli.common import JSON, METHODS, answers
from kittybuild.recipe.json_schema import json_schema


@click.command("schema")
@METHODS
@JSON
@answers
def command(files: tuple[str, ...], as_json: bool) -> dict[str, Any]:
    """Print the JSON schema of recipes, with merge methods and parameters: editors complete and check by it."""
    found = json_schema(load(files).catalogue())
    if not as_json:
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
    return {"ok": True, "schema": found}
