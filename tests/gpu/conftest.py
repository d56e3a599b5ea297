"""Tests that run on a GPU, through Inductor: `python -m pytest -m gpu`. Without one, each is skipped by name.

    SLIMFIT_GPU_TESTS_ON=cpu python -m pytest -m gpu    # the bodies on the CPU, but for those that are about CUDA

Those of a GPU's *code*, which is generated and compiled on any machine, are `-m gpu_codegen`, in tests/test_gpu_*.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    """The GPU of the moment, or the CPU if asked for."""
    if os.environ.get("SLIMFIT_GPU_TESTS_ON") == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU (SLIMFIT_GPU_TESTS_ON=cpu runs what is not about CUDA itself)")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The GPU, for what a CPU does not have."""
    if device.type != "cuda":
        pytest.skip("is about CUDA itself")
    return device
