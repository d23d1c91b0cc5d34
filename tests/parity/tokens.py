"""Aligns the tables of pico models by their tokenizers, with kittybuild and with mergekit 0.1.5, and compares each row.

    python -m tests.parity.tokens --mergekit ENVIRONMENT [--write FILE]

mergekit's ids of a union depend on the order of a hash map: rows are compared by their tokens. A linear merge with
weight 1 for one model and 0 for the others shows the table of that model. What counts as equal:

- both vocabularies have the same tokens, and config.json the number of rows (mergekit drops fillers: so do we, here);
- rows that are copied, zero, or (float32) averaged: every bit; averages in bfloat16: the same or the neighbouring
  number; rows that round up: within 2**-8 of the size of a row, since mergekit adds in the dtype of the tables.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kittybuild.model.recipe import ModelRef
from kittybuild.model.tokenizer import ModelToken, TokenizerRequest, TokenRule
from kittybuild.tokens.outcome import Outcome, carry_out
from kittybuild.tokens.reading import read_vocabulary
from tests.helpers import llama_config, llama_shapes, load_tensors, noise, write_model
from tests.jobs import make
from tests.parity.command import parser_beside
from tests.parity.exact import driven
from tests.parity.parity import places
from tests.tokenizers import Files, byte_fallback, byte_level, files_of, read_files, write_files
from tests.vocabularies import PAIRS, tokenizer_of

HEAD = (
    "# Tables by token, kittybuild and mergekit 0.1.5",
    "",
    "Written by `python -m tests.parity.tokens`, whose docstring says what counts as equal. Each case compares",
    "embedding and head of every model of the merge, aligned to the output's vocabulary, row by row.",
    "",
    "| tables | case | rows | verdict |",
    "|---|---|---:|---|",
)
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
WIDTH = 32
DTYPES = ("float32", "bfloat16")
Models = Mapping[str, Files]


@dataclass(frozen=True)
class Case:
    """What gives the models by name with their tokenizers, and the request in both programs' words."""

    name: str
    given: Callable[[], Models]
    tokenizer: Mapping[str, Any]
    base: str | None = "base"
    dtype: str = "float32"
    rows: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def models(self) -> Models:
        """The models, in the order of the merge."""
        return self.given()

    @property
    def request(self) -> TokenizerRequest:
        """The request as a value."""
        rules = [
            TokenRule(token, _source(rule.get("source")), rule.get("force", False))
            for token, rule in self.tokenizer.get("tokens", {}).items()
        ]
        source = self.tokenizer["source"]
        wanted = source if source in ("base", "union") else ModelRef(source)
        return TokenizerRequest(wanted, tuple(rules), self.tokenizer.get("pad_to_multiple_of"))


def _source(text: Any) -> Any:
    if isinstance(text, str):
        return ModelRef(text)
    if text["kind"] == "zero":
        return "zero"
    return ModelToken(ModelRef(text["model"]), text.get("token"), text.get("token_id"))


def cases() -> Iterator[Case]:
    """All cases on tokenizers by hand."""
    byte = {
        "base": files_of(byte_level(["Ġthe"], ["</s>", "<b>"]), {"eos_token": "</s>"}),
        "a": files_of(byte_level(["Ġthe", "in"], ["</s>", "<im>", "<ab>"]), {"eos_token": "</s>"}),
        "b": files_of(byte_level(["ing", "Ġthe"], ["</s>", "<ab>", "xy"]), {"eos_token": "</s>"}),
    }
    words, special = ["▁the", "in", "▁cat"], ["<unk>", "<s>", "</s>"]
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    spm = {
        "base": files_of(byte_fallback(words, special), roles),
        "a": files_of(byte_fallback(words, [*special, "<im>"]), roles),
        "b": files_of(byte_fallback([*words, "ing"], [*special, "<im>", "<x>"]), roles),
    }
    rules = {
        "<b>": {"source": {"kind": "model_token", "model": "a", "token": "Ġthe"}, "force": True},
        "Ġthe": {"source": {"kind": "model_token", "model": "a", "token_id": 3}},
        "Ġth": {"source": {"kind": "zero"}, "force": True},
        "</s>": {"source": "b", "force": True},
        "in": {"source": "b"},
        "ing": {"source": {"kind": "zero"}},
    }
    for dtype in DTYPES:
        for name, models in (("byte-level", lambda: byte), ("byte fallback", lambda: spm)):
            for source in ("union", "base", "b"):
                yield Case(f"{name}, {source}", models, {"source": source}, dtype=dtype)
            yield Case(f"{name}, union without a base", models, {"source": "union"}, None, dtype)
            yield Case(f"{name}, union, rounded up", models, {"source": "union", "pad_to_multiple_of": 64}, dtype=dtype)
            filled = {"base": 320, "a": 300, "b": 290}
            yield Case(f"{name}, base with fillers", models, {"source": "base"}, dtype=dtype, rows=filled)
            yield Case(f"{name}, union with fillers", models, {"source": "union"}, dtype=dtype, rows=filled)
        yield Case("rules", lambda: byte, {"source": "union", "tokens": rules}, dtype=dtype)


def real() -> Iterator[Case]:
    """Pairs of real models: on the tokens of both, of the one, of the other."""
    for dtype in DTYPES:
        for one, two in PAIRS:
            models = partial(_pair, one, two)
            for source in ("union", "base", "other"):
                yield Case(f"{one} and {two}, {source}", models, {"source": source}, dtype=dtype)


def _pair(one: str, two: str) -> Models:
    return {"base": tokenizer_of(one), "other": tokenizer_of(two)}


# ---- one case


def run(case: Case, folder: Path, environment: str) -> tuple[int, list[str]]:
    """The rows of the output's tables, and what differs, a line each."""
    rows = write_models(case, folder)
    vocabularies = {}
    for name, files in case.models.items():
        vocabulary = read_vocabulary(files, rows[name], name)
        assert vocabulary is not None
        vocabularies[ModelRef(name)] = vocabulary
    files = {ModelRef(name): tokenizer for name, tokenizer in case.models.items()}
    base = ModelRef(case.base) if case.base else None
    ours = carry_out(case.request, vocabularies, files, base, fillers=False)
    problems = []
    orders = [(configuration(case, chosen), f"out-{chosen}") for chosen in case.models]
    for chosen, error in zip(case.models, driven(environment, orders, folder, {"PYTHONHASHSEED": "0"}), strict=True):
        if error:
            problems.append(f"{chosen}: mergekit fails: {error}")
            continue
        theirs = folder / f"out-{chosen}"
        count = json.loads((theirs / "config.json").read_text())["vocab_size"]
        if count != ours.rows:
            problems.append(f"{chosen}: {ours.rows} rows, {count} in mergekit")
            continue
        ids = read_vocabulary(read_files(theirs), count, "mergekit")
        assert ids is not None
        if set(ids.ids) != set(ours.vocabulary.ids):
            odd = sorted(set(ids.ids) ^ set(ours.vocabulary.ids))
            problems.append(f"{chosen}: other tokens: {odd[:5]}")
            continue
        tables = load_tensors(theirs)
        for name in TABLES:
            found = aligned(ours, chosen, name, folder)
            problems += [f"{chosen}: {name}: {p}" for p in compared(ours, chosen, found, tables[name], ids.ids)]
    return ours.rows, problems


def write_models(case: Case, folder: Path) -> dict[str, int]:
    """Pico models with these tokenizers; returns the rows of their tables."""
    rows = {}
    for seed, (name, files) in enumerate(case.models.items(), start=1):
        vocabulary = read_vocabulary(files, 0, name)
        assert vocabulary is not None
        rows[name] = case.rows.get(name, vocabulary.end)
        shapes = llama_shapes(layers=1, width=WIDTH, vocab=rows[name])
        kind = getattr(torch, case.dtype)
        tensors = {tensor: noise(seed, tensor, shape).to(kind) for tensor, shape in shapes.items()}
        config = llama_config(layers=1, width=WIDTH, vocab=rows[name], tie=False, dtype=case.dtype)
        write_model(folder / name, tensors, config)
        write_files(folder / name, files)
    return rows


def configuration(case: Case, chosen: str) -> dict[str, Any]:
    """mergekit's words for an output that shows the table of the model `chosen`."""
    models = [{"model": name, "parameters": {"weight": float(name == chosen)}} for name in case.models]
    config: dict[str, Any] = {"merge_method": "linear", "models": models, "dtype": case.dtype}
    return config | {"tokenizer": dict(case.tokenizer), **({"base_model": case.base} if case.base else {})}


def aligned(ours: Outcome, chosen: str, name: str, folder: Path) -> Tensor:
    """Our table of that model."""
    gathered = ours.tables[ModelRef(chosen)]
    inputs = [load_tensors(folder / str(ref))[name] for ref in gathered.models]
    params = {"axis": 0, "rows": str(gathered.rows)}
    return make("rows", inputs, params, shape=(ours.rows, WIDTH)).tensor


def compared(ours: Outcome, chosen: str, found: Tensor, wanted: Tensor, ids: Mapping[str, int]) -> Iterator[str]:
    """Which rows differ by more than the module's docstring allows."""
    made = list(ours.tables[ModelRef(chosen)].rows.rows())
    here = torch.tensor(list(ours.vocabulary.ids.values()))
    there = torch.tensor([ids[token] for token in ours.vocabulary.ids])
    x, y = found[here], wanted[there]
    averaged = torch.tensor([len(made[number]) > 1 for number in here.tolist()])
    off = (x != y).any(1)
    if x.dtype == torch.bfloat16:
        near = (places(x).view(x.shape) - places(y).view(y.shape)).abs().amax(1) <= 1
        off &= ~(averaged & near)
    for number in here[off].tolist()[:3]:
        yield f"the row of {ours.vocabulary.tokens[number]!r} differs"
    means = found[len(made) :].double() - wanted[len(made) :].double()
    if len(means) and float(means.abs().max()) > 2.0**-8 * float(wanted.double().square().mean().sqrt()):
        yield f"the means differ by {float(means.abs().max())}"


def main() -> int:
    """Run all cases, print a line each, return the exit status."""
    arguments = parser_beside(__doc__).parse_args()
    lines, failed = [], False
    for case in (*cases(), *real()):
        if not arguments.only.search(case.name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows, problems = run(case, Path(folder), arguments.mergekit)
        failed |= bool(problems)
        lines.append(f"| {case.dtype} | {case.name} | {rows} | {'; '.join(problems) or 'equal'} |")
        print(lines[-1], flush=True)
    if arguments.write:
        arguments.write.write_text("\n".join([*HEAD, *lines]) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
