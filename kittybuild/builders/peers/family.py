"""Task arithmetic and its family as builders of one class: each method is a sparsifier and a way of mixing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from kittybuild.builders.base import Builder
from kittybuild.builders.peers.differences import merged_differences
from kittybuild.builders.peers.sparse import Sparsifier, dense
from kittybuild.builders.peers.whole import Merge
from kittybuild.model.method import Method


@dataclass(frozen=True, slots=True)
class Sparsifiers:
    """How a class keeps the largest magnitudes, those in the middle, elements by chance, and by chance and rank."""

    largest: Sparsifier
    middle: Sparsifier
    chance: Sparsifier
    rank: Sparsifier


def family(
    method: Callable[[str], Method], sparsifiers: Sparsifiers, builder: Callable[[Method, Merge], Builder]
) -> tuple[Builder, ...]:
    """The builders. `method`: what the class knows by a name; those called `ties`, and della, elect signs."""
    return tuple(
        builder(method(name), partial(merged_differences, sparsify=sparsify, elect=elect))
        for name, sparsify, elect in (
            ("task_arithmetic", dense, False),
            ("ties", sparsifiers.largest, True),
            ("dare_ties", sparsifiers.chance, True),
            ("dare_linear", sparsifiers.chance, False),
            ("breadcrumbs", sparsifiers.middle, False),
            ("breadcrumbs_ties", sparsifiers.middle, True),
            ("della", sparsifiers.rank, True),
            ("della_linear", sparsifiers.rank, False),
        )
    )
