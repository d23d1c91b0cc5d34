"""Transplants tokenizers between pico models with kittybuild and with mergekit-tokensurgeon 0.1.5, and compares rows.

    python -m tests.parity.surgeon --mergekit ENVIRONMENT [--write FILE]

Embedding and head of each model have the same rows here, so that what mergekit does to the other of the two (matches,
weighted means: it swaps them) is compared as well: our embedding with its head, and our head with its embedding. What
counts as equal: computed rows within 2**-20 of the largest number of the table (mergekit computes in float32, we round
once), copied rows too. Not compared are random methods; with `prefix_match` special tokens and `<0x41>`, which are
no texts here and have no beginnings; tokens with `▁`, which mergekit takes for no space here; and bytes whose letter is
another sign, such as `Ċ` for `<0x0A>`, which it does not know.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kittybuild.tokens.matching import Meanings, byte_letters
from kittybuild.tokens.vocabulary import Vocabulary
from tests.helpers import load_tensors, run_cli, save_tensors, write_recipe
from tests.parity.command import parser_beside
from tests.parity.parity import call
from tests.surgery import EMBEDDING, HEAD, tokenizers, write

TABLES = (EMBEDDING, HEAD)
NEAR = 2.0**-20
HEAD_LINES = (
    "# Transplanted tokenizers, kittybuild and mergekit-tokensurgeon 0.1.5",
    "",
    "Written by `python -m tests.parity.surgeon`, whose docstring says what counts as equal. Not there: what is random",
    "(`randn`, `john_hewitt`, noise), what fails in mergekit (`stb`, `mp_rope`, `new_vocab_scale` with `mean`), and",
    "`landmark_pca`, for which mergekit's result is not that of its description.",
    "",
    "| models | options | rows | largest difference | verdict |",
    "|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Case:
    """Two models and the options of a stage. `swapped`: mergekit does to one table what we do to the other."""

    model: str
    donor: str
    options: Mapping[str, Any]
    swapped: bool = False

    @property
    def words(self) -> list[str]:
        """The options as mergekit's program takes them."""
        found: list[str] = []
        for key, value in self.options.items():
            name = f"--{key.replace('_', '-')}"
            found += [name] if value is True else [name, str(value)]
        return found


def cases() -> Iterator[Case]:
    """All cases."""
    ways: list[dict[str, Any]] = [{"approximation_method": "mean"}, {"approximation_method": "zero"}]
    ways += [{"approximation_method": "omp", "k": k} for k in (1, 8, 12)]
    ways += [
        {"approximation_method": "common_interpolation", "k": k, "weight_scheme": scheme, **cosine}
        for k in (1, 8)
        for scheme in ("distance_proportional", "barycentric", "least_squares")
        for cosine in ({}, {"cosine_similarity": True})
    ]
    ways.append({"approximation_method": "omp", "k": 8, "new_vocab_scale": 0.5})
    yield from (Case("one", "two", way) for way in ways)
    for method in ("mean", "sum", "weighted_mean"):
        options = {"approximation_method": "subword", "subword_method": method}
        yield Case("one", "two", options, swapped=method == "weighted_mean")
    yield Case("one", "two", {"approximation_method": "subword", "subword_method": "first_last"})
    yield Case("one", "two", {"approximation_method": "mean", "magikarp": True})
    yield Case("one", "two", {"approximation_method": "omp", "k": 8, "magikarp": True})
    for side in ("embed", "lm_head", "yes"):
        yield Case("one", "three", {"approximation_method": "mean", "byte_match": side}, swapped=side != "yes")
        yield Case("one", "two", {"approximation_method": "mean", "prefix_match": side}, swapped=side != "yes")


def run(case: Case, folder: Path, environment: str) -> tuple[int, float, str]:
    """How many rows were compared, the largest difference, and what is wrong."""
    known = {}
    for name in (case.model, case.donor):
        known[name] = write(folder, name, tokenizers()[name])
        tensors = load_tensors(folder / name)
        save_tensors(folder / name / "model.safetensors", {**tensors, HEAD: tensors[EMBEDDING].clone()})
    stage = {"kind": "transplant_tokenizer", "model": case.model, "donor": case.donor, **case.options}
    text = {"kittybuild": 1, "stages": {"out": stage}, "outputs": {"out": {"folder": "ours"}}}
    status, answer = run_cli("build", write_recipe(folder, text), "--store", folder / "store")
    if status:
        return 0, 0.0, str(answer["errors"][0]["message"])
    program = f"{environment}/bin/mergekit-tokensurgeon"
    call([program, case.model, case.donor, "theirs", *case.words, "--no-write-model-card", "--quiet"], folder)
    ours, theirs = load_tensors(folder / "ours"), load_tensors(folder / "theirs")
    rows = compared_rows(case, known[case.donor])
    worst, problems = 0.0, []
    for name in TABLES:
        other = TABLES[1 - TABLES.index(name)] if case.swapped else name
        x, y = ours[name][rows].double(), theirs[other][rows].double()
        apart = (x - y).abs().amax(1) / y.abs().max().clamp(min=1.0)
        worst = max(worst, float(apart.max()))
        odd = [known[case.donor].tokens[row] for row in torch.tensor(rows)[apart > NEAR].tolist()]
        problems += [f"{name}: {len(odd)} rows differ: {odd[:3]}"] if odd else []
    return len(rows), worst, "; ".join(problems)


def compared_rows(case: Case, donor: Vocabulary) -> list[int]:
    """The rows that mean the same to both programs."""
    meanings = Meanings(donor)
    odd = {f"<0x{byte:02X}>" for letter, byte in byte_letters().items() if letter != chr(byte)}
    plain = "prefix_match" in case.options
    return [
        number
        for token, number in donor.ids.items()
        if "▁" not in token and token not in odd and (not plain or meanings.plain(token) is not None)
    ]


def main() -> int:
    """Run all cases, print a line each, return the exit status."""
    arguments = parser_beside(__doc__).parse_args()
    lines, failed = [], False
    for case in cases():
        options = ", ".join(f"{key} {value}" for key, value in case.options.items())
        if not arguments.only.search(options):
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows, worst, problem = run(case, Path(folder), arguments.mergekit)
        failed |= bool(problem)
        verdict = problem or ("equal, tables swapped" if case.swapped else "equal")
        lines.append(f"| {case.model}, {case.donor} | {options} | {rows} | {worst:.1e} | {verdict} |")
        print(lines[-1], flush=True)
    if arguments.write:
        arguments.write.write_text("\n".join([*HEAD_LINES, *lines]) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
