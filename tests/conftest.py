"""Every test runs offline, in fp32 and on one thread: figures repeat from machine to machine."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import HealthCheck, settings

# A shared two-core machine stalls now and then; a slow example is not a failing one.
settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")


@pytest.fixture(autouse=True)
def _reseed() -> None:
    """Gives each test the same random numbers, whichever tests ran before it."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
