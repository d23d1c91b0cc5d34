"""The store that a command looks after: it must be there, since only builds make one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kittybuild.cli.common import store_folder
from kittybuild.errors import StoreError
from kittybuild.store.store import Store


@contextmanager
def existing(store: str | None, recipe: str | None = None, *, to_clean: bool = False) -> Iterator[Store]:
    """The store (`recipe`: of that one), open; raises StoreError KB711 if there is none."""
    folder = store_folder(store, recipe)
    if not Store.exists(folder):
        raise StoreError("KB711", "there is no store here", at=folder, hint="a build makes it; or name it with --store")
    with Store.open(folder, to_clean=to_clean) as opened:
        yield opened
