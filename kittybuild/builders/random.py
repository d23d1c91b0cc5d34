"""Random masks from a counter: whether an element is kept depends on seed, tensor, input and place, on nothing else.

Fixed for ever, whatever numpy's own samplers become:
- the generator is Philox4x64-10 (Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3);
- its key is the first 128 bits, as a number, of the digest of [seed, tensor, input] in the domain `kittybuild.mask.v1`;
- counter c + 1 gives the elements 8c to 8c + 7: its four words in order, of each first the lower half, then the upper;
- a half is a signed integer of 32 bits, u, and an element of probability p is kept where (u + 2^31) / 2^32 < p.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kittybuild.digest import tagged

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

PER_COUNTER = 8


class Draws:
    """The integers of one input of one tensor."""

    def __init__(self, seed: int, tensor: str, index: int) -> None:
        self._key = int(tagged("kittybuild.mask.v1", [seed, tensor, index]).hex[:32], 16)

    def integers(self, start: int, count: int) -> Array:
        """Those of the elements from `start` on, int32, all values equally likely."""
        import numpy as np

        counter, skipped = divmod(start, PER_COUNTER)
        generator = np.random.Philox(key=self._key, counter=counter)
        words = generator.random_raw((skipped + count + 1) // 2)
        return words.astype("<u8", copy=False).view("<i4")[skipped : skipped + count]


def limit(probability: float) -> int:
    """The largest integer at which an element of this probability, above 0 and at most 1, is kept."""
    return math.ceil(probability * 2.0**32) - 2**31 - 1


def limits(probabilities: Array) -> Array:
    """`limit` of each of many: float64 to int32."""
    import numpy as np

    return (np.ceil(probabilities * 2.0**32) - (2.0**31 + 1)).astype(np.int32)
