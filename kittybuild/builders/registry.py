"""All builders that come with kittybuild."""

from __future__ import annotations

from dataclasses import replace

from kittybuild.builders.base import Builders
from kittybuild.builders.copying import CAST, CUT, JOIN, SAME, ZEROS
from kittybuild.builders.lora import DORA, JOINED, LORA
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
from kittybuild.builders.merge.task_arithmetic import FAMILY
from kittybuild.builders.moe.experts import EXPERT
from kittybuild.builders.moe.layer import DECODER_LAYER
from kittybuild.builders.moe.routers import EMBEDDINGS, RANDOM, STATES
from kittybuild.builders.peers import mergekit_0_1_4, mergekit_0_1_5, mergekitty_0_3
from kittybuild.builders.svd import SVD
from kittybuild.builders.transplant.neighbours import INTERPOLATION, INTERPOLATION_FITTED
from kittybuild.builders.transplant.plain import JOHN_HEWITT, MEAN, RANDN, SUBWORD, ZERO
from kittybuild.builders.transplant.pursuit import OMP
from kittybuild.builders.transplant.rotary import MP_ROPE
from kittybuild.builders.transplant.spaces import LANDMARK_PCA, STB
from kittybuild.builders.vocab import ROWS

SPHERICAL = (SLERP, NUSLERP, MULTISLERP, KARCHER)
DIFFERENCES = (*FAMILY, CONSENSUS_TA, CONSENSUS_TIES, MODEL_STOCK, SCE, RAM, RAMPLUS_TL)
PAIRED = (NEARSWAP, ARCEE_FUSION)
TRANSPLANTS = (
    *(MEAN, ZERO, RANDN, JOHN_HEWITT, SUBWORD),
    *(INTERPOLATION, INTERPOLATION_FITTED, OMP, LANDMARK_PCA, STB, MP_ROPE),
)
PEERS = (*mergekit_0_1_5.BUILDERS, *mergekit_0_1_4.BUILDERS, *mergekitty_0_3.BUILDERS)
MOE = (EXPERT, DECODER_LAYER, EMBEDDINGS, STATES, RANDOM)
ADAPTERS = (LORA, DORA, JOINED, *SVD)
BUILTIN = replace(
    Builders.of(
        *(CAST, SAME, ZEROS, JOIN, CUT, *ADAPTERS, ROWS, LINEAR, *SPHERICAL, *DIFFERENCES, *PAIRED, PASSTHROUGH),
        *TRANSPLANTS,
        *MOE,
        *PEERS,
    ),
    files=(),
)
