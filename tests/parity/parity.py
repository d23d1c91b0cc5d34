"""Merges pico models with kittybuild and with mergekit 0.1.5, and compares every element: `make parity`.

mergekit is run as a program in an environment of its own. What counts as equal:

- names, shapes and dtypes of all tensors, and num_hidden_layers of config.json, are equal;
- passthrough without a scale: every byte;
- bfloat16 and float16 elements: the same or the neighbouring number, or the same to within the next line's last term;
- float32 elements: |ours - theirs| <= 2e-6 * |theirs| + 2**-22 * (root mean square of their tensor), since an element
  near zero is the small difference of larger ones, each of which was rounded;
- "in bfloat16", where mergekit rounds every step to bfloat16 and we do not: |ours - theirs| is at most 2**-8 of
  |base| + 6 * (the largest difference of a model from it), which is what a handful of such roundings makes;
- TIES: an element may differ beyond that where the difference of one of the models is exactly as large as the smallest
  one kept (which of the equals are kept is unspecified in mergekit), or where the signed sum of the differences is zero
  but for rounding (then a rounding elects the sign). Such elements are counted; any other is a failure. With one model,
  as many elements must change as in mergekit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from kittybuild import __version__
from tests.helpers import load_tensors
from tests.parity.cases import LAYERS, Case, cases, write_models
from tests.parity.command import parser_beside

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Result:
    """One row of the table. `largest`: see `measure`; `excused`: see the file's docstring."""

    dtype: str
    name: str
    tensors: int
    elements: int
    equal: int
    largest: float
    excused: int
    problems: tuple[str, ...]


def main() -> int:
    """Run all cases, print the table, return the exit status."""
    parser = parser_beside(__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="cases side by side")
    arguments = parser.parse_args()
    versions = theirs(arguments.mergekit)
    if versions.get("mergekit") != "0.1.5":
        parser.error(f"{arguments.mergekit} has mergekit {versions.get('mergekit')}, not 0.1.5")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        work = []
        for dtype in ("bfloat16", "float32"):
            models = Path(folder) / dtype
            write_models(models, dtype)
            chosen = [case for case in cases(dtype) if arguments.only.search(case.name)]
            work += [pool.submit(run, case, dtype, models, i, arguments.mergekit) for i, case in enumerate(chosen)]
        results = [done.result() for done in work]
    text = table(results, versions)
    print(text, end="")
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")
    return 1 if any(result.problems for result in results) else 0


def theirs(environment: str) -> dict[str, str]:
    """The versions of what counts in mergekit's environment."""
    code = "import json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in NAMES}))"
    names = ("mergekit", "torch", "transformers", "numpy", "safetensors")
    command = [f"{environment}/bin/python", "-c", code.replace("NAMES", repr(names))]
    return dict(json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout))


# ---- one case


def run(case: Case, dtype: str, models: Path, number: int, environment: str) -> Result:
    """Both programs on one configuration, and what came out compared."""
    config = models / f"{number}.yml"
    config.write_text(yaml.safe_dump(case.config, sort_keys=False), encoding="utf-8")
    ours, other = models / f"{number}-kittybuild", models / f"{number}-mergekit"
    quiet = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
    call([f"{environment}/bin/mergekit-yaml", config.name, str(other), *quiet], models)
    kittybuild = [sys.executable, "-m", "kittybuild", "build", config.name, "-o", str(ours)]
    call([*kittybuild, "--store", str(models / f"{number}-store")], models)
    return compared(case, dtype, models, ours, other)


def call(command: list[str], folder: Path) -> None:
    """Run a program; its words are shown only if it fails."""
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if "mergekit" in command[0]:
        del environment["PYTHONPATH"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def compared(case: Case, dtype: str, models: Path, ours: Path, other: Path) -> Result:
    """The row of a case."""
    found, wanted = load_tensors(ours), load_tensors(other)
    problems = []
    if {n: (t.shape, t.dtype) for n, t in found.items()} != {n: (t.shape, t.dtype) for n, t in wanted.items()}:
        odd = sorted(found.keys() ^ wanted.keys()) or [n for n, t in found.items() if t.dtype != wanted[n].dtype]
        problems.append(f"other names, shapes or dtypes: {', '.join(odd[:4])}")
    counts = [json.loads((folder / "config.json").read_text())["num_hidden_layers"] for folder in (ours, other)]
    if counts[0] != counts[1]:
        problems.append(f"num_hidden_layers: {counts[0]} and {counts[1]}")
    equal = excused = 0
    largest = 0.0
    for name in sorted(found.keys() & wanted.keys()):
        x, y = found[name], wanted[name]
        if x.shape != y.shape or x.dtype != y.dtype:
            continue
        equal += int((x == y).sum())
        beyond = x != y if case.exact else far_apart(x, y)
        if case.coarse and bool(beyond.any()):
            beyond &= (x.float() - y.float()).abs() > coarseness(case, name, models)
        allowed = excuses(case, name, models) if case.ties and bool(beyond.any()) else torch.zeros_like(beyond)
        excused += int((beyond & allowed).sum())
        if case.ties and len(case.config["models"]) == 1:
            changed = [int((t.float() != tensor_of(models, "base", name)).sum()) for t in (x, y)]
            if changed[0] != changed[1]:
                problems.append(f"{name}: {changed[0]} elements change, {changed[1]} do in mergekit")
        if bool((beyond & ~allowed).any()):
            problems.append(f"{name}: {int((beyond & ~allowed).sum())} elements")
        largest = max(largest, measure(x[~beyond], y[~beyond]))
    elements = sum(tensor.numel() for tensor in wanted.values())
    return Result(dtype, case.name, len(wanted), elements, equal, largest, excused, tuple(problems))


def places(tensor: Tensor) -> Tensor:
    """The numbers of a 16-bit dtype, counted in order: neighbours differ by one."""
    bits = tensor.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def far_apart(x: Tensor, y: Tensor) -> Tensor:
    """Where two tensors differ by more than the module's docstring allows."""
    small = 2.0**-22 * y.double().square().mean().sqrt()
    apart = (x.double() - y.double()).abs()
    if x.element_size() == 2:
        return ((places(x) - places(y)).abs() > 1) & (apart > small)
    return apart > 2e-6 * y.double().abs() + small


def measure(x: Tensor, y: Tensor) -> float:
    """The largest difference, relative to the larger of element and tensor (root mean square)."""
    if x.numel() == 0:
        return 0.0
    size = torch.maximum(y.double().abs(), y.double().square().mean().sqrt())
    return float(((x.double() - y.double()).abs() / size).max())


# ---- what TIES leaves open


def excuses(case: Case, name: str, models: Path) -> Tensor:
    """Where a difference of a TIES merge has no one right answer."""
    base = tensor_of(models, "base", name)
    total, size, sure = torch.zeros(base.shape), torch.zeros(base.shape), torch.ones(base.shape, dtype=torch.bool)
    for model, weight, density in inputs_of(case, name):
        delta = tensor_of(models, model, name) - base
        threshold = smallest_kept(delta, density)
        sure &= (delta.abs() - threshold).abs() > (threshold * 2.0**-8 if case.coarse else 0.0)
        kept = weight * torch.where(delta.abs() >= threshold, delta, 0)
        total, size = total + kept, size + kept.abs()
    doubtful = 2.0**-5 if case.coarse else 2.0**-20
    return ~sure | ((total.abs() <= doubtful * size) & (size > 0))


def coarseness(case: Case, name: str, models: Path) -> Tensor:
    """What a handful of roundings to bfloat16 makes of an element."""
    base = tensor_of(models, "base", name)
    deltas = [(tensor_of(models, model, name) - base).abs() for model, _, _ in inputs_of(case, name)]
    return 2.0**-8 * (base.abs() + 6 * torch.stack(deltas).amax(dim=0))


def smallest_kept(delta: Tensor, density: float) -> float:
    """The magnitude of the smallest difference that is kept."""
    count = int(density * delta.numel())
    return float(delta.abs().flatten().sort(descending=True).values[max(1, count) - 1]) if density < 1 else -1.0


def inputs_of(case: Case, name: str) -> Iterator[tuple[str, float, float]]:
    """Model, weight and density of each input, for the tensor `name`."""
    whole: Mapping[str, object] = case.config.get("parameters", {})
    for use in case.config["models"]:
        given = {**whole, **use["parameters"]}
        yield use["model"], value(given["weight"], name), value(given.get("density", 1.0), name)


def value(setting: object, name: str) -> float:
    """A setting for a tensor of a model with as many layers as ours have."""
    if isinstance(setting, list) and setting and isinstance(setting[0], dict):
        return value(next(s["value"] for s in setting if s.get("filter", "") in name), name)
    if not isinstance(setting, list):
        return float(setting)  # type: ignore[arg-type]
    t = int(name.split(".")[2]) / (LAYERS - 1) if ".layers." in name else 0.0
    place = t * (len(setting) - 1)
    low = int(place)
    high = min(low + 1, len(setting) - 1)
    return float((1 - (place - low)) * setting[low] + (place - low) * setting[high])


def tensor_of(models: Path, model: str, name: str) -> Tensor:
    """A tensor of a model, in float32."""
    return load_tensors(models / model)[name].float()


# ---- the table


def table(results: list[Result], versions: Mapping[str, str]) -> str:
    """All results as Markdown."""
    used = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        "# kittybuild and mergekit 0.1.5, element by element",
        "",
        f"Written by `make parity`. kittybuild {__version__} (torch {torch.__version__}) against {used}.",
        "What counts as equal is said in `parity.py`. Equal: elements with the same bits.",
        "Excused: those that TIES leaves open, nearly all of them differences as large as the smallest one kept.",
        "",
        "| models | case | tensors | elements | equal | largest difference | beyond, excused | verdict |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for r in results:
        share = f"{100 * r.equal / r.elements:.2f} %"
        verdict = "; ".join(("FAIL", *r.problems[:4])) if r.problems else "ok"
        row = (r.dtype, r.name, str(r.tensors), str(r.elements), share, f"{r.largest:.1e}", str(r.excused), verdict)
        lines.append(f"| {' | '.join(row)} |")
    failed = sum(bool(r.problems) for r in results)
    lines += ["", f"{len(results)} cases, {failed} failed." if failed else f"{len(results)} cases, none failed."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
