"""Which remote caches a command asks, and whom it trusts: options, then the project's settings, then the person's."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from kittybuild.cli.common import options
from kittybuild.cli.settings import Settings, personal_settings, project_settings
from kittybuild.planner.offers import AUTO, MODES, NEVER, Offers

if TYPE_CHECKING:
    from kittybuild.store.remote.bucket import Bucket

TRUSTED = click.option(
    "--trust", "trusted", metavar="KEY", multiple=True, help="Believe this key (name-1:base64); may be given again."
)
QUORUM = click.option(
    "--quorum", type=click.IntRange(1), default=1, metavar="N", help="So many trusted keys must agree."
)
caches_options = options(
    click.option(
        "--substituter",
        "substituters",
        metavar="URL",
        multiple=True,
        help="A cache to ask before computing; may be given again.",
    ),
    TRUSTED,
    click.option(
        "--fetch",
        type=click.Choice(MODES),
        metavar="MODE",
        default=AUTO,
        show_default=True,
        help="What to take from caches: what is faster to fetch than to compute, all, or nothing.",
    ),
    QUORUM,
    click.option(
        "--audit",
        type=click.FloatRange(0, 100),
        default=0.0,
        metavar="PERCENT",
        help="Compute this share of what could be fetched, and stop if it is not what was signed.",
    ),
)
"""What `offers` takes."""


def offers(
    recipe: str,
    note: Callable[[str], None],
    *,
    substituters: tuple[str, ...],
    trusted: tuple[str, ...],
    fetch: str,
    quorum: int,
    audit: float,
) -> Offers | None:
    """What the caches offer; None where none is to be asked. Raises RemoteError KB801 or KB804."""
    ours = (project_settings(recipe), personal_settings())
    urls = dict.fromkeys((*substituters, *(_place(url, one) for one in ours for url in one.substituters)))
    if not urls or fetch == NEVER:
        return None
    from kittybuild.store.remote.keys import PublicKey
    from kittybuild.store.remote.substituters import Substituters, Trust

    texts = dict.fromkeys((*trusted, *(text for one in ours for text in one.trusted)))
    keys = tuple(PublicKey.parse(text) for text in texts)
    if len(keys) < quorum:
        note(f"{len(keys)} keys are trusted and {quorum} must agree: nothing is taken from caches (see `trusted:`)")
        return None
    buckets = [bucket(url) for url in urls]
    return Offers(Substituters(buckets, Trust(keys, quorum), note), fetch, audit / 100, os.urandom(16))


def bucket(url: str) -> Bucket:
    """The bucket at a URL. Raises RemoteError KB801."""
    from kittybuild.store.remote.objects import connect

    return connect(url)


def _place(url: str, settings: Settings) -> str:
    """A folder in settings counts from where they lie."""
    return url if "://" in url else os.path.join(settings.folder, os.path.expanduser(url))
