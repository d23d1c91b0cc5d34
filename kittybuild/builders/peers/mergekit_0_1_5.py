"""The merge methods of mergekit 0.1.5: inputs promoted to one element type, in which all but linear and slerp work."""

from __future__ import annotations

from functools import partial

from kittybuild.builders.base import Builder
from kittybuild.builders.peers.family import Sparsifiers, family
from kittybuild.builders.peers.fusion import arcee_fusion
from kittybuild.builders.peers.karcher import karcher
from kittybuild.builders.peers.methods import METHODS
from kittybuild.builders.peers.selective import ram, ram_plus, sce
from kittybuild.builders.peers.sparse import bernoulli, by_rank, l1_norm, magnitude, outliers
from kittybuild.builders.peers.spheres import multislerp, nuslerp, slerp_wide, straight_by_cosine
from kittybuild.builders.peers.stock import model_stock
from kittybuild.builders.peers.sums import linear_wide, nearswap, passthrough
from kittybuild.builders.peers.whole import Merge, peer
from kittybuild.model.method import Method

NUMERICS = "mergekit-0.1.5"

_SPARSIFIERS = Sparsifiers(
    largest=partial(magnitude, rescale=l1_norm, least=1),
    middle=partial(outliers, rescale=l1_norm, off_by=False),
    chance=partial(bernoulli, rescale=l1_norm),
    rank=partial(by_rank, rescale=l1_norm, narrow=True),
)


def _builder(method: Method, merge: Merge) -> Builder:
    return peer(NUMERICS, method, merge, promoted=True)


_FAMILY = family(METHODS.__getitem__, _SPARSIFIERS, _builder)

BUILDERS = (
    _builder(METHODS["linear"], linear_wide),
    _builder(METHODS["slerp"], slerp_wide),
    _builder(METHODS["nuslerp"], partial(nuslerp, straight=straight_by_cosine)),
    _builder(METHODS["multislerp"], multislerp),
    _builder(METHODS["karcher"], partial(karcher, scalars=False)),
    _builder(METHODS["nearswap"], nearswap),
    *_FAMILY,
    _builder(METHODS["model_stock"], partial(model_stock, guarded=True)),
    _builder(METHODS["passthrough"], passthrough),
    _builder(METHODS["sce"], sce),
    _builder(METHODS["arcee_fusion"], partial(arcee_fusion, replaced=True)),
    _builder(METHODS["ram"], ram),
    _builder(METHODS["ramplus_tl"], ram_plus),
)
