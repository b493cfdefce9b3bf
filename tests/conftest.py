"""Settings that every test needs: no network, one thread for the tiny models, short and repeatable searches."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # two threads on matrices this small cost more than they give
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

settings.register_profile("project", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("project")


@pytest.fixture(scope="session")
def embedded() -> str:
    """The folder of the embedded policy."""
    from entropy_polarity.policy import resolve_model

    return resolve_model("embedded")
