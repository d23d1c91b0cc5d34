"""The tokenizer files that come out: the same bytes where nothing is new, else ones that split text as they must."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from kittybuild.errors import PlanError, SourceError
from kittybuild.model.recipe import ModelRef
from kittybuild.model.tokenizer import ModelToken, TokenizerRequest, TokenRule
from kittybuild.tokens.check import SAMPLE, check_change
from kittybuild.tokens.outcome import Outcome, carry_out
from kittybuild.tokens.output import output_vocabulary
from kittybuild.tokens.reading import read_vocabulary
from tests.tokenizers import (
    Document,
    Files,
    added_entry,
    bpe_model,
    by_ref,
    byte_fallback,
    byte_level,
    files_of,
    sentencepiece,
    tokenizer,
    unigram,
    vocabularies,
    word_level,
    wordpiece,
    write_files,
)

BASE = ModelRef("base")
ROOT = Path(__file__).parents[2]


def union(*rules: TokenRule, source: Any = "union", rows: dict[str, int] | None = None, **models: Files) -> Outcome:
    return carry_out(TokenizerRequest(source, rules), vocabularies(rows, **models), by_ref(**models), BASE)


def loaded(files: Any) -> Tokenizer:
    return Tokenizer.from_str(files["tokenizer.json"].decode())


def tokens(files: Any, text: str) -> list[str]:
    return list(loaded(files).encode(text).tokens)


def document(files: Any) -> Document:
    return dict(json.loads(files["tokenizer.json"]))


EXTRA = {"vocab.json": b"{}", "merges.txt": b"#version: 0.2\n", "tokenizer.model": b"spm", "added_tokens.json": b"{}"}


def test_without_new_tokens_every_byte_is_the_leads() -> None:
    odd = {**files_of(byte_level(["Ġthe"], ["</s>"])), **EXTRA}
    odd["tokenizer.json"] = odd["tokenizer.json"].replace(b'"version"', b' "version"  ') + b"\n\n"
    other = files_of(byte_level(["Ġthe"], ["<x>", "</s>"]))
    for source in ("base", "truncate", BASE):
        outcome = union(base=odd, a=other, source=source, rows={"base": 260, "a": 260})
        assert outcome.files == odd
        assert outcome.notes == ()
    assert union(base=odd, a=odd).files == odd
    assert union(base=odd, a=other, source=ModelRef("a")).files == other


def test_new_added_tokens_are_appended_and_nothing_else_changes() -> None:
    config = {"added_tokens_decoder": {"259": added_entry("</s>", 0)}, "eos_token": "</s>"}
    base = {**files_of(byte_level(["Ġthe"], ["</s>"]), config), **EXTRA}
    fine = files_of(byte_level(["Ġthe"], ["</s>", "<im>", "<ab>"]))
    outcome = union(base=base, a=fine)
    before, after = document(base), document(outcome.files)
    assert after["added_tokens"] == [*before["added_tokens"], added_entry("<im>", 260), added_entry("<ab>", 261)]
    assert {**after, "added_tokens": 0} == {**before, "added_tokens": 0}
    assert list(after) == list(before)
    written = json.loads(outcome.files["tokenizer_config.json"])
    assert list(written["added_tokens_decoder"]) == ["259", "260", "261"]
    assert written["added_tokens_decoder"]["260"]["content"] == "<im>"
    assert json.loads(outcome.files["added_tokens.json"]) == {"<im>": 260, "<ab>": 261}
    same = set(base) - {"tokenizer.json", "tokenizer_config.json", "added_tokens.json"}
    assert {name: outcome.files[name] for name in same} == {name: base[name] for name in same}
    assert outcome.notes == ()


def test_text_with_added_tokens_of_every_model_is_split_at_them() -> None:
    base = files_of(byte_level(["Ġthe"], ["</s>", "<b>"]))
    outcome = union(base=base, a=files_of(byte_level(["Ġthe"], ["<im>"])), b=files_of(byte_level([], ["<ab>", "xy"])))
    assert tokens(outcome.files, "a the<im>b<ab><b>xxy</s>") == [
        *("a", "Ġthe", "<im>", "b", "<ab>", "<b>", "x", "xy", "</s>"),
    ]
    for text in SAMPLE:
        assert loaded(outcome.files).encode(text).ids == loaded(base).encode(text).ids


def test_the_merges_of_a_plain_token_come_with_it() -> None:
    base = files_of(byte_level(["Ġthe", "in"], ["</s>"]))
    outcome = union(base=base, a=files_of(byte_level(["Ġthe", "ing", "Ġcat"], ["</s>"])))
    assert tokens(outcome.files, "the sing cat</s>") == ["t", "h", "e", "Ġ", "s", "ing", "Ġcat", "</s>"]
    assert document(outcome.files)["model"]["merges"][-4:] == [["in", "g"], ["Ġ", "c"], ["Ġc", "a"], ["Ġca", "t"]]
    assert loaded(outcome.files).decode(loaded(outcome.files).encode(SAMPLE[0]).ids) == SAMPLE[0]
    assert outcome.notes == ()


def test_a_vocabulary_that_was_extended_before_is_its_own_union() -> None:
    """What a model with more words makes of a text, the union makes of it, too: same tokens, same ids."""
    words = ["Ġthe", "in"]
    base, more = files_of(byte_level(words)), files_of(byte_level([*words, "ing", "Ġthere"]))
    outcome = union(base=base, a=more)
    assert outcome.vocabulary.ids == vocabularies(a=more)[ModelRef("a")].ids
    for text in (*SAMPLE, "there is nothing in the thing"):
        assert loaded(outcome.files).encode(text).ids == loaded(more).encode(text).ids


def test_a_plain_token_is_no_added_one() -> None:
    """Found as it stands, it would cut words in two that the base knows."""
    base = files_of(byte_level(["Ġthe", "ther"]))
    outcome = union(base=base, a=files_of(byte_level(["he"])))
    assert tokens(outcome.files, "ther he") == ["ther", "Ġ", "he"]
    assert document(outcome.files)["added_tokens"] == []


def test_a_token_that_no_merge_makes_is_told() -> None:
    wordy = byte_level(["Ġthe"])
    wordy["model"]["vocab"]["Ġlonely"] = 400
    outcome = union(base=files_of(byte_level(["Ġthe"])), a=files_of(wordy))
    assert outcome.notes == ("no text becomes 'Ġlonely': no merges make them",)
    assert tokens(outcome.files, " lonely") == [*("Ġ", "l", "o", "n", "e", "l", "y")]
    assert loaded(outcome.files).decode([outcome.vocabulary.ids["Ġlonely"]]) == " lonely"
    direct = byte_level(["Ġthe"])
    direct["model"]["ignore_merges"] = True
    outcome = union(base=files_of(direct), a=files_of(wordy))
    assert outcome.notes == ()
    assert tokens(outcome.files, " lonely") == ["Ġlonely"]


def test_merges_keep_the_form_that_they_have() -> None:
    old = byte_level(["Ġthe"])
    old["model"]["merges"] = [" ".join(pair) for pair in old["model"]["merges"]]
    outcome = union(base=files_of(old), a=files_of(byte_level(["in"])))
    assert document(outcome.files)["model"]["merges"] == ["Ġ t", "Ġt h", "Ġth e", "i n"]
    spaced = tokenizer(bpe_model({"a": 0, " ": 1, "a ": 2}, [["a", " "]]), ())
    outcome = union(base=files_of(old), a=files_of(spaced))
    assert document(outcome.files)["model"]["merges"] == [["Ġ", "t"], ["Ġt", "h"], ["Ġth", "e"], ["a", " "]]


def test_ids_that_counting_would_not_give_are_listed() -> None:
    """Behind a hole, a loader would count an added token onto the id of another."""
    hollow = byte_level(["Ġthe"], hole=3)
    outcome = union(base=files_of(hollow), a=files_of(byte_level([], ["<im>"])))
    assert loaded(outcome.files).get_vocab() == dict(outcome.vocabulary.ids)
    assert outcome.vocabulary.ids["<im>"] == 262
    assert document(outcome.files)["model"]["vocab"]["<im>"] == 262


def test_tokens_that_only_other_files_name_are_written_down() -> None:
    base = files_of(byte_level([], ["</s>"]), {"pad_token": "<pad>"})
    outcome = union(base=base, a=files_of(byte_level([], ["</s>", "<im>"])))
    assert [entry["content"] for entry in document(outcome.files)["added_tokens"]] == ["</s>", "<pad>", "<im>"]
    assert loaded(outcome.files).token_to_id("<pad>") == 257
    assert outcome.files["tokenizer_config.json"] == base["tokenizer_config.json"]


def test_byte_fallback() -> None:
    base = files_of(byte_fallback(["▁the", "in"]))
    fine = byte_fallback(["▁the", "in", "ing", "▁cat"], ["<unk>", "<s>", "</s>", "<im>"])
    outcome = union(base=base, a=files_of(fine))
    assert tokens(outcome.files, " the<im> cat sing ü") == [
        *("▁the", "<im>", "▁cat", "▁", "<0x73>", "ing", "▁", "<0xC3>", "<0xBC>"),
    ]
    new = loaded(outcome.files)
    for text in SAMPLE:
        assert new.decode(new.encode(text).ids) == text


def test_wordpiece_and_word_level_take_plain_tokens_as_they_are() -> None:
    outcome = union(
        base=files_of(wordpiece(["the"])), a=files_of(wordpiece(["thing", "##ing"], ["[PAD]", "[UNK]", "[X]"]))
    )
    assert tokens(outcome.files, "the thing sing [X]") == ["the", "thing", "s", "##ing", "[X]"]
    outcome = union(base=files_of(word_level(["the"])), a=files_of(word_level(["cat"])))
    assert tokens(outcome.files, "the cat sat") == ["the", "cat", "<unk>"]


def test_unigram_pieces_bring_their_scores() -> None:
    base = files_of(unigram({"▁the": -3.0, "in": -4.0}, ["<unk>", "</s>"]))
    more = unigram({"▁the": -1.0, "ing": -5.0, "tin": -90.0}, ["<unk>", "</s>", "<im>"])
    outcome = union(base=base, a=files_of(more))
    vocab = dict(document(outcome.files)["model"]["vocab"])
    assert (vocab["▁the"], vocab["ing"], vocab["tin"], vocab["<im>"]) == (-3.0, -5.0, -90.0, -10.0)
    assert tokens(outcome.files, "the sting<im>") == ["▁the", "▁", "s", "t", "ing", "<im>"]
    for text in ("the thin cat", "in"):
        assert loaded(outcome.files).encode(text).tokens == loaded(base).encode(text).tokens


def test_added_tokens_behind_the_pieces_of_a_unigram_model() -> None:
    document_ = unigram({"▁the": -3.0}, ["<unk>"])
    document_["added_tokens"].append(added_entry("<mask>", len(document_["model"]["vocab"])))
    outcome = union(base=files_of(document_), a=files_of(unigram({"ing": -2.0}, ["<unk>", "<im>"])))
    assert loaded(outcome.files).get_vocab() == dict(outcome.vocabulary.ids)
    assert tokens(outcome.files, "the<mask>ing") == ["▁the", "<mask>", "▁", "ing"]


def test_files_that_cannot_list_plain_tokens_are_left_out_and_told() -> None:
    base = {**files_of(byte_level(["Ġthe"])), **EXTRA, "vocab.txt": b""}
    outcome = union(base=base, a=files_of(byte_level(["in"])))
    assert set(outcome.files) == {"tokenizer.json", "tokenizer_config.json", "added_tokens.json"}
    assert outcome.notes == (
        "without vocab.json, merges.txt, vocab.txt, tokenizer.model, which would lack tokens: "
        "tokenizer.json has them all",
    )


def test_a_token_of_the_recipe_is_found_as_it_stands() -> None:
    base = files_of(byte_level(["Ġthe"], ["</s>"]))
    rules = (TokenRule("<|new|>", ModelToken(BASE, token="</s>")), TokenRule("in", ModelRef("a")))
    outcome = union(*rules, source="base", base=base, a=files_of(byte_level(["in"])))
    assert tokens(outcome.files, "win<|new|>") == ["w", "in", "<|new|>"]
    assert loaded(outcome.files).decode(loaded(outcome.files).encode("win<|new|>").ids) == "win<|new|>"


def test_a_tokenizer_without_tokenizer_json_cannot_grow() -> None:
    slow = {"tokenizer.model": sentencepiece([("<unk>", 2), ("a", 1)])}
    fine = files_of(byte_level([], ["<im>"]))
    with pytest.raises(PlanError, match=r"base has no tokenizer\.json that 256 tokens could be added to") as caught:
        union(base=slow, a=fine)
    assert caught.value.code == "KB332"
    assert union(base=slow, a=fine, source="base").files == slow
    outcome = union(base=fine, a=slow)
    assert outcome.notes == ()
    assert tokens(outcome.files, "a<unk>") == ["a", "<unk>"]


@pytest.mark.parametrize(
    "merges", [["a b c"], [["a"]], [7], "ab", None, [["a", 7]]], ids=["three", "one", "number", "text", "none", "mixed"]
)
def test_merges_that_are_none_are_told(merges: Any) -> None:
    other = byte_level(["in"])
    other["model"]["merges"] = merges
    files = {"base": files_of(byte_level(["Ġthe"])), "a": files_of(other)}
    with pytest.raises(SourceError) as caught:
        union(**files)
    assert (caught.value.code, caught.value.at) == ("KB240", "a: tokenizer.json")


def test_a_change_that_changed_more_is_noticed() -> None:
    base, fine = files_of(byte_level(["Ġthe"])), files_of(byte_level([], ["<im>"]))
    request, models = TokenizerRequest(), vocabularies(base=base, a=fine)
    output = output_vocabulary(request, models, BASE)
    good = union(base=base, a=fine).files
    check_change(output, base, good)

    def altered(**parts: Any) -> Files:
        return {"tokenizer.json": json.dumps({**document(good), **parts}).encode()}

    lost = {**document(good)["model"], "merges": []}
    moved = {**document(good)["model"], "vocab": {**document(good)["model"]["vocab"], "Ġthe": 999}}
    for wrong, message in (
        (altered(model=lost), "was .* and is"),
        (altered(model=moved), "the token 'Ġthe' has the id 999, not 258"),
        (altered(added_tokens=[]), "the token '<im>' has the id None, not 259"),
        (altered(normalizer={"type": "Lowercase"}), "was .* and is"),
        (altered(added_tokens=[added_entry("<im>", 259, single_word=True)], pre_tokenizer=None), "was .* and is"),
        (altered(decoder=7), "not a tokenizer"),
    ):
        with pytest.raises(PlanError, match=message) as caught:
            check_change(output, base, wrong)
        assert caught.value.code == "KB333"


def test_transformers_reads_what_was_written(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = files_of(byte_level(["Ġthe"], ["</s>"]), {"eos_token": "</s>", "pad_token": "<pad>"})
    config = {"eos_token": "<im>", "added_tokens_decoder": {"256": added_entry("<im>", 0)}}
    outcome = union(base=base, a=files_of(byte_level(["in"], ["<im>"]), config))
    found = AutoTokenizer.from_pretrained(write_files(tmp_path / "out", outcome.files))
    assert found.get_vocab() == dict(outcome.vocabulary.ids)
    assert (found.eos_token, found.pad_token) == ("</s>", "<pad>")
    text = "the win<im> in"
    assert found.convert_ids_to_tokens(found.encode(text)) == [*("t", "h", "e", "Ġ", "w", "in", "<im>", "Ġ", "in")]
    assert found.decode(found.encode(text)) == text
    again = read_vocabulary(outcome.files, outcome.rows, "out")
    assert again is not None
    assert again.ids == outcome.vocabulary.ids


PROGRAM = """
import hashlib
from tests.unit.test_tokens_writing import union, files_of, byte_level
models = {name: files_of(byte_level(words, added)) for name, words, added in (
    ("base", ["Ġthe"], ["</s>", "<b>"]),
    ("a", ["Ġcat", "ing", "Ġdog"], ["<x>", "<y>", "</s>", "<z>"]),
    ("b", ["Ġdog", "thing", "Ġowl"], ["<z>", "<u>", "<v>", "</s>"]),
)}
made = union(**models)
digest = hashlib.sha256()
for name, data in sorted(made.files.items()):
    digest.update(name.encode() + data)
for ref, table in made.tables.items():
    digest.update(f"{ref} {table.models} {table.rows}".encode())
print(digest.hexdigest())
"""


def test_nothing_depends_on_the_order_of_a_set() -> None:
    def run(seed: int) -> str:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            env={"PYTHONHASHSEED": str(seed), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run(1) == run(2) == run(3)
