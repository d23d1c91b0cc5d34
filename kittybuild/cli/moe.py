"""`kittybuild moe`: what mergekit-moe and mergekitty-moe do."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import click

from kittybuild.cli.programs import Common, accepted, beside, documents, output, program
from kittybuild.errors import UsageError
from kittybuild.recipe.programs import merge_text

NOTES: Mapping[str, str] = MappingProxyType(
    {
        "--load-in-4bit/--no-load-in-4bit": "the base runs in bfloat16, one layer in memory at a time",
        "--load-in-8bit/--no-load-in-8bit": "the base runs in bfloat16, one layer in memory at a time",
        "--i-understand-this-is-not-useful-without-training": "what is asked for is built",
    }
)


@program("moe")
@click.argument("config_path", type=click.Path(dir_okay=False))
@click.argument("out_path", type=click.Path())
@accepted(NOTES)
def command(config_path: str, out_path: str, common: Common) -> dict[str, Any]:
    """Put models side by side as experts, as the configuration CONFIG_PATH says, into OUT_PATH (mergekit-moe)."""
    config = documents(config_path)[0].value
    if "experts" not in config:
        raise UsageError("KB018", "there are no `experts`", at=config_path, hint=f"kittybuild merge {config_path}")
    read = common.read(config_path)
    text = merge_text(read.text, config, output(out_path, config_path), common.settings)
    return common.answer(text, beside(config_path), read, out_path)
