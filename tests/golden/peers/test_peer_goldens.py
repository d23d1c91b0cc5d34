"""The bits of the peers' classes are those that the peers made, whose digests lie here: no peer is needed.

`make parity` compares with the peers themselves; `python -m tests.parity.exact --golden tests/golden/peers` writes the
digests anew. A case has one for each kind of CPU where they differ. All cases are made as this CPU can; those that
differ also as a lesser one would.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from kittybuild.planner.machine import this_machine
from kittybuild.planner.peers import rules_of
from tests.parity.exact_cases import PEERS, cases
from tests.parity.peer_digests import ALIKE, CPUS

ROOT = Path(__file__).parents[3]
KINDS = tuple(CPUS)
NUMPY = tuple(numerics for numerics in PEERS if rules_of(numerics).numpy)


def golden(numerics: str) -> dict[str, Any]:
    """The versions that made the digests, and the digests by key of the case."""
    return dict(json.loads(Path(__file__).with_name(f"{numerics}.json").read_text(encoding="utf-8")))


def wanted(numerics: str, cpu: str, *, numpy: bool) -> dict[str, str]:
    """The digests to be made as on such a CPU. `numpy`: of methods where numpy computes, else of all others."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"recorded on x86-64, and this is {platform.machine()}")
    best = this_machine(None).instructions
    if KINDS.index(cpu) > KINDS.index(best):
        pytest.skip(f"this CPU has no {cpu}")
    record = golden(numerics)
    for library in ("torch", "numpy") if numpy else ("torch",):
        have, made_with = (text.partition("+")[0] for text in (version(library), record["made by"][library]))
        if have != made_with:
            pytest.skip(f"recorded with {library} {made_with}, and this is {have}: it may give other bits")
    by_numpy = {case.key for case in cases(numerics) if case.method in rules_of(numerics).numpy}
    return {
        key: digest if isinstance(digest, str) else digest[cpu]
        for key, digest in record["digests"].items()
        if (key in by_numpy) == numpy and (cpu == best if isinstance(digest, str) else cpu in digest)
    }


def made(numerics: str, cpu: str, keys: list[str]) -> dict[str, str]:
    """What kittybuild makes on such a CPU."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.parity.peer_digests", numerics]
    environ = {**os.environ, **CPUS[cpu], **ALIKE}
    text = json.dumps(keys)
    done = subprocess.run(command, cwd=ROOT, env=environ, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def check(numerics: str, cpu: str, *, numpy: bool = False) -> None:
    digests = wanted(numerics, cpu, numpy=numpy)
    if not digests:
        pytest.skip(f"nothing is recorded that is peculiar to {cpu}")
    found = made(numerics, cpu, list(digests))
    assert [key for key, digest in digests.items() if found[key] != digest] == []


@pytest.mark.parametrize("cpu", KINDS)
@pytest.mark.parametrize("numerics", PEERS)
def test_the_bits_are_the_peers(numerics: str, cpu: str) -> None:
    check(numerics, cpu)


@pytest.mark.parametrize("cpu", KINDS)
@pytest.mark.parametrize("numerics", NUMPY)
def test_the_bits_are_the_peers_where_numpy_computes(numerics: str, cpu: str) -> None:
    check(numerics, cpu, numpy=True)


@pytest.mark.parametrize("numerics", PEERS)
def test_every_case_is_recorded(numerics: str) -> None:
    assert golden(numerics)["digests"].keys() == {case.key for case in cases(numerics)}
