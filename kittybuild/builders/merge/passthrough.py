"""One model's tensors, scaled or as they are."""

from __future__ import annotations

from kittybuild.builders.base import Builder, Combine, Job
from kittybuild.builders.merge.common import rounding, scaled
from kittybuild.model.method import Method, Param


def _passthrough(job: Job) -> Combine:
    """scale * x, one rounding. (Without a scale no derivation is made: the tensor is taken as it is.)"""
    scale = rounding(job)(job.params["scale"][0])
    return lambda block: scaled(block.inputs[0], scale)


PASSTHROUGH = Builder(
    "passthrough",
    1,
    _passthrough,
    scratch=0,
    method=Method(
        name="passthrough",
        title="Passthrough",
        paper="",
        base="ordinary",
        most=1,
        params=(Param("scale", float, "input", "multiply the tensor by this"),),
        doc="One model's tensors, scaled or as they are.",
    ),
)
