"""`kittybuild publish`: an output folder into a repository on the Hub."""

from __future__ import annotations

from typing import Any

import click

from kittybuild.checkpoint.sources.web import Web
from kittybuild.cli.common import JSON, answers
from kittybuild.errors import VerifyError
from kittybuild.publish.provenance import read_provenance
from kittybuild.publish.upload import upload
from kittybuild.publish.verify import EXTRA, verify


@click.command("publish")
@click.argument("folder", type=click.Path(file_okay=False))
@click.argument("repo")
@click.option("--private", is_flag=True, help="A repository that is made for it is private.")
@click.option("--overwrite-readme", is_flag=True, help="Replace the README there, even if somebody edited it.")
@JSON
@answers
def command(folder: str, repo: str, private: bool, overwrite_readme: bool, as_json: bool) -> dict[str, Any]:
    """Upload the output in FOLDER to REPO (ORGANISATION/NAME) on the Hub, verified, as one commit."""
    said = read_provenance(folder)
    wrong = [
        f"{how}: {kind} {name}" for how, kind, name in verify(folder, said).findings if (how, kind) != (EXTRA, "file")
    ]
    if wrong:
        more = "" if len(wrong) == 1 else f" and {len(wrong) - 1} more"
        hint = "`kittybuild verify` names all; build it again"
        raise VerifyError(
            "KB603", f"the folder is not what its kittybuild.json says: {wrong[0]}{more}", at=folder, hint=hint
        )
    done = upload(folder, said, repo, Web(), private=private, overwrite_readme=overwrite_readme)
    if not as_json:
        click.echo(f"{repo}: {len(done.files)} files, commit {done.commit}")
        if done.deleted:
            click.echo(f"deleted there: {', '.join(done.deleted)}")
        if done.readme_kept:
            click.echo("note: the README there was edited: it stays (--overwrite-readme replaces it)", err=True)
    return {"ok": True, **done.to_json()}
