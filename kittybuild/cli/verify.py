"""`kittybuild verify`: hold an output folder against what it says that it is."""

from __future__ import annotations

from typing import Any

import click

from kittybuild.cli.common import JSON, Found, answers
from kittybuild.errors import MOST_NAMED, UsageError, VerifyError
from kittybuild.publish.attest import attested, trusted_keys
from kittybuild.publish.provenance import read_provenance
from kittybuild.publish.verify import EXTRA, verify, verify_shard, verify_tensor


@click.command("verify")
@click.argument("folder", type=click.Path(file_okay=False))
@click.option("--shard", metavar="FILE", help="Look at this shard alone; the others need not be here.")
@click.option("--tensor", metavar="NAME", help="Look at this tensor alone.")
@click.option(
    "--trusted", metavar="KEY", multiple=True, help="A public key, or a file of them: one of them must have signed."
)
@click.option("--allow-extra", is_flag=True, help="Files that the build did not make are told, and no error.")
@JSON
@answers
def command(
    folder: str, shard: str | None, tensor: str | None, trusted: tuple[str, ...], allow_extra: bool, as_json: bool
) -> dict[str, Any]:
    """Compare FOLDER with its kittybuild.json: every tensor, every file."""
    if shard and tensor:
        raise UsageError("KB013", "--shard and --tensor together", hint="a tensor needs no shard: name one of them")
    said = read_provenance(folder)
    signed = attested(folder, said, trusted_keys(trusted))
    if shard:
        found = verify_shard(folder, said, shard)
    elif tensor:
        found = verify_tensor(folder, said, tensor)
    else:
        found = verify(folder, said)
    document = {"folder": folder, "root": said.root.hex, "signed_by": list(signed), **found.to_json()}
    lines = [f"{how}: {kind} {name}" for how, kind, name in found.findings]
    bad = [
        line
        for line, (how, kind, _) in zip(lines, found.findings, strict=True)
        if not (allow_extra and (how, kind) == (EXTRA, "file"))
    ]
    if found.edited:
        lines.append("edited: file README.md (no program reads it)")
    if not as_json:
        click.echo("".join(f"{line}\n" for line in lines), nl=False)
    if bad:
        more = "" if len(bad) <= MOST_NAMED else f"\n  and {len(bad) - MOST_NAMED} more"
        message = "the folder is not what its kittybuild.json says:" + "".join(f"\n  {one}" for one in bad[:MOST_NAMED])
        raise Found([VerifyError("KB603", message + more, at=folder)], document)
    if not as_json:
        by = f", signed by {', '.join(signed)}" if signed else ""
        click.echo(f"{folder}: {found.tensors} tensors and {found.files} files as they were made{by}")
        click.echo(f"root {said.root}")
    return {"ok": True, **document}
