"""Where the models of a merge disagree on what the output can have only once: chat template, eos, rope, positions.

Pure comparison of what their files say; nothing here is an error, since a merge may well be meant so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_INNER = ("text_config", "language_config", "llm_config", "thinker_config")
_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx", "sliding_window")
_THETA = ("rope_theta", "rotary_emb_base", "rope_local_base_freq", "partial_rotary_factor", "rotary_pct")


@dataclass(frozen=True)
class Facts:
    """What is compared of a model: its config.json, generation_config.json, chat template, and the text of its eos."""

    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    template: str | None = None
    eos: str | None = None


def disagreements(models: Mapping[str, Facts], lead: str) -> tuple[str, ...]:
    """A line for each thing that not all models have in common with `lead`, whose value the output gets.

    What a model does not say is no disagreement: a default differs from release to release.
    """
    found = []
    for what, value_of in _ASPECTS:
        mine = value_of(models[lead])
        others = {name: value for name, facts in models.items() if (value := value_of(facts)) not in (None, mine)}
        if others and what == "chat template":
            have = f"{'has' if len(others) == 1 else 'have'} {'one' if mine is None else 'another'}"
            like = "none, as" if mine is None else "that of"
            found.append(f"{what}: the output has {like} {lead}; {', '.join(others)} {have}")
        elif others:
            shown = ", ".join(f"{name} has {_short(value)}" for name, value in others.items())
            found.append(f"{what}: the output has that of {lead}, {_short(mine)}; {shown}")
    return tuple(found)


def _short(value: Any) -> str:
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that is about the language model."""
    return next((config[key] for key in _INNER if isinstance(config.get(key), dict)), config)


def _picked(keys: Sequence[str]) -> Callable[[Facts], Any]:
    def pick(facts: Facts) -> Any:
        config = _text(facts.config)
        return {key: config[key] for key in keys if config.get(key) is not None} or None

    return pick


def _rope(facts: Facts) -> Any:
    """Base and scaling of the rotary embedding, in the older and the newer words for them."""
    config = _text(facts.config)
    found: dict[str, Any] = {key: float(config[key]) for key in _THETA if isinstance(config.get(key), (int, float))}
    for key in ("rope_scaling", "rope_parameters"):
        scaling = config.get(key)
        if isinstance(scaling, dict):
            found |= {"rope_type" if name == "type" else name: value for name, value in scaling.items()}
    if found.get("rope_type") == "default":
        del found["rope_type"]
    return found or None


def _eos_id(facts: Facts) -> Any:
    """The ids at which generation stops."""
    return next((c["eos_token_id"] for c in (facts.generation, _text(facts.config)) if "eos_token_id" in c), None)


def _template(facts: Facts) -> Any:
    return facts.template.strip() if facts.template and facts.template.strip() else None


_ASPECTS: tuple[tuple[str, Callable[[Facts], Any]], ...] = (
    ("chat template", _template),
    ("eos token", lambda facts: facts.eos),
    ("eos_token_id", _eos_id),
    ("rope", _rope),
    ("position limit", _picked(_LIMITS)),
)
