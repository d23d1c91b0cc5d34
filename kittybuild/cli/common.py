"""What every command shares: options, where the store is, and how results and errors are printed."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import click

from kittybuild.cli.settings import project_settings
from kittybuild.errors import KittybuildError, Problems, UsageError
from kittybuild.recipe.parse import parse_size

INTERRUPTED = 130


class Size(click.ParamType):  # type: ignore[type-arg]
    """A size such as 500MB or 4GB, in bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Duration(click.ParamType):  # type: ignore[type-arg]
    """A time such as 30d, 12h or 45m, in seconds; `least`: none that is shorter."""

    name = "time"

    def __init__(self, least: str = "0s") -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        text = str(value)
        unit = {"d": 86_400, "h": 3600, "m": 60, "s": 1}.get(text[-1:])
        if unit is None or not text[:-1].isdecimal():
            self.fail(f"{text!r} is not a time such as 30d, 12h or 45m", param, ctx)
        seconds = float(int(text[:-1]) * unit)
        if text != self.least and seconds < self.convert(self.least, param, ctx):
            self.fail(f"it is {self.least} at least", param, ctx)
        return seconds


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def options(*given: Decorator) -> Decorator:
    """Several options (and arguments) as one decorator, in this order."""

    def declare(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(given):
            command = option(command)
        return command

    return declare


def output(meaning: str) -> Decorator:
    """Where something goes, or lies."""
    return click.option("-o", "--output", metavar="DIR", help=meaning)


RECIPE = options(click.argument("recipe", type=click.Path(dir_okay=False)), click.argument("stages", nargs=-1))
STORE = click.option(
    "--store", metavar="DIR", help="The store. Default: KITTYBUILD_STORE, kittybuild.yml, the user's cache."
)
MEMORY = click.option("--memory", type=Size(), default="4GB", show_default=True, help="The memory budget.")


def jobs(*more: str) -> Decorator:
    """How many tensors are made side by side; `more`: other words for it."""
    meaning = "Tensors made side by side. Default: the cores."
    return click.option("--jobs", *more, "jobs", type=click.IntRange(1), default=None, help=meaning)


BUDGET = options(MEMORY, jobs())
WORKERS = click.option(
    "--workers",
    type=click.Choice(["processes", "threads"]),
    default="processes",
    metavar="KIND",
    envvar="KITTYBUILD_WORKERS",
    show_default=True,
    help="What makes tensors side by side.",
)
NUMERICS = click.option(
    "--numerics", metavar="CLASS", help="The arithmetic of merges that name none. Default: the recipe's, else kitty-1."
)
METHODS = click.option(
    "--methods", "files", metavar="FILE", multiple=True, help="A Python file with merge methods; may be given again."
)
OFFLINE = click.option("--offline", is_flag=True, help="Never connect: what is not on this machine is an error.")
READING = options(NUMERICS, METHODS, OFFLINE)
"""How a recipe is read, and its sources found."""
WITHIN = click.option(
    "--within", type=click.IntRange(0), metavar="N", help="Differences of N units in the last place are no difference."
)
VERBOSE = click.option("-v", "--verbose", is_flag=True, help="Say more.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def capability() -> str | None:
    """The instruction set that torch is told to use, if it is told."""
    return os.environ.get("ATEN_CPU_CAPABILITY")


def store_folder(given: str | None, recipe: str | None) -> str:
    """Where the store is: the option, the environment, the nearest kittybuild.yml, the user's cache folder."""
    if given or (given := os.environ.get("KITTYBUILD_STORE")):
        return os.path.abspath(given)
    settings = project_settings(recipe)
    if settings.store:
        return os.path.join(settings.folder, os.path.expanduser(settings.store))
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "kittybuild", "store")


class Found(Problems):
    """What a command was asked to look for, and found: problems, with the rest of its JSON document."""

    def __init__(self, errors: Iterable[KittybuildError], document: dict[str, Any]) -> None:
        super().__init__(errors)
        self.document = document


def answers(command: Callable[..., dict[str, Any] | None]) -> Callable[..., None]:
    """A command that returns its JSON document (printed with `--json`), and whose errors are printed and exit."""

    @functools.wraps(command)
    def run(*args: Any, as_json: bool = False, **kwargs: Any) -> None:
        try:
            document = command(*args, as_json=as_json, **kwargs)
            if as_json and document is not None:
                click.echo(json.dumps(document))
        except KittybuildError as error:
            _fail(error, as_json)
        except KeyboardInterrupt:
            _fail(None, as_json)

    return run


def _fail(error: KittybuildError | None, as_json: bool) -> None:
    """Print what went wrong and exit. None: the person interrupted."""
    if error is None:
        error = UsageError("KB003", "interrupted", hint="everything finished so far is kept: run again to go on")
        error.exit_status = INTERRUPTED
    errors = error.errors if isinstance(error, Problems) else (error,)
    if as_json:
        more = error.document if isinstance(error, Found) else {}
        click.echo(json.dumps({**more, "ok": False, "errors": [one.to_json() for one in errors]}))
    for one in errors:
        click.echo(click.style("error: ", fg="red", bold=True) + str(one), err=True)
    sys.exit(error.exit_status)


def amount(nbytes: float) -> str:
    """Bytes for a person."""
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def note(text: str) -> None:
    """Tell a person what is good to know."""
    click.echo(f"note: {text}", err=True)


def cores() -> int:
    """The processor cores that we may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
