"""Shared fixtures: everything here is small, deterministic and offline."""

import os
from pathlib import Path

# Before any Hugging Face library is imported: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return Path(os.environ.get("OSCQAT_GOLDEN_DIR", Path(__file__).parent / "golden"))
