"""The output's vocabulary, and where each row of its tables comes from."""

from __future__ import annotations

from typing import Any

import pytest

from kittybuild.errors import PlanError
from kittybuild.model.recipe import ModelRef
from kittybuild.model.rows import Sources
from kittybuild.model.tokenizer import ModelToken, TokenizerRequest, TokenRule
from kittybuild.tokens.align import align
from kittybuild.tokens.compare import compare, unequal
from kittybuild.tokens.outcome import Outcome, carry_out, read_all
from kittybuild.tokens.output import Output, output_vocabulary
from kittybuild.tokens.vocabulary import Vocabulary
from tests.tokenizers import by_ref, byte_level, files_of, vocabularies, wordpiece

BASE, A, B = ModelRef("base"), ModelRef("a"), ModelRef("b")
FILES = {
    "base": files_of(byte_level(["Ġthe"], ["</s>", "<b>"]), {"eos_token": "</s>"}),
    "a": files_of(byte_level(["Ġthe", "in"], ["</s>", "<im>", "<ab>"]), {"eos_token": "</s>"}),
    "b": files_of(byte_level(["ing", "Ġthe"], ["</s>", "<ab>", "xy"]), {"eos_token": "</s>"}),
}
Made = dict[str, Sources]


def asked(source: Any = "union", *rules: TokenRule, pad: int | None = None) -> TokenizerRequest:
    return TokenizerRequest(source, rules, pad)


def named(request: TokenizerRequest, models: dict[ModelRef, Vocabulary], base: ModelRef | None = BASE) -> Output:
    return output_vocabulary(request, models, base)


def row(outcome: Outcome, model: ModelRef, token: str | int) -> set[tuple[str, int]]:
    """What a row of a model's table is made of, by the names of the models."""
    gathered = outcome.tables[model]
    number = token if isinstance(token, int) else outcome.vocabulary.ids[token]
    made = list(gathered.rows.rows())[number]
    return {(str(gathered.models[place]), row) for place, row in made}


def made(request: TokenizerRequest, base: ModelRef | None = BASE, rows: dict[str, int] | None = None) -> Outcome:
    return carry_out(request, vocabularies(rows, **FILES), by_ref(**FILES), base)


MODELS = vocabularies(**FILES)


def own(model: str, token: str) -> tuple[str, int]:
    return model, MODELS[ModelRef(model)].ids[token]


# ---- whose tokens


def test_a_union_begins_with_the_base_and_goes_on_in_the_order_of_the_recipe() -> None:
    found = named(asked(), MODELS)
    end = MODELS[BASE].end
    assert found.lead == BASE
    assert dict(list(found.vocabulary.ids.items())[:end]) == MODELS[BASE].ids
    assert list(found.vocabulary.ids.items())[end:] == [
        ("in", end),
        ("<im>", end + 1),
        ("<ab>", end + 2),
        ("ing", end + 3),
        ("xy", end + 4),
    ]
    assert found.new == {"in": A, "<im>": A, "<ab>": A, "ing": B, "xy": B}
    turned = {ref: MODELS[ref] for ref in (B, BASE, A)}
    assert list(named(asked(), turned).new) == ["in", "ing", "<ab>", "xy", "<im>"]
    assert list(named(asked(), turned, None).vocabulary.ids)[: MODELS[B].end] == list(MODELS[B].ids)


def test_an_added_token_stays_one_and_a_plain_one_plain() -> None:
    found = named(asked(), MODELS).vocabulary
    assert set(found.added) == {"</s>", "<b>", "<im>", "<ab>", "xy"}
    assert found.added["<im>"].special
    assert not found.added["xy"].special


def test_the_base_the_model_that_is_named_and_the_first() -> None:
    assert named(asked("base"), MODELS).vocabulary == MODELS[BASE]
    assert named(asked("base"), MODELS, None).vocabulary == MODELS[BASE]  # the first
    assert named(asked(B), MODELS) == Output(B, MODELS[B], {})
    elsewhere = ModelRef("elsewhere")
    assert named(asked("base"), MODELS, elsewhere).lead == BASE


def test_new_tokens_take_up_the_fillers_before_the_table_grows() -> None:
    end = MODELS[BASE].end
    for rows, wanted in ((end + 2, end + 5), (end + 5, end + 5), (end + 40, end + 40)):
        models = vocabularies({"base": rows}, **FILES)
        assert named(asked(), models).vocabulary.rows == wanted
    assert output_vocabulary(asked(), models, BASE, fillers=False).vocabulary.rows == end + 5
    assert output_vocabulary(asked("base"), models, BASE, fillers=False).vocabulary.rows == end
    assert named(asked("base"), models).vocabulary.rows == end + 40


def test_tokens_without_a_row_in_their_own_model_are_not_taken() -> None:
    models = vocabularies({"a": MODELS[A].ids["<ab>"], "b": MODELS[B].ids["<ab>"]}, **FILES)
    assert "<ab>" not in named(asked(), models).vocabulary.ids
    assert "<im>" in named(asked(), models).vocabulary.ids


def test_a_token_of_the_base_without_a_row_gets_one_where_another_model_has_it() -> None:
    """A pad token that only tokenizer_config.json names, with a row in a fine-tune."""
    files = {
        "base": files_of(byte_level(["Ġthe"], ["</s>"]), {"pad_token": "<pad>"}),
        "a": files_of(byte_level(["Ġthe"], ["</s>", "<im>", "<pad>"])),
    }
    models = vocabularies({"base": 260}, **files)
    assert models[BASE].row("<pad>") == -1
    outcome = carry_out(asked(), models, by_ref(**files), BASE)
    assert outcome.vocabulary.ids["<pad>"] == 260
    assert outcome.vocabulary.ids["<im>"] == 261
    assert row(outcome, BASE, "<pad>") == {("a", models[A].ids["<pad>"])}
    assert carry_out(asked("base"), models, by_ref(**files), BASE).rows == 260


def test_a_rule_brings_a_token_that_the_vocabulary_lacks() -> None:
    rules = (TokenRule("<im>", A), TokenRule("in", A), TokenRule("<new>", "zero"))
    found = named(asked("base", *rules), MODELS)
    assert list(found.new.items()) == [("<im>", A), ("in", A), ("<new>", None)]
    assert found.vocabulary.added["<im>"].special
    assert found.vocabulary.added["in"].content == "in"  # plain in its model: here it is found as it stands


# ---- where rows come from


def test_a_model_keeps_its_own_rows_and_the_base_fills_in() -> None:
    outcome = made(asked())
    for token in ("Ġthe", "</s>", "a"):
        for model in (BASE, A, B):
            assert row(outcome, model, token) == {own(str(model), token)}
    for model in (BASE, A, B):
        assert row(outcome, model, "<b>") == {own("base", "<b>")}  # the only one that has it
        assert row(outcome, model, "<im>") == {own("a", "<im>")}
    assert row(outcome, BASE, "in") == {own("a", "in"), own("b", "in")}  # the average of those that have it
    assert row(outcome, BASE, "<ab>") == {own("a", "<ab>"), own("b", "<ab>")}
    assert row(outcome, A, "<ab>") == {own("a", "<ab>")}


def test_averages_are_in_the_order_of_the_recipe() -> None:
    gathered = made(asked()).tables[BASE]
    assert [str(ref) for ref in gathered.models] == ["base", "a", "b"]
    averages = [sources for sources in gathered.rows.rows() if len(sources) > 1]
    assert averages == [((1, MODELS[A].ids[token]), (2, MODELS[B].ids[token])) for token in ("in", "<ab>")]


def test_without_a_base_model_the_first_is_one_among_the_others() -> None:
    outcome = made(asked("base"), base=None)
    assert outcome.lead == BASE
    files = {**FILES, "c": files_of(byte_level([], ["</s>"]))}
    outcome = carry_out(asked("base"), vocabularies(**files), by_ref(**files), None)
    where = {(name, MODELS[ModelRef(name)].ids["Ġthe"]) for name in ("base", "a", "b")}
    assert row(outcome, ModelRef("c"), "Ġthe") == where
    outcome = carry_out(asked("base"), vocabularies(**files), by_ref(**files), A)
    assert row(outcome, ModelRef("c"), "Ġthe") == {own("a", "Ġthe")}


def test_rules() -> None:
    rules = (
        TokenRule("<b>", ModelToken(A, token="<im>"), force=True),
        TokenRule("Ġthe", ModelToken(A, token_id=3)),
        TokenRule("Ġth", "zero", force=True),
        TokenRule("</s>", B, force=True),
        TokenRule("in", B),
        TokenRule("<ab>", force=True),
        TokenRule("<new>"),
        TokenRule("<other>", ModelToken(B, token="xy")),
    )
    outcome = made(asked("union", *rules))
    for model in (BASE, A, B):
        assert row(outcome, model, "<b>") == {own("a", "<im>")}
        assert row(outcome, model, "Ġthe") == {own(str(model), "Ġthe")}  # has its own, and nothing is forced
        assert row(outcome, model, "Ġth") == set()
        assert row(outcome, model, "</s>") == {own("b", "</s>")}
        assert row(outcome, model, "<ab>") == {own("a", "<ab>"), own("b", "<ab>")}
        assert row(outcome, model, "<new>") == set()  # no model has it
        assert row(outcome, model, "<other>") == {own("b", "xy")}
    assert row(outcome, BASE, "in") == {own("b", "in")}
    assert row(outcome, A, "in") == {own("a", "in")}


def test_fillers_and_holes_are_kept() -> None:
    """Rows 256 to 260 are a hole of the base; it has fillers, and so has a model of another size."""
    hollow = files_of(byte_level(["Ġthe"], hole=5))
    files = {"base": hollow, "a": hollow, "b": files_of(byte_level(["Ġthe"]))}
    outcome = carry_out(asked("base"), vocabularies({"base": 280, "a": 270, "b": 300}, **files), by_ref(**files), BASE)
    assert outcome.rows == 280
    assert outcome.tables[BASE].whole
    for number in (256, 260, 264, 269):
        assert row(outcome, A, number) == {("a", number)}
    for number in (270, 279):
        assert row(outcome, A, number) == {("base", number)}  # beyond its table
    assert row(outcome, B, 257) == {("base", 257)}  # a token's row there
    assert row(outcome, B, 270) == {("b", 270)}


def test_a_union_leaves_holes_as_they_are() -> None:
    hollow = byte_level(["Ġthe"], hole=5)
    files = {**FILES, "base": files_of(hollow)}
    outcome = carry_out(asked(), vocabularies({"base": 266}, **files), by_ref(**files), BASE)
    new = [token for token in outcome.vocabulary.ids if token not in hollow["model"]["vocab"]]
    assert [outcome.vocabulary.ids[token] for token in new] == list(range(264, 270))
    assert row(outcome, BASE, 258) == row(outcome, A, 258) == {("base", 258)}
    assert outcome.rows == 270


def test_rounding_up_adds_means() -> None:
    end = MODELS[BASE].end
    outcome = made(asked("base", pad=16))
    assert (outcome.rows, outcome.vocabulary.rows) == (272, 272)
    assert all(gathered.rows.means == 272 - end and gathered.rows.count == 272 for gathered in outcome.tables.values())
    assert not outcome.tables[BASE].whole
    assert made(asked("base", pad=end)).tables[BASE].whole


def test_equal_vocabularies_are_taken_whole() -> None:
    files = {"base": FILES["base"], "a": FILES["base"]}
    for source in ("base", "union", "truncate", A):
        outcome = carry_out(asked(source), vocabularies(**files), by_ref(**files), BASE)
        assert all(gathered.whole and gathered.models == (ref,) for ref, gathered in outcome.tables.items())


def test_truncate_goes_row_by_row() -> None:
    outcome = made(asked("truncate"), rows={"a": 262, "b": 300})
    end = MODELS[BASE].end
    assert (outcome.rows, outcome.lead) == (min(end, 262), BASE)
    assert outcome.tables[BASE].whole
    assert str(outcome.tables[B].rows) == f"{outcome.rows}:0.0"
    assert outcome.files == FILES["base"]


def test_truncate_needs_a_tokenizer_that_fits() -> None:
    with pytest.raises(PlanError, match="too few for '</s>' and others of base") as caught:
        made(asked("truncate"), rows={"a": 259})
    assert caught.value.code == "KB331"
    assert caught.value.hint == "`tokenizer_source: a` takes the tokens of a"


# ---- what is refused, and what is said


@pytest.mark.parametrize(
    ("request_", "message", "hint"),
    [
        (asked(ModelRef("c")), "c is not merged here", "gives its tokenizer: did you mean|known: a, b, base"),
        (asked("base", TokenRule("<b>", ModelRef("bose"))), "from bose, which is not merged", "did you mean 'base'"),
        (asked("base", TokenRule("<b>", A)), "the token a: '<b>', which is not there", "name a token"),
        (asked("base", TokenRule("<b>", ModelToken(A, token="no"))), "token a: 'no', which is not", "name a token"),
        (asked("base", TokenRule("<b>", ModelToken(A, token_id=9999))), "token a: 9999, which is not", "has 26"),
        (asked("base", TokenRule("<b>", ModelToken(A, token_id=-1))), "token a: -1, which is not", "has 26"),
        (asked("base", TokenRule("")), "a token is empty", "write"),
    ],
)
def test_what_a_request_names_must_be_there(request_: TokenizerRequest, message: str, hint: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        named(request_, MODELS)
    assert caught.value.code == "KB331"
    assert any(part in str(caught.value.hint) for part in hint.split("|"))


def test_requests_are_valid_by_construction() -> None:
    for wrong in (
        lambda: asked(pad=0),
        lambda: asked("base", TokenRule("x"), TokenRule("x", A)),
        lambda: asked("truncate", pad=8),
        lambda: asked("truncate", TokenRule("x")),
        lambda: ModelToken(A),
        lambda: ModelToken(A, "x", 3),
    ):
        with pytest.raises(ValueError, match=r"."):
            wrong()


def test_vocabularies_are_compared_by_their_rows() -> None:
    assert not compare(MODELS[BASE], MODELS[BASE])
    assert not compare(*vocabularies(base=FILES["base"], a=files_of(byte_level(["Ġthe"], ["</s>", "<b>"]))).values())
    unrowed = vocabularies(base=FILES["base"], a=files_of(byte_level(["Ġthe"], ["</s>", "<b>"]), {"pad_token": "<p>"}))
    shorter = vocabularies({"a": MODELS[BASE].end}, **{str(ref): FILES["base"] for ref in unrowed})
    assert not compare(*shorter.values())
    found = compare(MODELS[BASE], MODELS[A])
    assert (found.lost, found.more) == (("<b>",), ("in", "<im>", "<ab>"))
    assert found.moved == ("</s>",)
    assert found.rows == (MODELS[BASE].rows, MODELS[A].rows)


def test_the_error_shows_what_differs_and_the_ways_out() -> None:
    assert unequal({"base": MODELS[BASE], "copy": MODELS[BASE]}, "base") is None
    error = unequal({str(ref): vocabulary for ref, vocabulary in MODELS.items()}, "base", at="recipe.yml:3:1")
    assert (
        str(error)
        == """\
recipe.yml:3:1: KB330: the vocabularies of the models differ from that of base:
  a has 263 rows instead of 261
  a has 3 tokens more: 259 'in', 261 '<im>', 262 '<ab>'
  a lacks 1 token: 260 '<b>'
  a has other ids for 1 token: '</s>' 260 instead of 259
  b has 264 rows instead of 261
  b has 4 tokens more: 256 'in', 257 'ing', 262 '<ab>', 263 'xy'
  b lacks 1 token: 260 '<b>'
  b has other ids for 4 tokens: 'Ġt' 258 instead of 256, 'Ġth' 259 instead of 257, 'Ġthe' 260 instead of 258, \
'</s>' 261 instead of 259
  hint: say what the output's tokens are, with one of these lines:
    tokenizer_source: base      # the 261 tokens of base, each with its own rows
    tokenizer_source: union     # the 266 tokens of all, and where a model lacks one, a row of those that have it
    tokenizer_source: truncate  # the first 261 rows of each, row by row, whatever their tokens"""
    )


def test_a_model_without_a_tokenizer_is_taken_to_have_the_bases() -> None:
    files = {BASE: FILES["base"], A: {"tokenizer_config.json": b"{}"}}
    found, notes = read_all(files, {BASE: 261, A: 261}, BASE)
    assert found[A] == found[BASE]
    assert notes == ("a has no tokenizer: its rows are taken to stand for the tokens of base",)
    with pytest.raises(PlanError, match="a has no tokenizer, and 300 rows where base has 261") as caught:
        read_all(files, {BASE: 261, A: 300}, BASE)
    assert caught.value.code == "KB332"
    assert read_all(files, {BASE: 261, A: 300}, BASE, by_row=True)[0][A].rows == 300
    assert read_all({A: {}}, {A: 3}, None) == ({}, ())


def test_kinds_may_be_mixed() -> None:
    """Rows are aligned by the tokens' texts; what a foreign tokenizer calls a token need not be a text here."""
    files = {"base": files_of(wordpiece(["the"])), "a": FILES["a"]}
    outcome = carry_out(asked(), vocabularies(**files), by_ref(**files), BASE)
    assert row(outcome, A, "the") == row(outcome, BASE, "the")
    assert row(outcome, BASE, "<im>") == {own("a", "<im>")}
    assert align(asked(), named(asked(), vocabularies(**files)), vocabularies(**files), BASE) == outcome.tables
