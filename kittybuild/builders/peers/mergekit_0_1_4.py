"""The merge methods of mergekit 0.1.4: every step in the element type of the models, of differences in the base's."""

from __future__ import annotations

from functools import partial

from kittybuild.builders.peers.family import Sparsifiers, family
from kittybuild.builders.peers.fusion import arcee_fusion
from kittybuild.builders.peers.karcher import karcher
from kittybuild.builders.peers.methods import METHODS
from kittybuild.builders.peers.selective import sce
from kittybuild.builders.peers.sparse import bernoulli, by_rank, l1_norm, magnitude, outliers
from kittybuild.builders.peers.spheres import multislerp, nuslerp, slerp_by_numpy, straight_by_sine
from kittybuild.builders.peers.stock import model_stock
from kittybuild.builders.peers.sums import linear_narrow, nearswap, passthrough
from kittybuild.builders.peers.whole import peer

NUMERICS = "mergekit-0.1.4"

_builder = partial(peer, NUMERICS)
_SPARSIFIERS = Sparsifiers(
    largest=partial(magnitude, rescale=l1_norm, least=0),
    middle=partial(outliers, rescale=l1_norm, off_by=True),
    chance=partial(bernoulli, rescale=l1_norm),
    rank=partial(by_rank, rescale=l1_norm, narrow=True),
)

_FAMILY = family(METHODS.__getitem__, _SPARSIFIERS, _builder)

BUILDERS = (
    _builder(METHODS["linear"], linear_narrow),
    _builder(METHODS["slerp"], slerp_by_numpy),
    _builder(METHODS["nuslerp"], partial(nuslerp, straight=straight_by_sine)),
    _builder(METHODS["multislerp"], multislerp),
    _builder(METHODS["karcher"], partial(karcher, scalars=True)),
    _builder(METHODS["nearswap"], nearswap),
    *_FAMILY,
    _builder(METHODS["model_stock"], partial(model_stock, guarded=False)),
    _builder(METHODS["passthrough"], passthrough),
    _builder(METHODS["sce"], sce),
    _builder(METHODS["arcee_fusion"], partial(arcee_fusion, replaced=False)),
)
