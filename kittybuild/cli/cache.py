"""`kittybuild cache`: share what was built with other machines."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from kittybuild import api
from kittybuild.builders.plugins import load
from kittybuild.cli.cache_gc import gc, roots
from kittybuild.cli.caches import QUORUM, TRUSTED, bucket, offers
from kittybuild.cli.common import JSON, READING, RECIPE, STORE, amount, answers, capability, store_folder
from kittybuild.cli.progress import shown
from kittybuild.cli.settings import config_folder
from kittybuild.errors import RemoteError
from kittybuild.planner.offers import ALWAYS
from kittybuild.store.store import Store

if TYPE_CHECKING:
    from kittybuild.store.remote.keys import SigningKey


@click.group("cache")
def command() -> None:
    """Share what was built with other machines, through a folder, S3, GCS, Azure or WebDAV."""


@command.command("keygen")
@click.argument("name")
@click.option("-o", "--output", metavar="FILE", help="Where the secret key goes. Default: the user's settings.")
@JSON
@answers
def keygen(name: str, output: str | None, as_json: bool) -> dict[str, Any]:
    """Make a key that signs what NAME pushes. Prints the public part, which others trust."""
    from kittybuild.store.remote.keys import SigningKey

    key = SigningKey.new(name)
    path = os.path.abspath(output or os.path.join(_keys(), f"{key.name}.key"))
    key.write(path)
    if not as_json:
        click.echo(f"secret key, which stays here: {path}")
        click.echo(f"public key, for `trusted:` of others: {key.public}")
    return {"ok": True, "file": path, "public": str(key.public)}


@command.command("push")
@click.argument("what", type=click.Path())
@click.argument("stages", nargs=-1)
@click.option("--to", "to", metavar="URL", required=True, help="The cache.")
@click.option("--key", "key_file", metavar="FILE", envvar="KITTYBUILD_KEY", help="The secret key that signs.")
@click.option("--as", "name", metavar="NAME", default="", help="The name that the cache keeps it under.")
@click.option("--zstd", is_flag=True, help="Compress tensors on the way.")
@STORE
@READING
@JSON
@answers
def push(
    what: str,
    stages: tuple[str, ...],
    to: str,
    key_file: str | None,
    name: str,
    zstd: bool,
    store: str | None,
    numerics: str | None,
    files: tuple[str, ...],
    offline: bool,
    as_json: bool,
) -> dict[str, Any]:
    """Push what was built of a recipe, or an output folder: tensors of the outputs, signed claims of all stages."""
    from kittybuild.publish.push import Pushing, open_to_push, push_folder

    key = _signing_key(key_file)
    with Store.open(store_folder(store, what)) as opened, shown() as events:
        pushing = Pushing(open_to_push(bucket(to)), key, events, zstd, name)
        if os.path.isdir(what):
            done = push_folder(pushing, opened, what)
        else:
            builders = load(files)
            parsed = api.read_recipe(what, builders, numerics, offline)
            prepared = api.prepare(parsed, stages, None, builders, capability(), offline)
            done = api.push(prepared, opened, pushing, builders)
    if not as_json:
        click.echo(f"{done.blobs} tensors and files sent ({amount(done.bytes)}), {done.there} were there")
        click.echo(f"{done.claims} claims and {done.sources} source files signed as {key.name}")
    form = {"blobs": done.blobs, "there": done.there, "bytes": done.bytes, "claims": done.claims}
    return {"ok": True, **form, "sources": done.sources, "signer": key.name}


@command.command("pull")
@RECIPE
@click.option("--from", "urls", metavar="URL", multiple=True, help="The cache; may be given again.")
@TRUSTED
@QUORUM
@STORE
@READING
@JSON
@answers
def pull(
    recipe: str,
    stages: tuple[str, ...],
    urls: tuple[str, ...],
    trusted: tuple[str, ...],
    quorum: int,
    store: str | None,
    numerics: str | None,
    files: tuple[str, ...],
    offline: bool,
    as_json: bool,
) -> dict[str, Any]:
    """Bring what caches have of a recipe's outputs into the store. Computes nothing and writes no folder."""
    builders = load(files)
    parsed = api.read_recipe(recipe, builders, numerics, offline)
    with shown() as events, Store.open(store_folder(store, recipe)) as opened:
        found = offers(recipe, events.note, substituters=urls, trusted=trusted, fetch=ALWAYS, quorum=quorum, audit=0.0)
        if found is None:
            raise RemoteError("KB808", "there is no cache to pull from", at=recipe, hint="name one with --from URL")
        prepared = api.prepare(parsed, stages, None, builders, capability(), offline, caches=True, unread=True)
        done = api.pull(prepared, opened, found, events, builders)
    if not as_json:
        click.echo(f"{done.fetched} tensors fetched ({amount(done.bytes)}), {done.lacking} are in no cache")
    return {"ok": True, "fetched": done.fetched, "bytes": done.bytes, "lacking": done.lacking}


@command.command("info")
@click.argument("url")
@JSON
@answers
def info(url: str, as_json: bool) -> dict[str, Any]:
    """Show what a cache holds and who signed it."""
    from kittybuild.store.remote.info import cache_info

    found = cache_info(bucket(url)).to_json()
    if not as_json:
        for key, value in found.items():
            if key == "signers":
                for name, count in found["signers"].items():
                    click.echo(f"signed by {name}: {count}")
            else:
                click.echo(f"{key}: {amount(value) if key == 'bytes' else value}")
    return {"ok": True, "cache": url, **found}


for _command in (gc, roots):
    command.add_command(_command)


def _keys() -> str:
    return os.path.join(config_folder(), "keys")


def _signing_key(path: str | None) -> SigningKey:
    """The key in a file, else the only one of the user."""
    from kittybuild.store.remote.keys import SigningKey

    if path is None:
        listed = os.listdir(_keys()) if os.path.isdir(_keys()) else []
        found = sorted(name for name in listed if name.endswith(".key"))
        if len(found) != 1:
            what = f"there are {len(found)} keys" if found else "there is no key to sign with"
            hint = "name one with --key FILE" if found else "`kittybuild cache keygen NAME` makes one; or --key FILE"
            raise RemoteError("KB803", what, at=_keys(), hint=hint)
        path = os.path.join(_keys(), found[0])
    return SigningKey.read(path)
