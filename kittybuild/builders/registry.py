"""All builders that come with kittybuild."""

from __future__ import annotations

from kittybuild.builders.base import Builders
from kittybuild.builders.copying import CAST, SAME
from kittybuild.builders.lora import LORA
from kittybuild.builders.merge.linear import LINEAR
from kittybuild.builders.merge.passthrough import PASSTHROUGH
from kittybuild.builders.merge.slerp import SLERP
from kittybuild.builders.merge.task_arithmetic import TASK_ARITHMETIC, TIES

BUILTIN = Builders.of(CAST, SAME, LORA, LINEAR, SLERP, TASK_ARITHMETIC, TIES, PASSTHROUGH)
