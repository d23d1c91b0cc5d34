"""For those who write merge methods: `check_method` runs one through the laws that our own methods keep."""

from kittybuild.testing.laws import LAWS, BrokenLaw, check_method
from kittybuild.testing.memory import drawn, run

__all__ = ["LAWS", "BrokenLaw", "check_method", "drawn", "run"]
