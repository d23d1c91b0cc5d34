"""base + λ · a mix of the models' differences from it, in the base's element type: task arithmetic and its family."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kittybuild.builders.peers.sparse import Sparsifier
from kittybuild.builders.peers.whole import Given

if TYPE_CHECKING:
    from torch import Tensor

NO_WEIGHT = 1e-8


def merged_differences(given: Given, *, sparsify: Sparsifier, elect: bool) -> Tensor:
    """base + λ · mix of the w_i · sparse(x_i - base); without models the base. Every step is rounded.

    λ: one for all, or (mergekitty) one for each model, of which the first counts.
    """
    if not given.models:
        return given.origin
    mixed = mix(
        sparse(differences(given), sparsify, given), given.params["weight"], given.params["normalize"], elect=elect
    )
    factor = given.params.get("lambda", 1.0)
    factor = factor[0] if isinstance(factor, list) else factor
    return (given.origin + (mixed if factor == 1 else mixed * factor)).to(given.origin.dtype)


def consensus(given: Given, *, sparsify: Sparsifier, elect: bool) -> Tensor:
    """base + that part of the mix of which at least k models say that it is theirs (mergekitty).

    A model says so where its whole difference (with `rescale`, rescaled) is larger than λ_i times how far the mix is
    from it; k is the first model's (Wang et al. 2024, Localizing Task Information).
    """
    import torch

    if not given.models:
        return given.origin
    deltas = differences(given)
    mixed = mix(sparse(deltas, sparsify, given), given.params["weight"], given.params["normalize"], elect=elect)
    own = [
        delta.abs() > (mixed - delta).abs() * factor
        for delta, factor in zip(deltas, given.params["lambda"], strict=True)
    ]
    votes = torch.stack(own).sum(dim=0)
    return given.origin + mixed * votes.ge(given.params["k"][0])


def differences(given: Given) -> list[Tensor]:
    """What each model adds to the base."""
    return [model.to(given.origin.dtype) - given.origin for model in given.models]


def sparse(deltas: Iterable[Tensor], sparsify: Sparsifier, given: Given) -> list[Tensor]:
    """What is kept of each."""
    return [sparsify(delta, index, given.params) for index, delta in enumerate(deltas)]


def mix(deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool, *, elect: bool) -> Tensor:
    """The weighted sum; with `elect` of those with the sign of the sum of all, a sum of zero electing plus.

    `normalize`: divided by the sum of their weights, where 0 (without `elect`: within 1e-8 of it) counts as 1.
    """
    import torch

    stacked = torch.stack(list(deltas))
    columns = torch.tensor(list(weights), dtype=stacked.dtype).view(-1, *[1] * (stacked.dim() - 1))
    stacked.mul_(columns)
    mixed = stacked.sum(dim=0)
    if elect:
        agrees = signs_agree(stacked, mixed)
        mixed, divisor = (stacked * agrees).sum(dim=0), (columns * agrees).sum(dim=0)
        divisor[divisor == 0] = 1
    else:
        divisor = columns.sum(dim=0)
        divisor[divisor.abs() < NO_WEIGHT] = 1
    return mixed.div_(divisor) if normalize else mixed


def signs_agree(deltas: Tensor, total: Tensor) -> Tensor:
    """Where each delta has the sign of their sum; zeros agree with nobody."""
    import torch

    return deltas.sign() == torch.where(total >= 0, 1.0, -1.0)
