"""The bits of every builder, pinned; and the same bits from every kind of CPU that this one can play.

If this fails and you did not mean to change bits, the change is a bug. If you meant it, bump the builder's version;
then `KITTYBUILD_GOLDEN=write pytest tests/golden/builders` writes `vectors.json` anew, with new cases too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest

from kittybuild.builders.registry import BUILTIN
from tests.golden.builders.cases import digests

ROOT = Path(__file__).parents[3]
VECTORS = Path(__file__).with_name("vectors.json")
NUMPYS = " ".join(numpy.show_config(mode="dicts")["SIMD Extensions"].get("found", ()))  # all that it can leave out
CPUS = {
    "plain": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "NPY_DISABLE_CPU_FEATURES": "AVX2",
    },
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512"},
}


def problems(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What may not be: bits that changed while the version did not."""
    return [
        f"{builder} {made['version']}: the bits of {name!r} changed"
        for builder, made in new.items()
        if old.get(builder, {}).get("version") == made["version"]
        for name, digest in made["cases"].items()
        if old[builder]["cases"].get(name, digest) != digest
    ]


def test_bits_change_only_with_the_version() -> None:
    old = json.loads(VECTORS.read_text(encoding="utf-8")) if VECTORS.exists() else {}
    new = {builder: {"version": BUILTIN[builder].version, "cases": made} for builder, made in digests().items()}
    assert problems(old, new) == [], "a bug, or bump the version: see the docstring of this file"
    if os.environ.get("KITTYBUILD_GOLDEN") == "write":
        VECTORS.write_text(json.dumps(new, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    else:
        assert old == new, "another version or other cases than in vectors.json: KITTYBUILD_GOLDEN=write"


def test_every_builder_is_pinned() -> None:
    """But those whose bits are a machine's: their derivations name it."""
    assert set(json.loads(VECTORS.read_text(encoding="utf-8"))) == {
        builder.name for builder in BUILTIN.by_class.values() if not builder.machine
    }


def test_a_change_of_bits_is_noticed() -> None:
    old = {"linear": {"version": 1, "cases": {"a": "1", "b": "2"}}}
    assert problems(old, {"linear": {"version": 1, "cases": {"a": "1", "b": "3"}}})
    assert not problems(old, {"linear": {"version": 2, "cases": {"a": "1", "b": "3"}}})
    assert not problems(
        old, {"linear": {"version": 1, "cases": {"a": "1", "c": "4"}}, "new": {"version": 1, "cases": {}}}
    )


def made_on(cpu: str) -> dict[str, Any]:
    """What a process makes that is told to use only this CPU's instructions."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.golden.builders.cases"]
    environment = {**os.environ, **CPUS[cpu], "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("cpu", CPUS)
def test_the_bits_are_the_same_on_every_cpu(cpu: str) -> None:
    vectors = json.loads(VECTORS.read_text(encoding="utf-8"))
    assert made_on(cpu) == {builder: pinned["cases"] for builder, pinned in vectors.items()}
