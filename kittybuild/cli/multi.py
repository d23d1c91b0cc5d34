"""`kittybuild multi`: what mergekit-multi does, and with OUT_ROOT what mergekitty-mega does."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import click

from kittybuild.cli.programs import Common, accepted, beside, documents, output, program
from kittybuild.errors import UsageError
from kittybuild.recipe.programs import MERGE, multi_text

NOTES: Mapping[str, str] = MappingProxyType(
    {
        "--lazy/--no-lazy": "what did not change is never made again, and what changed always is",
        "-f,--force/--no-force": "folders are always replaced, by what the configuration says now",
    }
)


@program("multi")
@click.argument("config_file", type=click.Path(dir_okay=False))
@click.argument("out_root", type=click.Path(), required=False)
@click.option("--out-path", metavar="DIR", help="The folder of the merge without a name.")
@click.option("-I", "--intermediate-dir", metavar="DIR", help="Merges with a name go into DIR/NAME, too.")
@click.option("-R", "--require-nameless", is_flag=True, help="One merge must be without a name.")
@accepted(NOTES)
def command(
    config_file: str,
    out_root: str | None,
    out_path: str | None,
    intermediate_dir: str | None,
    require_nameless: bool,
    common: Common,
) -> dict[str, Any]:
    """Make the merges of CONFIG_FILE, a document each, which name each other (mergekit-multi).

    With OUT_ROOT each goes into OUT_ROOT/NAME, and the one without a name is called as the file (mergekitty-mega).
    """
    common.read(config_file)
    configs = [document.value for document in documents(config_file)]
    names = [config.get("name") for config in configs]
    if require_nameless and None not in names:
        raise UsageError("KB018", "every merge has a name", at=config_file, hint="take one `name` out")
    named = intermediate_dir or out_root
    folders = {name: os.path.join(named, name) for name in names if name and named}
    if None in names:
        final = out_path or (out_root and os.path.join(out_root, os.path.splitext(os.path.basename(config_file))[0]))
        if not final:
            raise UsageError("KB018", "one merge has no name", at=config_file, hint="add `--out-path FOLDER` for it")
        folders[MERGE] = final
    elif out_path:
        hint = "take one `name` out, or give `-I FOLDER`"
        raise UsageError("KB018", "every merge has a name, and none goes into --out-path", at=config_file, hint=hint)
    if not folders:
        raise UsageError("KB018", "no merge has a folder", at=config_file, hint="add `-I FOLDER`, or OUT_ROOT")
    file = beside(config_file)
    text = multi_text(configs, {name: output(folder, file) for name, folder in folders.items()}, common.settings)
    return common.answer(text, file)
