"""`recipe.lock` beside its recipe: read whole or refused, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress

from kittybuild.checkpoint.bounded import Bounded
from kittybuild.errors import SourceError
from kittybuild.model.lock import Pin, lock_text, parse_lock

LARGEST = 256 << 20


def lock_path(recipe: str) -> str:
    """Where the lock of a recipe is."""
    return f"{os.path.splitext(recipe)[0]}.lock"


def read_lock(recipe: str) -> dict[str, Pin]:
    """The pins of a recipe by source, {} where there is no lock. Raises SourceError KB258."""
    path = lock_path(recipe)
    try:
        with open(path, "rb") as file:
            return parse_lock(Bounded(file, LARGEST, "the lock").read())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        hint = "restore it, or delete it and run `kittybuild lock` again"
        raise SourceError("KB258", f"cannot read the lock: {why}", at=path, hint=hint) from error


def write_lock(recipe: str, pins: Mapping[str, Pin]) -> str:
    """Write the lock of a recipe, if it changes; its path. Raises SourceError KB258."""
    path, data = lock_path(recipe), lock_text(pins).encode()
    temporary = f"{path}.{os.urandom(8).hex()}.tmp"
    try:
        with suppress(FileNotFoundError), open(path, "rb") as file:
            if file.read() == data:
                return path
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            os.unlink(temporary)
        hint = "the lock lies beside its recipe: see that you may write there"
        raise SourceError("KB258", f"cannot write the lock: {error.strerror}", at=path, hint=hint) from error
    return path
