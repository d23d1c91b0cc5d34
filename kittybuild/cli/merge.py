"""`kittybuild merge`: what mergekit-yaml and mergekitty-yaml do."""

from __future__ import annotations

from typing import Any

import click

from kittybuild.cli.programs import Common, beside, documents, output, program
from kittybuild.recipe.programs import merge_text


@program("merge")
@click.argument("config_file", type=click.Path(dir_okay=False))
@click.argument("out_path", type=click.Path())
def command(config_file: str, out_path: str, common: Common) -> dict[str, Any]:
    """Merge models as the configuration CONFIG_FILE says, into OUT_PATH (mergekit-yaml)."""
    read = common.read(config_file)
    config = documents(config_file)[0].value
    text = merge_text(read.text, config, output(out_path, config_file), common.settings)
    return common.answer(text, beside(config_file), read, out_path)
