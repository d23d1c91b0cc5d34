"""Whole builds for tests: in this process, in a fresh one, or in one that was made ready and can be killed.

build(recipe, "-o", out, "--store", store)["stages"]["merge"]["computed"]
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.helpers import run_cli, write_recipe

ROOT = Path(__file__).parent.parent
_READY = [
    *("click.testing", "obstore.store", "cryptography.hazmat.primitives.asymmetric.ed25519", "tests.building"),
    *("kittybuild.cli.build", "kittybuild.cli.cache", "kittybuild.cli.store_gc"),
    *("kittybuild.executor.run", "kittybuild.publish.push", "kittybuild.publish.texts", "kittybuild.publish.pull"),
]
Answer = dict[str, Any]


def build(recipe: str | Path, *args: str | Path) -> Answer:
    """The JSON document of a build that must succeed."""
    status, document = run_cli("build", recipe, *args)
    assert (status, document["ok"]) == (0, True), document
    return document


def fails(recipe: str | Path, *args: str | Path) -> tuple[int, str, Answer]:
    """Exit status, code, and first error of a build that must fail."""
    status, document = run_cli("build", recipe, *args)
    assert document["ok"] is False, document
    return status, document["errors"][0]["code"], document["errors"][0]


def fresh(*args: str | Path, env: Mapping[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own; `env` is added to the environment."""
    command = [sys.executable, "-m", "kittybuild", *map(str, args)]
    everything = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    return subprocess.run(command, env=everything, capture_output=True, text=True, timeout=300, **options)


def started(target: Callable[..., None], *args: Any, **options: Any) -> BaseProcess:
    """`target` in a new process, forked from one that has imported torch and done nothing else."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(_READY)
    process = server.Process(target=target, args=args, kwargs=options)
    process.start()
    return process


def build_into(answer: str, *args: str) -> None:
    """For `started`: run a build; exit status, JSON document and standard error go to the file `answer`."""
    run_into(answer, "build", *args)


def run_into(answer: str, *args: str, begun: Connection | None = None) -> None:
    """For `started`: the same with any command. `begun`: where to say that everything is ready; one that hears, too,
    is waited for."""
    from click.testing import CliRunner

    from kittybuild.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born ignoring it
    if begun is not None:
        begun.send(None)
        if begun.readable:
            begun.recv()
    done = CliRunner().invoke(main, [*args, "--json"])
    text = json.dumps({"status": done.exit_code, "stderr": done.stderr, **json.loads(done.stdout)})
    Path(answer).write_text(text, encoding="utf-8")


def linear(folder: str | Path, weights: Mapping[str | Path, Any], name: str = "recipe.yml", **more: Any) -> str:
    """A bare mergekit recipe: the weighted mean of models."""
    models = [{"model": str(model), "parameters": {"weight": weight}} for model, weight in weights.items()]
    return write_recipe(folder, {"merge_method": "linear", "models": models, **more}, name)


def contents(folder: str | Path) -> dict[str, bytes]:
    """All files of a folder by name, with their bytes; {} where there is none."""
    top = Path(folder)
    return {str(path.relative_to(top)): path.read_bytes() for path in sorted(top.rglob("*")) if path.is_file()}


def packs(store: str | Path) -> dict[str, bytes]:
    """All packs of a store."""
    return contents(Path(store) / "packs")


def manifest_of(document: Answer, stage: str = "merge") -> str:
    """The digest of what a build made."""
    return str(document["stages"][stage]["manifest"])
