"""Settings: `kittybuild.yml` of the project (at or above the recipe), and `config.yml` of the person."""

from __future__ import annotations

import os
from dataclasses import dataclass

from kittybuild.errors import RecipeError, nearest
from kittybuild.recipe.yamltext import read_documents

_LISTS = ("substituters", "trusted")
_HINT = "write `store: FOLDER`, `substituters: [URL, ...]`, `trusted: [KEY, ...]`"


@dataclass(frozen=True)
class Settings:
    """What one file of settings says. `folder`: where it lies."""

    folder: str = ""
    store: str | None = None
    substituters: tuple[str, ...] = ()
    trusted: tuple[str, ...] = ()


def project_settings(recipe: str | None) -> Settings:
    """Those of the nearest kittybuild.yml at or above the recipe, else the working folder. Raises RecipeError."""
    folder = os.path.dirname(os.path.abspath(recipe)) if recipe else os.getcwd()
    while True:
        found = os.path.join(folder, "kittybuild.yml")
        if os.path.isfile(found):
            return _read(found)
        if folder == os.path.dirname(folder):
            return Settings()
        folder = os.path.dirname(folder)


def config_folder() -> str:
    """Where a person's own settings and keys are."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return os.path.join(base, "kittybuild")


def personal_settings() -> Settings:
    """Those of the person. Raises RecipeError."""
    found = os.path.join(config_folder(), "config.yml")
    return _read(found) if os.path.isfile(found) else Settings()


def _read(path: str) -> Settings:
    try:
        with open(path, encoding="utf-8") as text:
            documents = read_documents(text.read(), path)
    except (OSError, ValueError) as error:
        raise RecipeError("KB101", f"cannot read the settings: {error}", at=path) from error
    if not documents:
        return Settings(os.path.dirname(path))
    found = documents[0].value
    if len(documents) > 1 or not isinstance(found, dict) or not isinstance(found.get("store", ""), str):
        raise RecipeError("KB103", "the settings are not `store: FOLDER`", at=path, hint="write `store: store/`")
    for word in found:
        if word not in ("store", *_LISTS):
            raise RecipeError(
                "KB103", f"unknown setting {word!r}", at=path, hint=nearest(str(word), ("store", *_LISTS))
            )
    lists = {}
    for name in _LISTS:
        value = found.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise RecipeError("KB103", f"`{name}` is not a list of texts", at=path, hint=_HINT)
        lists[name] = tuple(value)
    return Settings(os.path.dirname(path), found.get("store"), **lists)
