"""GGUF files as sources: Hugging Face names, shapes, rows and config over the bytes that llama.cpp stores.

Describing a file reads its header only, and believes no length in it before checking it against the file.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO

from kittybuild.checkpoint.source import RAW, Checkpoint, Companion, Entry, FileId
from kittybuild.errors import SourceError, nearest
from kittybuild.tensors import DType, Shape, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_WINDOW = 1 << 20
_MOST = 1 << 24
_DAMAGED = "the file is damaged or incomplete: get it again"
_CODES = MappingProxyType(
    {
        "UINT8": "B",
        "INT8": "b",
        "UINT16": "H",
        "INT16": "h",
        "UINT32": "I",
        "INT32": "i",
        "FLOAT32": "f",
        "BOOL": "?",
        "UINT64": "Q",
        "INT64": "q",
        "FLOAT64": "d",
    }
)
