"""Bad input, the whole list: each a clear error with a code, from headers alone; nothing is executed or overwritten.

What has tests of its own elsewhere is named, not repeated:

- a repository that lies about sizes: test_hub.py, test_a_repository_that_lies_about_sizes (KB257)
- a redirect to another host with a token: test_hub.py, TestSecrets (the token does not go there)
- an index with `../`: test_bad_input.py, indexed_outside_its_folder; test_hub.py, test_an_index_that_leads_out (KB204)
- a link out of the folder: test_bad_input.py, with_a_link_out_of_its_folder; test_folder.py, TestLinks (KB204)
- overlapping and missing ranges: test_safetensors_file.py, test_every_other_header_is_refused_with_its_defect (KB202);
  ranges that a server moves: test_hub.py, test_a_server_that_sends_other_bytes_than_it_is_asked_for (KB257)
- any pickle: test_pickled_hostile.py (KB221); of the Hub: test_hub.py, test_a_pickle_that_calls_is_not_run;
  its plan: test_formats.py, test_a_plan_of_pickled_sources_runs_nothing
- a tokenizer.json with a million merges: test_tokens_reading.py, test_a_million_merges_are_read_in_a_moment
- two real models of different families: test_real_models.py (KB302)

Here each goes through whole commands, beside an output folder that was built before and a store that holds it.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kittybuild.errors import MOST_NAMED
from tests.building import build, contents, fails, linear, packs
from tests.helpers import load_tensors, pico_llama, run_cli, write_json, write_model


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """`base`, and `evil`, its sibling that a test makes so."""
    base = pico_llama(tmp_path / "base", 1)
    pico_llama(tmp_path / "evil", 2, base=base)
    return tmp_path


def rewritten(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Another header before the same data."""
    file = model / "model.safetensors"
    data = file.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])


def a_header_of_two_gigabytes(model: Path) -> None:
    with (model / "model.safetensors").open("wb") as sparse:
        sparse.write(struct.pack("<Q", 2 << 30))
        sparse.truncate((2 << 30) + 1000)


def overlapping_ranges(model: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        first, second = list(header)[1:3]
        header[second]["data_offsets"] = header[first]["data_offsets"]

    rewritten(model, change)


def missing_ranges(model: Path) -> None:
    rewritten(model, lambda header: header.pop(list(header)[1]))


def an_index_with_dots(model: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../base/model.safetensors"}}
    write_json(model / "model.safetensors.index.json", index)


def a_link_out(model: Path) -> None:
    os.symlink("/etc/passwd", model / "chat_template.jinja")


def a_pickle_that_calls(model: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {model / 'owned'}",)

    torch.save({**load_tensors(model), "extra": Evil()}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def another_family(model: Path) -> None:
    tensors = load_tensors(model)
    (model / "model.safetensors").unlink()
    write_model(model, {name.replace("model.", "gpt_neox."): tensor for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (a_header_of_two_gigabytes, "KB202"),
        (overlapping_ranges, "KB202"),
        (missing_ranges, "KB202"),
        (an_index_with_dots, "KB204"),
        (a_link_out, "KB204"),
        (a_pickle_that_calls, "KB221"),
        (another_family, "KB302"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_it_is_an_error_of_the_plan_that_changes_nothing(make: Callable[[Path], None], code: str, models: Path) -> None:
    recipe = linear(models, {models / "base": 0.5, models / "evil": 0.5})
    build(recipe, "-o", models / "out", "--store", models / "store")
    make(models / "evil")
    before = contents(models / "out"), contents(models / "base"), contents(models / "evil"), packs(models / "store")
    status, document = run_cli("plan", recipe, "--store", models / "store")
    assert (status, document["errors"][0]["code"]) == (3 if code == "KB302" else 4, code)
    assert fails(recipe, "-o", models / "out", "--store", models / "store")[1] == code
    after = contents(models / "out"), contents(models / "base"), contents(models / "evil"), packs(models / "store")
    assert after == before
    assert not (models / "evil" / "owned").exists()


def test_a_million_merges_beside_another_vocabulary_are_an_error_of_few_words(models: Path) -> None:
    """A tokenizer.json of any size is read once, and a message shows some tokens, not all."""
    for name, merges in (("base", 1), ("evil", 1_000_000)):
        tokens = ["a", "b", "ab", *(f"{name}-{index}" for index in range(61))]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        model = {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]] * merges}
        write_json(models / name / "tokenizer.json", {"version": "1.0", "added_tokens": [], "model": model})
    status, document = run_cli("plan", linear(models, {models / "base": 0.5, models / "evil": 0.5}))
    assert (status, document["errors"][0]["code"]) == (3, "KB330")
    assert len(document["errors"][0]["message"].splitlines()) < 2 * MOST_NAMED
