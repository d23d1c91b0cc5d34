"""The merge methods of the peers as a recipe sees them: kitty-1's, without what kitty-1 adds to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from kittybuild.builders.merge.arcee_fusion import ARCEE_FUSION
from kittybuild.builders.merge.linear import LINEAR
from kittybuild.builders.merge.model_stock import MODEL_STOCK
from kittybuild.builders.merge.nearswap import NEARSWAP
from kittybuild.builders.merge.passthrough import PASSTHROUGH
from kittybuild.builders.merge.ram import RAM, RAMPLUS_TL
from kittybuild.builders.merge.sce import SCE
from kittybuild.builders.merge.slerp import NUSLERP, SLERP
from kittybuild.builders.merge.spherical import KARCHER, MULTISLERP
from kittybuild.builders.merge.tall_masks import CONSENSUS_TA, CONSENSUS_TIES
from kittybuild.builders.merge.task_arithmetic import FAMILY, needs_room
from kittybuild.model.method import Method, Param, no_complaint

T = Param("t", float, "shared", "0 is the base model, 1 the other", required=True)
RESCALE = Param("rescale", bool, "shared", "give the kept part of each difference the weight of the whole")
SHARES = ("density", "gamma", "epsilon")


def _as_peers(method: Method) -> Method:
    """What a peer knows by that name: no other way of rescaling than its own, and no ranges but those of shares."""
    params = tuple(map(_param_as_peers, method.params))
    least = method.least if method.most is not None or method.param("weight") else max(1, method.least)
    check = needs_room if method.check is needs_room else no_complaint
    random = method.name.startswith(("dare", "della")) or method.name == "arcee_fusion"
    return replace(method, params=params, least=least, check=check, random=random)


def _param_as_peers(param: Param) -> Param:
    if param.name == "rescale":
        doc = param.doc if param.accepted else RESCALE.doc
        return replace(RESCALE, doc=doc, default=param.default != "none", accepted=param.accepted)
    return param if param.scope == "input" and param.name in SHARES else replace(param, low=None, high=None)


def _all() -> Mapping[str, Method]:
    pairs = (NEARSWAP, ARCEE_FUSION, NUSLERP, MULTISLERP, KARCHER)
    others = (LINEAR, SLERP, PASSTHROUGH, MODEL_STOCK, SCE, RAM, RAMPLUS_TL, CONSENSUS_TA, CONSENSUS_TIES)
    known = [builder.method for builder in (*pairs, *FAMILY, *others) if builder.method]
    found = {method.name: _as_peers(method) for method in known}
    doc = "Goes along the arc from the base model to the other one, over the whole tensor."
    found["slerp"] = replace(found["slerp"], base="required", most=1, params=(T,), doc=doc)
    return MappingProxyType(found)


METHODS = _all()
"""Every method that a peer has, by name. Classes replace what is otherwise there."""
