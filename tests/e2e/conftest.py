"""The merge that the tests of bad input and of folders share; each file gives its own `models`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.building import linear


@pytest.fixture
def recipe(models: Path, tmp_path: Path) -> str:
    return linear(tmp_path, {models / "base": 0.5, models / "happy": 0.5})


@pytest.fixture
def args(recipe: str, tmp_path: Path) -> tuple[Any, ...]:
    return recipe, "-o", tmp_path / "out", "--store", tmp_path / "store"
