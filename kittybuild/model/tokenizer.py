"""What a recipe asks of the tokenizer: whose tokens, where single rows come from, and how many rows there are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kittybuild.model.recipe import NOWHERE, At, ModelRef


@dataclass(frozen=True, slots=True)
class ModelToken:
    """The row of a token of a model, by the token's text or by its id: one of the two is given."""

    model: ModelRef
    token: str | None = None
    token_id: int | None = None

    def __post_init__(self) -> None:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("either the token or its id")

    def __str__(self) -> str:
        return f"{self.model}: {self.token_id if self.token is None else repr(self.token)}"


TokenSource = ModelRef | ModelToken | Literal["zero"] | None
"""Where a token's row comes from: the same token of a model, another token, zeros, or (None) what is usual."""


@dataclass(frozen=True, slots=True)
class TokenRule:
    """What holds for one token. `force`: for the models that have a row of their own for it, too."""

    token: str
    source: TokenSource = None
    force: bool = False
    at: At = field(default=NOWHERE, compare=False)


@dataclass(frozen=True, slots=True)
class TokenizerRequest:
    """`source`: `base` (the base model's tokens), `union` (those of all), `truncate` (row by row, as many rows as all
    models have, whatever their tokens), or the tokens of a model. Rows are rounded up to `pad_to_multiple_of`.
    """

    source: Literal["base", "union", "truncate"] | ModelRef = "union"
    tokens: tuple[TokenRule, ...] = ()
    pad_to_multiple_of: int | None = None
    at: At = field(default=NOWHERE, compare=False)

    def __post_init__(self) -> None:
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError("pad_to_multiple_of is at least 1")
        if len({rule.token for rule in self.tokens}) < len(self.tokens):
            raise ValueError("a token stands twice")
        if self.source == "truncate" and (self.tokens or self.pad_to_multiple_of):
            raise ValueError("truncate takes rows as they are")


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The wish for a chat template: `auto`, a name, or Jinja text."""

    wish: str
    at: At = field(default=NOWHERE, compare=False)
