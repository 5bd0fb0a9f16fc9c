import os
from pathlib import Path

# One thread for each process: tests run side by side, and so do the processes that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch


def pytest_configure(config):
    """Hide a GPU from all tests but those of `pytest -m gpu`: they expect the numbers of a CPU."""
    if "gpu" not in (config.option.markexpr or ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def golden():
    """Numbers computed by the BYOL authors' released code on random inputs."""
    with np.load(Path(__file__).parent / "data" / "byol_golden.npz") as arrays:
        return dict(arrays)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
