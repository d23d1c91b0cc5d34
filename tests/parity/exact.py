"""Merges models with each peer and with kittybuild in that peer's numerics, and compares every bit: `make parity`.

- A peer runs in an environment of its own, on one thread: its sums over large tensors depend on how many there are.
- Some of a peer's orders are those of a Python set, which the hash seed decides: multislerp and sce of mergekit 0.1.4,
  all of mergekitty that has a row for each token. Here the order is that of the text, so a case that differs is run
  again with the next hash seed, until the peer's order is the text's too. (Wrong bits stay wrong in every order.)
- Equal means names, shapes, dtypes and bytes of all tensors that the peer writes; any NaN equals any other.

`--golden` writes what the peers made, as digests, for tests/golden/peers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kittybuild import __version__
from kittybuild.planner.machine import this_machine
from tests.helpers import load_tensors
from tests.parity.command import environment_at, parser_of
from tests.parity.exact_cases import OUT_OF_REACH, PEERS, Case, cases, real_cases, write_pico
from tests.parity.ours import recipe_of
from tests.parity.peer_digests import ALIKE, CPUS, digest, shown_only
from tests.parity.real import write_real

ROOT = Path(__file__).parents[2]
DRIVE = Path(__file__).with_name("drive.py")
PINNED = {"mergekit-0.1.5": "0.1.5", "mergekit-0.1.4": "0.1.4", "mergekitty-0.3": "0.3.2rc2"}
SEEDS = 40
KINDS = tuple(CPUS)
BEST = this_machine(None).instructions


@dataclass
class Outcome:
    """What came of a case: the hash seed that it was run with last, and what differs."""

    case: Case
    models: str
    seed: int = 0
    tensors: int = 0
    elements: int = 0
    problems: tuple[str, ...] = ("not run",)
    digests: dict[str, str] = field(default_factory=dict)


def main() -> int:
    """Run all cases, print the table, return the exit status."""
    parser = parser_of(__doc__)
    parser.add_argument("--peer", action="append", default=[], metavar="NUMERICS=DIR", help="a peer's environment")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="hash seeds to try")
    parser.add_argument("--models", choices=("pico", "real"), action="append", help="only these; real ones are rxnfp's")
    parser.add_argument("--golden", help="write the peers' digests into this folder")
    parser.add_argument("--lesser", action="store_true", help="with --golden: also as lesser CPUs make them (slow)")
    arguments = parser.parse_args()
    environments = {name: environment_at(place) for name, place in (text.split("=", 1) for text in arguments.peer)}
    if unknown := environments.keys() - set(PEERS):
        parser.error(f"no such class: {', '.join(unknown)}")
    text, failed = [], 0
    for numerics, place in environments.items():
        versions = versions_of(place)
        name = numerics.partition("-")[0]
        if versions.get(name) != PINNED[numerics]:
            parser.error(f"{place} has {name} {versions.get(name)}, not {PINNED[numerics]}")
        with tempfile.TemporaryDirectory() as folder:
            outcomes = compare(numerics, place, Path(folder), arguments)
            if arguments.golden and arguments.lesser:
                record(numerics, place, Path(folder), outcomes)
            if arguments.golden:
                write_golden(Path(arguments.golden) / f"{numerics}.json", outcomes, versions)
        failed += sum(bool(outcome.problems) for outcome in outcomes)
        text.append(table(numerics, outcomes, versions))
        print(text[-1], flush=True)
    if arguments.write:
        arguments.write.write_text("\n".join([heading(), *text]), encoding="utf-8")
    return 1 if failed else 0


def versions_of(environment: str) -> dict[str, str]:
    """The versions of what counts in a peer's environment."""
    code = (
        "import json, platform, importlib.metadata as m\n"
        "found = {d.metadata['Name']: d.version for d in m.distributions()}\n"
        "names = 'mergekit', 'mergekitty', 'torch', 'transformers', 'numpy', 'safetensors'\n"
        "print(json.dumps({'Python': platform.python_version(), **{n: found[n] for n in names if n in found}}))"
    )
    done = subprocess.run([f"{environment}/bin/python", "-c", code], capture_output=True, check=True, text=True)
    return dict(json.loads(done.stdout))


# ---- both programs


def compare(numerics: str, environment: str, folder: Path, arguments: argparse.Namespace) -> list[Outcome]:
    """Merge with both, until the peer's order is the text's or there are no more hash seeds to try."""
    groups = {"pico": (write_pico, cases(numerics)), "real": (write_real, real_cases(numerics))}
    outcomes = []
    for models, (write, found) in groups.items():
        chosen = [Outcome(case, models) for case in found if arguments.only.search(case.key)]
        if not chosen or models not in (arguments.models or groups):
            continue
        write(folder / models)
        build(numerics, [outcome.case for outcome in chosen], folder / models)
        pending = chosen
        for seed in range(arguments.seeds):
            errors = run_peer(environment, [outcome.case for outcome in pending], folder / models, seed)
            for outcome, error in zip(pending, errors, strict=True):
                outcome.seed = seed
                look_at(outcome, folder / models, error)
            pending = [outcome for outcome in pending if outcome.problems]
            if not pending or all(outcome.problems[0].startswith("the peer") for outcome in pending):
                break
        outcomes += chosen
    return outcomes


def build(numerics: str, chosen: Sequence[Case], folder: Path) -> None:
    """One recipe with a stage for each case, built as a person would."""
    (folder / "recipe.yml").write_text(recipe_of(numerics, chosen), encoding="utf-8")
    command = [sys.executable, "-m", "kittybuild", "build", "recipe.yml", "--store", "store"]
    call(command, folder, {"PYTHONPATH": str(ROOT)})


def run_peer(
    environment: str, chosen: Iterable[Case], folder: Path, seed: int, cpu: Mapping[str, str] | None = None
) -> list[str | None]:
    """The peer's errors, case by case; what it makes lies in `theirs/`."""
    orders = [(case.config, f"theirs/{case.key}") for case in chosen]
    return driven(environment, orders, folder, {"PYTHONHASHSEED": str(seed), **(cpu or {})})


def driven(
    environment: str, orders: Iterable[tuple[Mapping[str, Any], str]], folder: Path, environ: Mapping[str, str]
) -> list[str | None]:
    """The peer's errors for configurations, each with the folder that its output goes to: all in one process."""
    text = "\n".join(json.dumps({"config": config, "out": out}) for config, out in orders)
    answers = folder / "answers.jsonl"
    call([f"{environment}/bin/python", "-W", "ignore", str(DRIVE), str(answers)], folder, environ, text)
    return [json.loads(line)["error"] for line in answers.read_text(encoding="utf-8").splitlines()]


def call(command: list[str], folder: Path, environ: Mapping[str, str], text: str = "") -> None:
    """Run a program on one thread; its words are shown only if it fails."""
    same = {"HF_HUB_OFFLINE": "1", **CPUS[BEST], **ALIKE}
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **same, **environ},
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def look_at(outcome: Outcome, folder: Path, error: str | None) -> None:
    """Compare what lies in both folders."""
    if error:
        outcome.problems = (f"the peer fails: {error}",)
        return
    case = outcome.case
    wanted = shown_only(case, load_tensors(folder / "theirs" / case.key))
    found = load_tensors(folder / "ours" / case.key)
    outcome.tensors, outcome.elements = len(wanted), sum(tensor.numel() for tensor in wanted.values())
    outcome.problems = tuple(differences(found, wanted))
    if not outcome.problems:
        outcome.digests[BEST] = digest(wanted)


def differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Iterable[str]:
    """What of the peer's tensors is otherwise."""
    for name, theirs in wanted.items():
        ours = found.get(name)
        if ours is None:
            yield f"{name} is missing"
        elif (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            yield f"{name} is {ours.dtype} {list(ours.shape)}, not {theirs.dtype} {list(theirs.shape)}"
        else:
            unequal = as_integers(ours) != as_integers(theirs)
            if theirs.is_floating_point():
                unequal &= ~(ours.isnan() & theirs.isnan())
            if bool(unequal.any()):
                yield f"{name}: {int(unequal.sum())} of {theirs.numel()}"


def as_integers(tensor: Tensor) -> Tensor:
    """The bits of each element."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


# ---- golden vectors


def record(numerics: str, environment: str, folder: Path, outcomes: Sequence[Outcome]) -> None:
    """What the peer makes on lesser CPUs, with the hash seed whose order is the text's."""
    for cpu in KINDS[: KINDS.index(BEST)]:
        for seed in sorted({outcome.seed for outcome in outcomes}):
            chosen = [o for o in outcomes if o.seed == seed and o.models == "pico" and not o.problems]
            run_peer(environment, [o.case for o in chosen], folder / "pico", seed, CPUS[cpu])
            for outcome in chosen:
                made = load_tensors(folder / "pico" / "theirs" / outcome.case.key)
                outcome.digests[cpu] = digest(shown_only(outcome.case, made))


def write_golden(file: Path, outcomes: Sequence[Outcome], versions: Mapping[str, str]) -> None:
    """One digest for a case, or one for each kind of CPU where they differ; what is known of other kinds stays."""
    old = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    known = old.get("digests", {}) if old.get("made by") == dict(versions) else {}
    for outcome in outcomes:
        if outcome.models == "pico" and outcome.digests:
            before = known.get(outcome.case.key, {})
            before = dict.fromkeys(KINDS, before) if isinstance(before, str) else before
            found = {**before, **outcome.digests}
            same = found.keys() >= set(KINDS) and len(set(found.values())) == 1
            known[outcome.case.key] = next(iter(found.values())) if same else found
    text = json.dumps({"made by": versions, "digests": dict(sorted(known.items()))}, indent=1) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


# ---- the table


def heading() -> str:
    """What stands above the tables."""
    return (
        "# kittybuild in the peers' numerics, bit by bit\n\n"
        f"Written by `make parity`. kittybuild {__version__} (torch {torch.__version__},"
        f" {torch.backends.cpu.get_cpu_capability()}), on one thread, against each peer on one thread.\n"
        "What counts as equal is said in `exact.py`. Cases: a configuration over models of one dtype or a mixture; real"
        " models are those of rxnfp 0.1.0.\n\nOut of reach, and in no case:\n"
        + "".join(f"- {what}: {why}.\n" for what, why in OUT_OF_REACH.items())
    )


def table(numerics: str, outcomes: Sequence[Outcome], versions: Mapping[str, str]) -> str:
    """The cases of a class by method, and each that is not exact."""
    used = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [f"## {numerics}", "", f"Against {used}.", ""]
    lines += ["| models | method | cases | exact | tensors | elements |", "|---|---|---:|---:|---:|---:|"]
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.models, outcome.case.method), []).append(outcome)
    for (models, method), group in groups.items():
        exact = sum(not outcome.problems for outcome in group)
        tensors, elements = sum(o.tensors for o in group), sum(o.elements for o in group)
        lines.append(f"| {models} | {method} | {len(group)} | {exact} | {tensors} | {elements} |")
    exact = sum(not outcome.problems for outcome in outcomes)
    later = sum(outcome.seed > 0 for outcome in outcomes if not outcome.problems)
    lines += ["", f"{exact} of {len(outcomes)} cases exact, {later} of them with another hash seed than 0."]
    for outcome in outcomes:
        if outcome.problems:
            lines.append(f"- {outcome.models}, {outcome.case.key}: {'; '.join(outcome.problems[:3])}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
