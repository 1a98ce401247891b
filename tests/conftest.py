import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never download
torch.set_num_threads(1)  # the tests' models are tiny: a second thread only waits


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Runs write to logs/ under the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
