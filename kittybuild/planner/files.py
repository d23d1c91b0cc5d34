"""The small files of models as stages see them: those of the donor, with what stages before put in their place."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from kittybuild.checkpoint.reading import read_companion
from kittybuild.checkpoint.source import Checkpoint, Companion
from kittybuild.errors import SourceError
from kittybuild.model.plan import StagePlan
from kittybuild.planner.views import Sources, View
from kittybuild.tokens.agreement import Facts
from kittybuild.tokens.chat import JINJA, PROCESSOR, read_template
from kittybuild.tokens.reading import CONFIG, FILES, SPECIAL, UNREAD, document

CONFIG_JSON = "config.json"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (*FILES, *UNREAD, JINJA, PROCESSOR)
"""All files that go with a tokenizer."""


class ModelFiles:
    """The companion files of models, each read when it is first asked for, and once."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self._read: dict[tuple[str, str], bytes] = {}

    def of(self, view: View, names: Collection[str]) -> dict[str, bytes]:
        """Those of a model's files that have one of these names. Raises SourceError KB201, KB210."""
        found: dict[str, bytes] = {}
        checkpoint = self.sources.checkpoints[view.donor] if view.donor else None
        for companion in checkpoint.companions if checkpoint else ():
            if companion.name in names and companion.name not in view.files:
                key = view.donor or "", companion.name
                if checkpoint and key not in self._read:
                    self._read[key] = read_unchanged(companion, checkpoint, self.sources)
                found[companion.name] = self._read[key]
        return found | {name: data for name, data in view.files.items() if name in names and data is not None}

    def generation(self, view: View) -> dict[str, Any]:
        """A model's generation_config.json; empty where there is none that can be read."""
        try:
            value = json.loads(self.of(view, (GENERATION,)).get(GENERATION, b"{}"))
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    def facts(self, view: View, *, spoken: bool) -> Facts:
        """What models of a merge are compared by; with `spoken`, by how they speak, too."""
        template = eos = None
        if spoken:
            try:
                files = self.of(view, ("chat_template.jinja", "chat_template.json", CONFIG, SPECIAL))
                template = read_template(files, view.label)
                eos = document({**files}, CONFIG, view.label).get("eos_token")
                eos = eos or document(files, SPECIAL, view.label).get("eos_token")
            except SourceError:  # whoever uses these files will say so
                pass
        eos = eos.get("content") if isinstance(eos, dict) else eos
        return Facts(
            view.config or {}, self.generation(view) if spoken else {}, template, eos if isinstance(eos, str) else None
        )


def companion_names(stage: StagePlan, sources: Sources) -> tuple[str, ...]:
    """The names of the companion files that a stage's output has, in order."""
    names = {companion.name for companion in sources.checkpoints[stage.donor].companions} if stage.donor else set()
    made: Mapping[str, bytes | None] = stage.files
    return tuple(sorted((names - made.keys()) | {name for name, data in made.items() if data is not None}))


def read_unchanged(companion: Companion, checkpoint: Checkpoint, sources: Sources) -> bytes:
    """The bytes of a companion file, which is the one that was there when the headers were read.

    Raises SourceError KB201, KB210.
    """
    check_unchanged(companion, checkpoint, sources)
    data = read_companion(companion)
    check_unchanged(companion, checkpoint, sources)
    return data


def check_unchanged(companion: Companion, checkpoint: Checkpoint, sources: Sources) -> None:
    """Raise SourceError KB210 if a companion file is not the one any more that was there with the headers."""
    with suppress(OSError):
        found = sources.identity(companion.path)
        if found.content or found in checkpoint.files:
            return
    hint = "build again when nothing writes to it"
    raise SourceError("KB210", "the file changed during the build", at=companion.path, hint=hint)
