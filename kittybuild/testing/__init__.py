"""For those who extend kittybuild: `check_method` runs a merge method through the laws that our own methods keep, and
`check_bucket`, `check_blobs`, `check_realisations` hold a store of theirs against the contracts that ours keep.
"""

from kittybuild.testing.contracts import BrokenContract, check_blobs, check_bucket, check_realisations
from kittybuild.testing.laws import LAWS, BrokenLaw, check_method
from kittybuild.testing.memory import drawn, run

__all__ = [
    "LAWS",
    "BrokenContract",
    "BrokenLaw",
    "check_blobs",
    "check_bucket",
    "check_method",
    "check_realisations",
    "drawn",
    "run",
]
