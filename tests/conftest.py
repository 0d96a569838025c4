"""Shared by all tests: one thread, fixed seeds."""

from __future__ import annotations

import os

import pytest
import torch

# Small tensors gain nothing from threads, and beside another process their barriers cost more than the work.
torch.set_num_threads(int(os.environ.get("ISPA_TEST_THREADS", "1")))

SEED = 20260


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """The global generator starts the same in every test, in any order of tests."""
    torch.manual_seed(SEED)


@pytest.fixture
def rng() -> torch.Generator:
    """A CPU generator of the test's own."""
    return torch.Generator().manual_seed(SEED)
