"""`kittybuild store`: look after the store."""

from __future__ import annotations

from typing import Any

import click

from kittybuild.cli.common import JSON, STORE, amount, answers, store_folder
from kittybuild.errors import StoreError
from kittybuild.store.store import Store


@click.group("store")
def command() -> None:
    """Look after the store."""


@command.command("info")
@STORE
@JSON
@answers
def info(store: str | None, as_json: bool) -> dict[str, Any]:
    """Show where the store is, what it holds and for whom."""
    folder = store_folder(store, None)
    if not Store.exists(folder):
        raise StoreError("KB711", "there is no store here", at=folder, hint="a build makes it; or name it with --store")
    with Store.open(folder) as opened:
        found = opened.info().to_json()
        kept = [{"output": root.name, "folder": root.folder, "manifest": root.manifest.hex} for root in opened.roots()]
    if not as_json:
        for key, value in found.items():
            shown = amount(value) if isinstance(value, int) and key.endswith("bytes") else value
            click.echo(f"{key.replace('_', ' ')}: {shown}")
        for root in kept:
            click.echo(f"kept for {root['output']} in {root['folder']}")
    return {"ok": True, "store": folder, **found, "roots": kept}
