"""The commands: the only part that prints, exits or reads the environment. A command is imported when it is used."""

from __future__ import annotations

import gc
import importlib
import json
import sys

import click

from kittybuild import __version__

_SELDOM = (
    100_000,
    10,
    10,
)  # what torch makes at its start is kept: looking through it again and again costs half a second
DEPTH = 5_000
"""Python's own 1,000 end at chains of some 200 stages: each is asked for by the one after it."""
_COMMANDS = (
    *("build", "plan", "why", "lock", "verify", "reproduce", "diff", "publish", "methods", "schema", "store", "cache"),
    *("merge", "moe", "multi", "pytorch", "layershuffle", "tokensurgeon", "extract-lora", "merge-lora", "legacy"),
)


class _Lazy(click.Group):
    """Commands by name; a module is imported only for the command that is called (or listed)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"kittybuild.cli.{cmd_name.replace('-', '_')}")
        return module.command  # type: ignore[no-any-return]

    def invoke(self, ctx: click.Context) -> object:
        as_json = "--json" in ctx.args
        try:
            return super().invoke(ctx)
        except click.UsageError as error:  # click prints it for a person
            if as_json:
                hint = f"see `{(error.ctx or ctx).command_path} --help`"
                found = {"code": "KB000", "message": error.format_message(), "at": None, "hint": hint}
                click.echo(json.dumps({"ok": False, "errors": [found]}))
            raise


@click.group(cls=_Lazy)
@click.version_option(__version__, prog_name="kittybuild")
def main() -> None:
    """Build merged checkpoints from recipes: only what changed is computed, and anyone can prove the result."""
    gc.set_threshold(*_SELDOM)
    sys.setrecursionlimit(DEPTH)
