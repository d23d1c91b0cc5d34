"""Merges of models with different vocabularies: every row is the one of its token, and the output loads and speaks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.building import Answer, build, contents, fails
from tests.helpers import load_tensors, run_cli
from tests.tables import EMBED, PLAIN, assert_rows, assert_speaks, ids, rows_of
from tests.tokenizers import byte_level, files_of, model_with, read_files, write_files

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
BASE = files_of(byte_level(["Ġthe", "Ġcat"], ["<s>", "</s>"]), {"bos_token": "<s>", "eos_token": "</s>"})
CHAT = files_of(
    byte_level(["Ġthe", "ing"], ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]),
    {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE},
)
TEXTS = (*PLAIN, "<|im_start|>user the thing<|im_end|></s>")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models with other tokens, in float32 so that rows are told exactly."""
    folder = tmp_path_factory.mktemp("models")
    model_with(folder / "base", 0, BASE, dtype="float32")
    model_with(folder / "chat", 1, CHAT, dtype="float32")
    return folder


def recipe(models: Path, folder: Path, *, weights: Sequence[float] = (1.0, 0.0), **more: Any) -> str:
    """A bare mergekit file: a linear merge of the two."""
    uses = [{"model": str(models / n), "parameters": {"weight": w}} for n, w in zip(("base", "chat"), weights)]  # noqa: B905
    text = {"merge_method": "linear", "models": uses, "parameters": {"normalize": False}} | more
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yml").write_text(yaml.safe_dump(text, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return str(folder / "recipe.yml")


def merged(models: Path, tmp_path: Path, **more: Any) -> tuple[Path, Answer]:
    """The output of a merge, and what the build said."""
    answer = build(recipe(models, tmp_path, **more), "-o", tmp_path / "out", "--store", tmp_path / "store")
    return tmp_path / "out", answer


def test_union_has_the_tokens_of_all_each_with_its_rows(models: Path, tmp_path: Path) -> None:
    out, answer = merged(models, tmp_path, tokenizer_source="union", weights=(0.25, 0.5))
    tokens = ids(out)
    assert set(tokens) == {*ids(BASE), *ids(CHAT)}
    assert {token: tokens[token] for token in ids(BASE)} == ids(BASE)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(tokens)
    assert_rows(out, models, lead="base", weights={"base": 0.25, "chat": 0.5})
    assert_speaks(out, TEXTS)
    assert "merge/tables of" in " ".join(answer["stages"])


def test_base_keeps_the_tokenizer_files_byte_for_byte(models: Path, tmp_path: Path) -> None:
    out, _ = merged(models, tmp_path, tokenizer_source="base", base_model=str(models / "base"), weights=(0.5, 0.25))
    assert read_files(out) == read_files(models / "base")
    assert (out / "config.json").read_bytes() == (models / "base/config.json").read_bytes()
    assert_rows(out, models, lead="base", weights={"base": 0.5, "chat": 0.25})
    assert_speaks(out, PLAIN)


def test_the_tokenizer_of_a_model_comes_with_its_files_template_and_ids(models: Path, tmp_path: Path) -> None:
    out, _ = merged(models, tmp_path, tokenizer_source=str(models / "chat"), base_model=str(models / "base"))
    assert read_files(out) == read_files(models / "chat")
    found = rows_of(out)
    base, chat = (rows_of(models / name) for name in ("base", "chat"))
    assert all(torch.equal(row, base.get(token, chat[token])) for token, row in found.items())
    for name in ("config.json", "generation_config.json"):
        config = json.loads((out / name).read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (ids(CHAT)["<s>"], ids(CHAT)["</s>"])
    assert assert_speaks(out, TEXTS).chat_template == TEMPLATE


def test_an_id_whose_token_is_gone_is_that_of_the_tokenizer_s_model(models: Path, tmp_path: Path) -> None:
    out, answer = merged(models, tmp_path, tokenizer_source=str(models / "base"), base_model=str(models / "chat"))
    for name in ("config.json", "generation_config.json"):
        config = json.loads((out / name).read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (ids(BASE)["<s>"], ids(BASE)["</s>"])
    assert not [note for note in answer["notes"] if "by hand" in note]
    assert assert_speaks(out, PLAIN).chat_template is None


def test_truncate_takes_the_rows_that_all_have_and_the_base_s_files(tmp_path: Path) -> None:
    models = tmp_path / "models"
    for seed, (name, rows) in enumerate((("base", 300), ("chat", 320))):
        model_with(models / name, seed, BASE, rows=rows, dtype="float32")
    out, _ = merged(models, tmp_path, tokenizer_source="truncate", weights=(0.5, 0.5))
    wanted = [load_tensors(models / name)[EMBED][:300] for name in ("base", "chat")]
    assert torch.equal(load_tensors(out)[EMBED], 0.5 * wanted[0] + 0.5 * wanted[1])
    assert read_files(out) == read_files(models / "base")
    assert_speaks(out, PLAIN)


def test_rows_are_rounded_up_with_the_mean_of_the_rows(models: Path, tmp_path: Path) -> None:
    out, _ = merged(models, tmp_path, tokenizer={"source": "union", "pad_to_multiple_of": 64})
    table, count = load_tensors(out)[EMBED], len(ids(out))
    assert len(table) == json.loads((out / "config.json").read_text())["vocab_size"] == -(-count // 64) * 64
    assert len(table) > count
    mean = table[:count].double().mean(0)
    assert torch.allclose(table[count:].double(), mean.expand(len(table) - count, -1), atol=1e-6)
    assert_speaks(out, TEXTS)


def test_single_tokens_come_from_where_the_recipe_says(models: Path, tmp_path: Path) -> None:
    chat = str(models / "chat")
    rules = {
        "<|im_start|>": {"source": {"kind": "model_token", "model": chat, "token": "Ġthe"}},
        "<|im_end|>": {"source": {"kind": "zero"}, "force": True},
        "</s>": {"source": chat, "force": True},
        "Ġcat": {"source": {"kind": "model_token", "model": chat, "token_id": 7}, "force": True},
        "<new>": {"source": str(models / "base")} | {"source": {"kind": "model_token", "model": chat, "token_id": 3}},
    }
    for weights, name in (((1.0, 0.0), "base"), ((0.0, 1.0), "chat")):
        out, _ = merged(models, tmp_path / name, tokenizer={"source": "union", "tokens": rules}, weights=weights)
        found, table, theirs = rows_of(out), load_tensors(models / "chat")[EMBED], ids(CHAT)
        own = "<|im_start|>" if name == "chat" else "Ġthe"  # not forced: who has a row keeps it
        assert torch.equal(found["<|im_start|>"], table[theirs[own]])
        assert not found["<|im_end|>"].any()
        assert torch.equal(found["</s>"], table[theirs["</s>"]])
        assert torch.equal(found["Ġcat"], table[7])
        assert torch.equal(found["<new>"], table[3])
    assert_speaks(out, (*TEXTS, "a<new>b"))


@pytest.mark.parametrize(
    "wish", ["chatml", "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}", "auto"]
)
def test_a_chat_template_is_written_where_loaders_find_it(models: Path, tmp_path: Path, wish: str) -> None:
    out, _ = merged(models, tmp_path, tokenizer_source="base", chat_template=wish)
    assert ids(out) == ids(BASE)
    template = assert_speaks(out, PLAIN).chat_template
    assert template == {"auto": TEMPLATE}.get(wish, template)
    assert ("<|im_start|>" in template) == (wish == "chatml")
    listed = json.loads((out / "kittybuild.json").read_text())["manifest"]["files"]
    assert "tokenizer_config.json" in [name for name, _, _ in listed]


def test_a_chat_template_needs_no_other_tokenizer(models: Path, tmp_path: Path) -> None:
    again = model_with(tmp_path / "again", 5, BASE, dtype="float32")
    text = recipe(models, tmp_path, chat_template="chatml")
    text = str(Path(text).write_text(Path(text).read_text().replace(str(models / "chat"), str(again)))) and text
    build(text, "-o", tmp_path / "out", "--store", tmp_path / "store")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (models / "base/tokenizer.json").read_bytes()
    assert "<|im_start|>" in assert_speaks(tmp_path / "out", PLAIN).chat_template


def test_unequal_vocabularies_need_a_word_and_each_line_of_the_hint_is_one(models: Path, tmp_path: Path) -> None:
    args = ("-o", tmp_path / "out", "--store", tmp_path / "store")
    status, code, error = fails(recipe(models, tmp_path), *args)
    assert (status, code) == (3, "KB330")
    assert "'<|im_start|>'" in error["message"]
    lines = [line.partition("#")[0].strip() for line in error["hint"].splitlines()[1:]]
    assert [yaml.safe_load(line)["tokenizer_source"] for line in lines] == ["base", "union", "truncate"]
    assert error["at"].endswith(":1:1")
    for line in lines[:2]:
        build(recipe(models, tmp_path, **yaml.safe_load(line)), *args)


def test_a_model_of_the_tokenizer_is_one_of_the_merge(models: Path, tmp_path: Path) -> None:
    args = ("-o", tmp_path / "out", "--store", tmp_path / "store")
    status, code, error = fails(recipe(models, tmp_path, tokenizer_source="elsewhere"), *args)
    assert (status, code) == (3, "KB331")
    assert "elsewhere is not merged here" in error["message"]
    status, code, _ = fails(recipe(models, tmp_path, tokenizer_source="base", chat_template="chatlm"), *args)
    assert (status, code) == (3, "KB334")
    broken = "{% for message in messages %}"
    assert fails(recipe(models, tmp_path, tokenizer_source="base", chat_template=broken), *args)[1] == "KB335"


def test_a_changed_weight_makes_only_what_hangs_on_it_again(models: Path, tmp_path: Path) -> None:
    filtered = [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]
    _, first = merged(models, tmp_path, tokenizer_source="union", weights=(filtered, 0.5))
    filtered[0]["value"] = 0.25
    out, second = merged(models, tmp_path, tokenizer_source="union", weights=(filtered, 0.5))
    tensors = first["stages"]["merge"]["tensors"]
    assert first["stages"]["merge"]["computed"] == tensors
    assert second["stages"]["merge"]["computed"] == 6  # the mlp of two layers
    _, third = merged(models, tmp_path, tokenizer_source="union", weights=(filtered, 0.5))
    assert third["stages"].keys() == first["stages"].keys()
    assert [stage["computed"] for stage in third["stages"].values()] == [0] * len(third["stages"])
    before = contents(out)
    again = tmp_path / "again" / out.name
    text = recipe(models, tmp_path, tokenizer_source="union", weights=(filtered, 0.5))
    cold = build(text, "-o", again, "--store", tmp_path / "cold")
    assert cold["stages"]["merge"]["manifest"] == third["stages"]["merge"]["manifest"]
    assert contents(again) == before


def test_a_build_with_nothing_to_do_loads_no_tokenizer(models: Path, tmp_path: Path) -> None:
    text = recipe(models, tmp_path, tokenizer_source="union", chat_template="chatml")
    args = ["build", text, "-o", str(tmp_path / "out"), "--store", str(tmp_path / "store")]
    build(*args[1:])
    code = "import sys\nfrom kittybuild.cli import main\nmain(sys.argv[1:], standalone_mode=False)\n"
    code += (
        "print([name for name in ('torch', 'numpy', 'tokenizers', 'transformers', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[]"


def test_another_tokenizer_file_is_another_build(models: Path, tmp_path: Path) -> None:
    for name, files in (("base", BASE), ("chat", CHAT)):
        model_with(tmp_path / "models" / name, 0, files, dtype="float32")
    merged(tmp_path / "models", tmp_path, tokenizer_source="union")
    more = files_of(byte_level(["Ġthe", "ing"], ["<s>", "</s>", "<|im_start|>", "<|im_END|>"]))
    write_files(tmp_path / "models/chat", more)
    out, answer = merged(tmp_path / "models", tmp_path, tokenizer_source="union")
    assert {"<|im_END|>"} == set(ids(out)) - {*ids(BASE), *ids(CHAT)}
    assert answer["stages"]["merge"]["computed"] == 0  # another name for the same row


def test_stages_hand_their_tokenizer_on(models: Path, tmp_path: Path) -> None:
    text = {
        "kittybuild": 1,
        "sources": {name: {"path": str(models / name)} for name in ("base", "chat")},
        "stages": {
            "both": {
                "merge_method": "linear",
                "models": [{"model": name, "parameters": {"weight": 0.5}} for name in ("base", "chat")],
                "tokenizer_source": "union",
                "chat_template": "chatml",
            },
            "again": {
                "merge_method": "task_arithmetic",
                "base_model": "both",
                "models": [{"model": "base", "parameters": {"weight": 0.5}}],
                "tokenizer_source": "base",
            },
        },
        "outputs": {"both": {"folder": "both"}, "again": {"folder": "again"}},
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(text, sort_keys=False), encoding="utf-8")
    build(tmp_path / "recipe.yml", "--store", tmp_path / "store")
    assert read_files(tmp_path / "again") == read_files(tmp_path / "both")
    assert len(load_tensors(tmp_path / "again")[EMBED]) == len(ids(tmp_path / "both"))
    assert (tmp_path / "again/config.json").read_bytes() == (tmp_path / "both/config.json").read_bytes()
    assert "<|im_start|>" in assert_speaks(tmp_path / "again", TEXTS).chat_template


def test_slices_and_tied_weights_have_one_vocabulary(tmp_path: Path) -> None:
    models = tmp_path / "models"
    for seed, (name, files) in enumerate((("base", BASE), ("chat", CHAT))):
        model_with(models / name, seed, files, dtype="float32", tie=True)
    slices = [
        {"sources": [{"model": str(models / n), "layer_range": r}]} for n, r in (("base", [0, 2]), ("chat", [1, 2]))
    ]
    text = {"merge_method": "passthrough", "slices": slices, "tokenizer_source": "union"}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(text), encoding="utf-8")
    build(tmp_path / "recipe.yml", "-o", tmp_path / "out", "--store", tmp_path / "store")
    found, tables = (
        load_tensors(tmp_path / "out")[EMBED],
        {n: load_tensors(models / n)[EMBED] for n in ("base", "chat")},
    )
    for token, number in ids(tmp_path / "out").items():
        name, files = ("base", BASE) if token in ids(BASE) else ("chat", CHAT)
        assert torch.equal(found[number], tables[name][ids(files)[token]])
    assert_speaks(tmp_path / "out", TEXTS)


def test_what_models_disagree_on_is_told_by_plan_and_build(models: Path, tmp_path: Path) -> None:
    text = recipe(models, tmp_path, tokenizer_source="union")
    status, planned = run_cli("plan", text, "--store", tmp_path / "store")
    assert status == 0
    notes = " ".join(planned["notes"])
    assert "chat template: the output has none, as" in notes
    assert "eos token: the output has that of" in notes
    files = planned["stages"]["merge"]["files"]
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert build(text, "-o", tmp_path / "out", "--store", tmp_path / "store")["notes"] == planned["notes"]
    assert set(files) <= set(contents(tmp_path / "out"))


def test_mergekitty_takes_the_base_s_tokens_where_nothing_is_said(models: Path, tmp_path: Path) -> None:
    out, _ = merged(models, tmp_path, numerics="mergekitty-0.3")
    assert len(load_tensors(out)[EMBED]) == len(ids(BASE))
    assert read_files(out) == read_files(models / "base")


def test_a_union_of_threads_and_processes_is_the_same(models: Path, tmp_path: Path) -> None:
    text = recipe(models, tmp_path, tokenizer_source="union", weights=(0.25, 0.5))
    answers = [
        build(text, "-o", tmp_path / kind, "--store", tmp_path / f"store-{kind}", "--workers", kind, "--memory", memory)
        for kind, memory in (("threads", "4GB"), ("processes", "300MB"))
    ]
    assert answers[0]["stages"]["merge"]["manifest"] == answers[1]["stages"]["merge"]["manifest"]
