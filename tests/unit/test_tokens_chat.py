"""Chat templates: which one an output gets, where it stands, and what the named ones make of a conversation."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jinja2 import Environment
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kittybuild.errors import PlanError, SourceError
from kittybuild.model.recipe import At
from kittybuild.tokens.chat import chosen_template, read_template, syntax_problem, with_template
from kittybuild.tokens.templates import TEMPLATES

CONFIG, JINJA, PROCESSOR = "tokenizer_config.json", "chat_template.jinja", "chat_template.json"
ONE, TWO = "{{ messages[0]['content'] }} one", "{{ messages[0]['content'] }} two"
TALK = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": " Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Bye"},
]


def packed(**config: Any) -> bytes:
    return json.dumps(config).encode()


def rendered(name: str, messages: list[dict[str, str]], *, prompt: bool = True) -> str:
    """What transformers makes of a template: a sandbox, without the newlines behind tags."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    values = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": prompt}
    return environment.from_string(TEMPLATES[name]).render(messages=messages, **values)


EXPECTED = {
    "chatml": "<|im_start|>system\nBe brief. <|im_end|>\n<|im_start|>user\n Hello<|im_end|>\n"
    "<|im_start|>assistant\nHi!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHi!<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "alpaca": "Be brief.\n\n### Instruction:\nHello\n\n### Response:\nHi!</s>\n\n"
    "### Instruction:\nBye\n\n### Response:\n",
    "mistral": "<s>[INST] Be brief.\n\nHello [/INST] Hi!</s>[INST] Bye [/INST]",
    "exaone": "[|system|]Be brief. [|endofturn|]\n[|user|] Hello\n[|assistant|]Hi![|endofturn|]\n"
    "[|user|]Bye\n[|assistant|]",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_named_template_writes_its_format(name: str) -> None:
    assert rendered(name, TALK) == EXPECTED[name]
    assert syntax_problem(TEMPLATES[name]) is None
    assert EXPECTED[name].startswith(rendered(name, TALK, prompt=False))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_goes_on_where_it_stopped(name: str) -> None:
    """What was written stays as it is when more is said: a cache of the model's state stays good."""
    for end in range(1, len(TALK)):
        assert rendered(name, TALK).startswith(rendered(name, TALK[: end + 1], prompt=False))


def test_exaone_begins_with_a_system_turn() -> None:
    assert rendered("exaone", TALK[1:2], prompt=False) == "[|system|][|endofturn|]\n[|user|] Hello\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({CONFIG: packed(eos_token="</s>")}, None),
        ({CONFIG: packed(chat_template=ONE)}, ONE),
        (
            {CONFIG: packed(chat_template=[{"name": "tools", "template": TWO}, {"name": "default", "template": ONE}])},
            ONE,
        ),
        ({CONFIG: packed(chat_template={"default": ONE, "tools": TWO})}, ONE),
        ({CONFIG: packed(chat_template=[{"name": "tools", "template": TWO}])}, None),
        ({CONFIG: packed(chat_template=7)}, None),
        ({CONFIG: packed(chat_template=ONE), JINJA: TWO.encode()}, TWO),
        ({CONFIG: packed(chat_template=ONE), PROCESSOR: packed(chat_template=TWO)}, TWO),
    ],
)
def test_the_template_of_a_model(files: dict[str, bytes], expected: str | None) -> None:
    assert read_template(files, "model") == expected


def test_a_damaged_template_is_told() -> None:
    for files in ({JINJA: b"\xff"}, {CONFIG: b"{"}):
        with pytest.raises(SourceError) as caught:
            read_template(files, "model")
        assert caught.value.code == "KB240"


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        ({"a": None, "b": None}, None),
        ({"a": "", "b": " "}, None),
        ({"a": None, "b": ONE}, ONE),
        ({"a": ONE, "b": TWO, "c": TWO}, TWO),
        ({"a": ONE, "b": TWO}, ONE),
        ({"a": TWO, "b": ONE}, TWO),
        ({"a": ONE, "b": TWO, "c": f"\n{TWO}\n"}, TWO),
    ],
)
def test_auto_is_what_most_models_have(templates: dict[str, str | None], expected: str | None) -> None:
    assert chosen_template("auto", templates) == expected


def test_a_name_and_a_text() -> None:
    assert chosen_template("chatml", {"a": ONE}) == TEMPLATES["chatml"]
    assert chosen_template(TWO, {"a": ONE}) == TWO


@pytest.mark.parametrize(
    ("wish", "code", "message", "hint"),
    [
        ("chatlm", "KB334", "unknown chat_template 'chatlm'", "did you mean 'chatml'?"),
        ("none", "KB334", "unknown chat_template 'none'", "or write the Jinja text itself"),
        ("{{ messages ", "KB335", "is not Jinja: line 1:", "correct it there"),
        ("{% for m in messages %}\n{{ m }}\n", "KB335", "is not Jinja: line 2:", "correct it there"),
        ("{% magic %}", "KB335", "is not Jinja: line 1:", "correct it there"),
    ],
)
def test_what_is_no_template_is_told(wish: str, code: str, message: str, hint: str) -> None:
    with pytest.raises(PlanError) as caught:
        chosen_template(wish, {}, At("recipe.yml", 3, 4))
    assert (caught.value.code, caught.value.at) == (code, "recipe.yml:3:4")
    assert message in caught.value.message
    assert hint in str(caught.value.hint)


def test_the_tags_of_transformers_are_known() -> None:
    loop = "{% for m in messages %}{% if m %}{% continue %}{% endif %}{% endfor %}"
    assert syntax_problem(loop + "{% generation %}{{ messages }}{% endgeneration %}") is None
    assert syntax_problem("{% generation %}{{ m }}") is not None


def test_a_template_is_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise AssertionError("compiled")

    for name in ("compile", "from_string", "_generate"):
        monkeypatch.setattr(Environment, name, run)
    assert chosen_template("{{ ''.__class__.__mro__ }}{% set x = cycler.__init__() %}", {}) is not None


@pytest.mark.parametrize(
    ("files", "changed"),
    [
        ({CONFIG: packed(chat_template=ONE)}, {}),
        ({CONFIG: packed(chat_template=f"{ONE}\n")}, {}),
        ({}, {CONFIG: {"chat_template": ONE}}),
        ({CONFIG: packed(eos_token="x")}, {CONFIG: {"eos_token": "x", "chat_template": ONE}}),
        ({CONFIG: packed(chat_template=TWO)}, {CONFIG: {"chat_template": ONE}}),
        ({CONFIG: packed(a=1), JINJA: TWO.encode()}, {JINJA: ONE}),
        ({CONFIG: packed(chat_template=TWO), JINJA: TWO.encode()}, {JINJA: ONE, CONFIG: {"chat_template": ONE}}),
        ({PROCESSOR: packed(chat_template=TWO), CONFIG: packed(a=1)}, {PROCESSOR: {"chat_template": ONE}}),
        (
            {CONFIG: packed(chat_template=[{"name": "default", "template": TWO}, {"name": "rag", "template": TWO}])},
            {CONFIG: {"chat_template": [{"name": "default", "template": ONE}, {"name": "rag", "template": TWO}]}},
        ),
        (
            {CONFIG: packed(chat_template={"default": TWO, "rag": TWO})},
            {CONFIG: {"chat_template": {"default": ONE, "rag": TWO}}},
        ),
    ],
)
def test_a_template_stands_where_one_stood(files: dict[str, bytes], changed: dict[str, Any]) -> None:
    found = with_template(files, ONE, "model")
    assert {name: data.decode() if name == JINJA else json.loads(data) for name, data in found.items()} == changed
    assert str(read_template({**files, **found}, "model")).strip() == ONE
