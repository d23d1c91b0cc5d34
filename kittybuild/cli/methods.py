"""`kittybuild methods`: the merge methods that there are, and the reference of one."""

from __future__ import annotations

from typing import Any

import click

from kittybuild.builders.plugins import load
from kittybuild.cli.common import JSON, METHODS, answers
from kittybuild.cli.reference import classes_of, names, page, to_json
from kittybuild.errors import UsageError, nearest


@click.command("methods")
@click.argument("name", required=False)
@METHODS
@JSON
@answers
def command(name: str | None, files: tuple[str, ...], as_json: bool) -> dict[str, Any]:
    """List the merge methods with the numerics that have each, or show what the method NAME does and takes."""
    builders = load(files)
    known = names(builders)
    if name is not None and name not in known:
        raise UsageError("KB009", f"there is no merge method {name!r}", hint=nearest(name, known))
    if not as_json and name is not None:
        click.echo(page(name, builders), nl=False)
    elif not as_json:
        width = max(map(len, known))
        for each in known:
            click.echo(f"{each:{width}}  {', '.join(classes_of(each, builders))}")
    return {"ok": True, "methods": [to_json(each, builders) for each in ([name] if name else known)]}
