from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def golden():
    """Numbers computed by the BYOL authors' released code on random inputs."""
    with np.load(Path(__file__).parent / "data" / "byol_golden.npz") as arrays:
        return dict(arrays)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
