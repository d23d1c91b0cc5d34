"""The structure of the package is tested, not remembered; and so are the checks that test it (`tests/structure.py`)."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.structure import (
    CHECKS,
    PACKAGE,
    Check,
    Source,
    docstring,
    edge,
    file_size,
    function_size,
    heavy_imports,
    layers,
    randomness,
    report,
    state,
)

ROOT = Path(__file__).resolve().parents[2]

# These start without torch, transformers and numpy: a plan, a build with nothing to do, every store command.
LIGHT = ("model", "recipe", "store", "planner", "publish", "api", "cli")
ABSENT = ("torch", "transformers", "numpy")


def python_files(*folders: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for folder in folders for path in ROOT.glob(f"{folder}/**/*.py"))


@functools.cache
def read(path: str) -> Source:
    return Source(path, (ROOT / path).read_text(encoding="utf-8"))


def test_the_package_is_where_we_look() -> None:
    assert f"{PACKAGE}/__init__.py" in python_files(PACKAGE)


@pytest.mark.parametrize("path", python_files(PACKAGE))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_structure(check: Check, path: str) -> None:
    problems = report(check, read(path))
    assert not problems, f"{check.__doc__}\n{problems}"


@pytest.mark.parametrize("path", python_files("tests", "recipes", "benchmarks"))
def test_files_outside_the_package_are_short_too(path: str) -> None:
    assert not report(file_size, read(path))


def loaded_by(code: str, *arguments: str) -> list[str]:
    """Which of ABSENT a fresh interpreter has loaded after running `code`."""
    code += f"\nimport json, sys\nprint()\nprint(json.dumps([name for name in {ABSENT!r} if name in sys.modules]))"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


RUN_AS_MAIN = """
import runpy, sys
try:
    runpy.run_module("kittybuild", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    assert not stop.code, stop.code
"""


def exists(module: str) -> bool:
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@pytest.mark.parametrize("part", LIGHT)
def test_importing_a_light_part_loads_nothing_large(part: str) -> None:
    module = f"{PACKAGE}.{part}"
    if not exists(module):
        pytest.skip(f"{module} is not written yet")
    assert loaded_by(f"import {module}") == [], f"python -X importtime -c 'import {module}' shows who imports it"


def test_a_plan_starts_without_torch() -> None:
    if not exists(f"{PACKAGE}.__main__"):
        pytest.skip(f"{PACKAGE}.__main__ is not written yet")
    assert loaded_by(RUN_AS_MAIN, "plan", "--help") == [], "python -X importtime -m kittybuild plan --help shows who"


# ---- the checks themselves: a check that cannot fail is none

PACKS = "kittybuild/store/packs.py"
PLAN = "kittybuild/model/plan.py"
DARE = "kittybuild/builders/merge/dare.py"
API = "kittybuild/api.py"
ROOT_INIT = "kittybuild/__init__.py"
MAIN = "kittybuild/__main__.py"
PICKLED = "kittybuild/checkpoint/pickled.py"

BROKEN: tuple[tuple[Check, str, str], ...] = (
    (layers, PACKS, "def f():\n    from kittybuild.planner import plan"),
    (layers, PACKS, "import kittybuild.recipe"),
    (layers, "kittybuild/store/remote/s3.py", "from ...planner import plan"),
    (layers, "kittybuild/store/__init__.py", "from .. import tokens"),
    (layers, PACKS, "from kittybuild import build"),
    (layers, PACKS, "import kittybuild"),
    (layers, "kittybuild/digest.py", "if TYPE_CHECKING:\n    from kittybuild.model import Plan"),
    (layers, PLAN, "import importlib\nimportlib.import_module(f'kittybuild.builders.{name}')"),
    (layers, PLAN, "from importlib import import_module\nimport_module('..store', __package__)"),
    (layers, "kittybuild/search/sweep.py", "from kittybuild.report import html"),
    (layers, "kittybuild/cli/build.py", "from kittybuild.testing import tiny"),
    (layers, ROOT_INIT, "from kittybuild.api import build"),
    (layers, "kittybuild/helpers.py", ""),
    (heavy_imports, "kittybuild/planner/lower.py", "def f():\n    import torch"),
    (heavy_imports, "kittybuild/cli/moe.py", "from transformers import AutoConfig"),
    (heavy_imports, PICKLED, "import torch"),
    (heavy_imports, PICKLED, "try:\n    from torch.serialization import load\nexcept ImportError: ..."),
    (heavy_imports, PACKS, "from safetensors.torch import save_file"),
    (heavy_imports, PACKS, "import importlib\ndef f(): return importlib.import_module('torch')"),
    (state, PLAN, "CACHE = {}"),
    (state, PLAN, "CACHE: dict[str, int] = dict()"),
    (state, PLAN, "CACHE: Final = []"),
    (state, PLAN, "CACHE: Final[list[int]] = []"),
    (state, PLAN, "CACHE = collections.defaultdict(list)"),
    (state, PLAN, "if True:\n    A = B = {n for n in 'ab'}"),
    (state, PLAN, "PAIRS = (1, [2])"),
    (state, PLAN, "NAMES = ['a'] + OTHERS"),
    (state, PLAN, "NAMES = {'a'} | {'b'}"),
    (state, PLAN, "IDS = itertools.count()"),
    (state, PLAN, "N = 0\ndef f():\n    global N"),
    (randomness, DARE, "import random\nrandom.seed(1)"),
    (randomness, DARE, "from random import shuffle as mix\nmix(names)"),
    (randomness, DARE, "import random\ndef f(): return random.Random()"),
    (randomness, DARE, "import random\nR = random.Random(1)"),
    (randomness, DARE, "import numpy as np\nnp.random.seed(1)"),
    (randomness, DARE, "from numpy.random import rand\ndef f(): return rand(3)"),
    (randomness, DARE, "import numpy\ndef f(): return numpy.random.default_rng()"),
    (randomness, DARE, "def f():\n    import torch\n    torch.manual_seed(1)"),
    (randomness, DARE, "import torch\ntorch.cuda.manual_seed_all(1)"),
    (randomness, DARE, "import torch as t\ndef f(): return t.randn(3)"),
    (randomness, DARE, "def f(mask): return mask.bernoulli_(0.5)"),
    (edge, API, "def f(): print('built')"),
    (edge, API, "def f(log=print): ..."),
    (edge, API, "import sys\ndef f(): sys.exit(1)"),
    (edge, API, "def f(): raise SystemExit"),
    (edge, MAIN, "import sys\nsys.argv.pop()"),
    (edge, "kittybuild/store/paths.py", "from os import environ\nHOME = environ['HOME']"),
    (edge, "kittybuild/store/paths.py", "import os\ndef f(): return os.getenv('HOME')"),
    (edge, "kittybuild/report/html.py", "def f():\n    from rich.console import Console"),
    (file_size, PLAN, "x = 1\n" * 501),
    (function_size, PLAN, "async def f():\n" + "    x = 1\n" * 60),
    (function_size, PLAN, "class A:\n    def f(self):\n" + "        x = 1\n" * 60),
    (docstring, PLAN, "x = 1"),
    (docstring, "kittybuild/model/__init__.py", ""),
)

SOUND: tuple[tuple[Check, str, str], ...] = (
    (layers, PACKS, "from kittybuild.store.disk import write\nfrom . import disk\nfrom ..model import plan"),
    (layers, "kittybuild/publish/folder.py", "from kittybuild import __version__, digest\nimport numpy"),
    (layers, "kittybuild/cli/build.py", "from kittybuild import build\nimport kittybuild"),
    (layers, "kittybuild/testing/tiny.py", "from kittybuild.api import build"),
    (layers, ROOT_INIT, "def __getattr__(name):\n    from kittybuild import api"),
    (layers, MAIN, "from kittybuild.cli import main"),
    (heavy_imports, "kittybuild/builders/merge/ties.py", "import torch"),
    (heavy_imports, PICKLED, "if TYPE_CHECKING:\n    import torch\ndef f():\n    import torch"),
    (heavy_imports, PACKS, "import safetensors\nimport torchless"),
    (
        state,
        PLAN,
        "__all__ = ['a']\nA = ('a', 1)\nB = frozenset({1})\nC = MappingProxyType({1: 2})\nD = 'a'.count('b')",
    ),
    (state, PLAN, "A: Final[Mapping[str, int]] = {'a': 1}\nclass B:\n    names = field(list)"),
    (state, PLAN, "NAMES = frozenset(A) | {'b'}"),
    (state, PLAN, "def f():\n    found = []\n    found += [1]"),
    (
        randomness,
        "kittybuild/builders/random.py",
        "from numpy.random import Generator, Philox\ndef f(k): return Philox(key=k)",
    ),
    (randomness, DARE, "from kittybuild.builders import random\nrandom.seed(1)"),
    (randomness, DARE, "import torch\ndef f(g): return torch.randn(3, generator=g)"),
    (edge, "kittybuild/cli/main.py", "import os\nimport click\nprint(os.environ)"),
    (edge, MAIN, "import sys\nfrom kittybuild.cli import main\nsys.exit(main())"),
    (edge, PLAN, "import os\nimport sys\nos.replace(a, b)\nx = sys.modules\nplan.print()"),
    (file_size, PLAN, "x = 1\n" * 500),
    (function_size, PLAN, "def f():\n" + "    x = 1\n" * 59),
    (docstring, PLAN, '"""Plans. Holds no IO."""'),
)


def cases(table: tuple[tuple[Check, str, str], ...]) -> list[object]:
    return [pytest.param(*case, id=f"{case[0].__name__}-{number}") for number, case in enumerate(table)]


@pytest.mark.parametrize(("check", "path", "text"), cases(BROKEN))
def test_a_check_finds_what_it_is_for(check: Check, path: str, text: str) -> None:
    assert report(check, Source(path, text)).startswith(f"{path}:")


@pytest.mark.parametrize(("check", "path", "text"), cases(SOUND))
def test_a_check_finds_nothing_else(check: Check, path: str, text: str) -> None:
    assert not report(check, Source(path, text))


def test_every_check_is_checked_both_ways() -> None:
    assert {case[0] for case in BROKEN} == {case[0] for case in SOUND} == set(CHECKS)


def test_the_probe_sees_what_is_loaded() -> None:
    assert loaded_by("import numpy") == ["numpy"]
    assert loaded_by("import json") == []
