"""Laws of vocabularies: any models, any request. Every row by its definition; every text out as it went in."""

from __future__ import annotations

import json
from collections.abc import Mapping

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from kittybuild.model.recipe import ModelRef
from kittybuild.model.tokenizer import ModelToken, TokenizerRequest, TokenRule
from kittybuild.tokens.compare import compare, unequal
from kittybuild.tokens.outcome import Outcome, carry_out
from kittybuild.tokens.reading import read_vocabulary
from kittybuild.tokens.vocabulary import Vocabulary
from kittybuild.tokens.writing import TokenizerFiles
from tests.tokenizers import Document, Files, byte_fallback, byte_level, files_of, unigram, wordpiece

NAMES = ("base", "a", "b")
WORDS = st.lists(st.text("abĠ", min_size=2, max_size=4), max_size=4, unique=True)
ADDED = st.lists(st.sampled_from(["</s>", "<x>", "<y>", "<ab>", "ba", "[P]"]), max_size=4, unique=True)
TEXTS = st.lists(st.sampled_from([*"ab ü", "<x>", "<ab>", "ba", "bab", " aab", "</s>"]), max_size=12).map("".join)
Models = tuple[dict[ModelRef, Vocabulary], dict[ModelRef, Files]]
FEW = settings(max_examples=40)  # each loads some tokenizers


@st.composite
def tokenizers(draw: st.DrawFn) -> Document:
    """One tokenizer, of any kind."""
    words, added = draw(WORDS), draw(ADDED)
    kind = draw(st.sampled_from(["byte level", "byte level", "byte fallback", "wordpiece", "unigram"]))
    if kind == "byte level":
        return byte_level(words, added, hole=draw(st.sampled_from([0, 0, 3])) if not added else 0)
    plain = [word.replace("Ġ", "▁") for word in words]
    if kind == "byte fallback":
        return byte_fallback(plain, ["<unk>", *added])
    if kind == "wordpiece":
        return wordpiece([word.replace("▁", "##") for word in plain], ["[UNK]", *added])
    return unigram({word: -float(len(word)) for word in plain}, ["<unk>", *added])


@st.composite
def models(draw: st.DrawFn, least: int = 1) -> Models:
    """Some models with tables that are too short, exact, or filled up."""
    known, files = {}, {}
    for name in NAMES[: draw(st.integers(least, 3))]:
        ref, config = ModelRef(name), {"pad_token": "[PAD]"} if draw(st.booleans()) else {}
        files[ref] = files_of(draw(tokenizers()), config)
        vocabulary = read_vocabulary(files[ref], 0, name)
        assert vocabulary is not None
        found = read_vocabulary(files[ref], vocabulary.end + draw(st.sampled_from([-2, -1, 0, 0, 1, 5])), name)
        assert found is not None
        known[ref] = found
    return known, files


@st.composite
def requests(draw: st.DrawFn, known: Mapping[ModelRef, Vocabulary]) -> TokenizerRequest:
    """Any request that such models can fulfil."""
    refs = list(known)
    source = draw(st.sampled_from(["base", "union", "union", *refs]))
    rules = []
    for token in draw(st.lists(st.sampled_from(["a", "ab", "<x>", "<new>", "[PAD]", "Ġa"]), max_size=3, unique=True)):
        having = [ref for ref in refs if known[ref].row(token) >= 0]
        some = draw(st.sampled_from(refs))
        ways = ["zero", None, ModelToken(some, token_id=draw(st.integers(0, known[some].rows - 1)))]
        ways += having + [ModelToken(ref, token=token) for ref in having]
        rules.append(TokenRule(token, draw(st.sampled_from(ways)), draw(st.booleans())))
    return TokenizerRequest(source, tuple(rules), draw(st.sampled_from([None, None, 1, 8])))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Models, TokenizerRequest, ModelRef | None]:
    """Models, a request, and the base model or none."""
    known, files = draw(models())
    return (known, files), draw(requests(known)), draw(st.sampled_from([None, *known]))


def by_definition(
    model: ModelRef,
    row: int,
    made: Outcome,
    known: Mapping[ModelRef, Vocabulary],
    asked: TokenizerRequest,
    base: object,
) -> list[tuple[ModelRef, int]]:
    """What a row of a model's table is made of: the rules in the words of docs and of mergekit, for one row."""
    token, lead = made.vocabulary.tokens.get(row), known[made.lead]
    own = {
        ref: v.row(token) if token is not None else row if lead.spare(row) and v.spare(row) else -1
        for ref, v in known.items()
    }
    rule = next((rule for rule in asked.tokens if rule.token == token), TokenRule(""))
    if own[model] >= 0 and not rule.force:
        return [(model, own[model])]
    if rule.source == "zero":
        return []
    if isinstance(rule.source, ModelRef):
        return [(rule.source, known[rule.source].row(rule.token))]
    if isinstance(rule.source, ModelToken):
        number = rule.source.token_id
        there = known[rule.source.model].row(rule.source.token or "") if number is None else number
        return [(rule.source.model, there)]
    having = [(ref, place) for ref, place in own.items() if place >= 0]
    return [place for place in having if place[0] == base] or having


@FEW
@given(cases())
def test_every_row_is_by_definition(case: tuple[Models, TokenizerRequest, ModelRef | None]) -> None:
    (known, files), asked, base = case
    made = carry_out(asked, known, files, base)
    for ref, table in made.tables.items():
        rows = list(table.rows.rows())
        assert len(rows) + table.rows.means == made.rows == made.vocabulary.rows
        assert made.rows % (asked.pad_to_multiple_of or 1) == 0
        assert table.rows.means < (asked.pad_to_multiple_of or 1)
        for number, sources in enumerate(rows):
            found = [(table.models[place], row) for place, row in sources]
            assert found == by_definition(ref, number, made, known, asked, base)
            assert all(row < known[model].rows for model, row in found)


@FEW
@given(cases())
def test_the_lead_keeps_its_ids_and_every_row_has_a_place(
    case: tuple[Models, TokenizerRequest, ModelRef | None],
) -> None:
    (known, files), asked, base = case
    made = carry_out(asked, known, files, base)
    lead = known[made.lead]
    assert dict(list(made.vocabulary.ids.items())[: len(lead.ids)]) == lead.ids
    assert made.rows >= lead.rows
    if asked.source == "union":
        for vocabulary in known.values():
            assert all(made.vocabulary.row(t) >= 0 for t in vocabulary.ids if vocabulary.row(t) >= 0)
    if made.files["tokenizer.json"] == files[made.lead]["tokenizer.json"]:
        assert made.files == files[made.lead]
    again = read_vocabulary(made.files, made.rows, "again")
    assert again is not None
    # A role whose token would have taken another's id behind a hole is counted behind all that is written now.
    late = set(again.unlisted) - set(lead.unlisted)
    assert {token: number for token, number in again.ids.items() if token not in late} == made.vocabulary.ids


def loaded(files: Mapping[str, bytes]) -> Tokenizer:
    return Tokenizer.from_str(files["tokenizer.json"].decode())


def is_lossless(files: Mapping[str, bytes]) -> bool:
    """Bytes stand for what has no token: every text comes back."""
    model = json.loads(files["tokenizer.json"])["model"]
    return bool(model.get("byte_fallback")) or (model["type"] == "BPE" and "Ġ" in model["vocab"])


@FEW
@given(models(least=2), TEXTS)
def test_every_text_comes_back(case: Models, text: str) -> None:
    known, files = case
    made = carry_out(TokenizerRequest(), known, files, ModelRef("base"))
    new = loaded(made.files)
    ids = new.encode(text).ids
    assert all(number < max(made.rows, known[made.lead].end) for number in ids)
    if is_lossless(made.files):
        assert new.decode(ids, skip_special_tokens=False) == text


@FEW
@given(models(least=2), TEXTS)
def test_text_without_new_tokens_is_split_as_before(case: Models, text: str) -> None:
    known, files = case
    made = carry_out(TokenizerRequest(), known, files, ModelRef("base"))
    new = loaded(made.files).encode(text)
    if not any(token in new.tokens for token in made.vocabulary.ids if token not in known[made.lead].ids):
        assert new.ids == loaded(files[made.lead]).encode(text).ids


@FEW
@given(models(least=2))
def test_no_difference_means_that_tables_can_be_merged_as_they_are(case: Models) -> None:
    known, files = case
    base = ModelRef("base")
    for ref, vocabulary in known.items():
        made: Outcome = carry_out(TokenizerRequest("base"), {base: known[base], ref: vocabulary}, files, base)
        assert made.tables[base].whole
        if not compare(known[base], vocabulary):
            assert made.tables[ref].whole
        assert bool(compare(known[base], vocabulary)) == bool(unequal({"base": known[base], "x": vocabulary}, "base"))


@FEW
@given(models(least=2))
def test_doing_it_twice_changes_nothing_more(case: Models) -> None:
    """A union with its own parts is itself."""
    known, files = case
    base, done = ModelRef("base"), ModelRef("done")
    first = carry_out(TokenizerRequest(), known, files, base)
    more: TokenizerFiles = {done: first.files, **files}
    second = carry_out(TokenizerRequest(), {done: first.vocabulary, **known}, more, done)
    assert second.files == first.files
    assert second.tables[done].whole
