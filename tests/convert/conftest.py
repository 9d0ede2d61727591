"""Fresh random inputs on every run; the seed is printed with a failing test."""

import os
import random

import pytest
import torch

# The models here are tiny: a second thread only waits. It would also keep tests from forking (OpenMP's pool dies).
torch.set_num_threads(1)


@pytest.fixture
def seed() -> int:
    """Return a new seed (or the one in BILLM_TEST_SEED), printed so that a failure can be repeated."""
    value = int(os.environ.get("BILLM_TEST_SEED", random.SystemRandom().randrange(1 << 30)))
    print(f"BILLM_TEST_SEED={value}")
    return value
