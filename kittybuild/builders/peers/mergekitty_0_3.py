"""The merge methods of mergekitty 0.3: every step in the element type of the models, of differences in the base's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from kittybuild.builders.peers.differences import consensus
from kittybuild.builders.peers.family import Sparsifiers, family
from kittybuild.builders.peers.methods import METHODS
from kittybuild.builders.peers.selective import sce_by_numbers
from kittybuild.builders.peers.sparse import bernoulli, by_rank, dense, l1_norm_of_both, magnitude, outliers
from kittybuild.builders.peers.spheres import multislerp, slerp_or_nuslerp
from kittybuild.builders.peers.stock import model_stock
from kittybuild.builders.peers.sums import linear_narrow, nearswap_unguarded, passthrough
from kittybuild.builders.peers.whole import peer
from kittybuild.model.method import Method, Param

NUMERICS = "mergekitty-0.3"

_builder = partial(peer, NUMERICS)
_LARGEST = partial(magnitude, rescale=l1_norm_of_both, least=0)
_SPARSIFIERS = Sparsifiers(
    largest=_LARGEST,
    middle=partial(outliers, rescale=l1_norm_of_both, off_by=True),
    chance=partial(bernoulli, rescale=None),
    rank=partial(by_rank, rescale=None, narrow=False),
)


def _difference(name: str) -> Method:
    """A method of the family of task arithmetic; of these only della's have a factor, and one for each model."""
    method = METHODS[name]
    params = tuple(param for param in method.params if param.name != "lambda")
    if name.startswith("della"):
        factor = Param("lambda", float, "input", "multiply the mixed difference by the first model's", default=1.0)
        params = (*params, factor)
    return replace(method, params=params)


def _agreement(name: str) -> Method:
    """A consensus method, whose `k` is one for each model."""
    method = METHODS[name]
    votes = Param("k", float, "input", "how many models must vote for an element: the first model's", default=1.0)
    return replace(method, params=tuple(votes if param.name == "k" else param for param in method.params))


def _needs_t_or_weights(params: Mapping[str, Any]) -> str | None:
    weights = params["weight"]
    if params["t"] is None and (len(weights) != 2 or None in weights):
        return "either 't', for two models with the base among them, or the 'weight' of two models beside the base"
    return None


def _needs_distance(params: Mapping[str, Any]) -> str | None:
    return None if params["t"] > 0 else "'t' must be above 0"


def _slerp() -> Method:
    """Two methods in one: mergekit's slerp, and its nuslerp without the name."""
    arc = METHODS["nuslerp"]
    weight, *shape = arc.params
    t = Param("t", float, "shared", "0 is the first of two models as they are listed, 1 the other; without weights")
    params = (t, replace(weight, required=False), *shape)
    return replace(METHODS["slerp"], base="optional", most=2, params=params, check=_needs_t_or_weights, doc=arc.doc)


_FAMILY = family(_difference, _SPARSIFIERS, _builder)

BUILDERS = (
    _builder(METHODS["linear"], linear_narrow),
    _builder(_slerp(), slerp_or_nuslerp),
    _builder(METHODS["multislerp"], multislerp),
    _builder(replace(METHODS["nearswap"], check=_needs_distance), nearswap_unguarded),
    *_FAMILY,
    _builder(_agreement("consensus_ta"), partial(consensus, sparsify=dense, elect=False)),
    _builder(_agreement("consensus_ties"), partial(consensus, sparsify=_LARGEST, elect=True)),
    _builder(METHODS["model_stock"], partial(model_stock, guarded=False)),
    _builder(METHODS["passthrough"], passthrough),
    _builder(METHODS["sce"], sce_by_numbers),
)
