from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # helpers of tests/, also where this folder runs alone


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    """Between attempts: the openai client's are half a second and more."""
    import openai._base_client as client

    monkeypatch.setattr(client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(client, "MAX_RETRY_DELAY", 0.02)
