"""The chat template of the output: the models' own, a named one, or a text; and the files that it stands in.

A template is only ever parsed here, for its syntax. It is never rendered: it is a program of somebody else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kittybuild.errors import PlanError, SourceError, nearest
from kittybuild.model.recipe import At
from kittybuild.tokens.reading import CONFIG, document
from kittybuild.tokens.templates import TEMPLATES

JINJA = "chat_template.jinja"
PROCESSOR = "chat_template.json"
FILES = (JINJA, PROCESSOR, CONFIG)
"""Where templates stand: in a file of their own, which loaders prefer, or as a key of two others."""
AUTO = "auto"
_KEY = "chat_template"


def read_template(files: Mapping[str, bytes], where: str) -> str | None:
    """The chat template of a model, as a loader would find it; of several, the one named `default`.

    Raises SourceError KB240 for damaged files.
    """
    if JINJA in files:
        try:
            return files[JINJA].decode()
        except UnicodeDecodeError as error:
            hint = "download or copy it again"
            raise SourceError("KB240", f"not UTF-8: {error}", at=f"{where}: {JINJA}", hint=hint) from error
    for name in (PROCESSOR, CONFIG):
        found = _default(document(files, name, where).get(_KEY))
        if found is not None:
            return found
    return None


def _default(value: Any) -> str | None:
    """A template, or the default one of a list or mapping of templates."""
    if isinstance(value, list):
        entries = [entry for entry in value if isinstance(entry, dict) and entry.get("name") == "default"]
        value = entries[0].get("template") if entries else None
    elif isinstance(value, dict):
        value = value.get("default")
    return value if isinstance(value, str) else None


def _with_default(value: Any, template: str) -> Any:
    """The same template, list or mapping with another default one."""
    if isinstance(value, list):
        others = [entry for entry in value if not isinstance(entry, dict) or entry.get("name") != "default"]
        return [{"name": "default", "template": template}, *others]
    return {**value, "default": template} if isinstance(value, dict) else template


def chosen_template(wish: str, templates: Mapping[str, str | None], at: At | None = None) -> str | None:
    """The template that a recipe's `chat_template` means, for models (in the order of the recipe) with these templates.

    `auto`: the one that most models have, not counting spaces at its ends; of several, that of the first model; None
    where no model has one. Raises PlanError KB334 for an unknown name, KB335 for a text that is no Jinja template.
    """
    if wish == AUTO:
        have = [text.strip() for text in templates.values() if text and text.strip()]
        most = max(have, key=have.count, default=None)
        return next((text for text in templates.values() if text and text.strip() == most), None)
    if wish in TEMPLATES:
        return TEMPLATES[wish]
    place = str(at) if at else None
    if "{" not in wish:
        hint = f"{nearest(wish, [AUTO, *TEMPLATES])}; or write the Jinja text itself"
        raise PlanError("KB334", f"unknown chat_template {wish!r}", at=place, hint=hint)
    if problem := syntax_problem(wish):
        raise PlanError("KB335", f"the chat_template is not Jinja: {problem}", at=place, hint="correct it there")
    return wish


def syntax_problem(template: str) -> str | None:
    """What is wrong with a Jinja text, or None. With the tags that transformers knows: break, continue, generation."""
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}` marks what the model wrote, for training."""

        tags = {"generation"}  # noqa: RUF012  # jinja2's own type

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    try:
        ImmutableSandboxedEnvironment(extensions=[Generation, loopcontrols]).parse(template)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    except RecursionError:
        return "it is nested too deep"
    return None


def with_template(files: Mapping[str, bytes], template: str, where: str) -> dict[str, bytes]:
    """Those of the tokenizer's files that change so that it has this template; none where it has it, but for spaces at
    the ends.

    It is put wherever these files have one now; where none has, into tokenizer_config.json, which every loader reads.
    """
    if (read_template(files, where) or "").strip() == template.strip():
        return {}
    changed = {}
    if JINJA in files:
        changed[JINJA] = template.encode()
    for name in (PROCESSOR, CONFIG):
        content = document(files, name, where)
        if _KEY in content or (name == CONFIG and not any(_has(files, other, where) for other in FILES)):
            content[_KEY] = _with_default(content.get(_KEY), template)
            changed[name] = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    return changed


def _has(files: Mapping[str, bytes], name: str, where: str) -> bool:
    return name in files if name == JINJA else _KEY in document(files, name, where)
