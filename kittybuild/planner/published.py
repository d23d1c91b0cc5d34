"""Whose arithmetic made a published merge: beside its configuration lies an index that names the tool."""

from __future__ import annotations

import os
from collections.abc import Collection

from kittybuild.checkpoint.folder import INDEX, read_json
from kittybuild.errors import SourceError

CONFIGS = ("mergekit_config.yml", "mergekitty_config.yml")
_MERGEKITTY = "mergekitty-0.3"
"""mergekitty writes one constant for all its versions: this is the only one that we know the arithmetic of."""


def published_class(recipe: str, classes: Collection[str]) -> tuple[str | None, str | None]:
    """The class of arithmetic that made the model beside the file `recipe`, and a note on it; None where none is told.

    Only a file that the peers write beside their models is looked at.
    """
    folder, name = os.path.split(os.path.abspath(recipe))
    if name not in CONFIGS:
        return None, None
    try:
        metadata = (read_json(os.path.join(folder, INDEX)) or {}).get("metadata")
    except SourceError:  # the model beside a recipe is none of its sources
        return None, None
    found = metadata if isinstance(metadata, dict) else {}
    if "mergekitty_version" in found:
        tool, numerics = "mergekitty", _MERGEKITTY
    elif "mergekit_version" in found:
        tool = f"mergekit {found['mergekit_version']}"
        numerics = tool.replace(" ", "-", 1)
    else:
        return None, None
    made = f"{recipe}: the index of the model beside it was written by {tool}"
    if numerics not in classes:
        return None, f"{made}, whose arithmetic we do not have: --numerics chooses another than kitty-1"
    return numerics, f"{made}: numerics {numerics} is taken, and --numerics kitty-1 takes ours"
