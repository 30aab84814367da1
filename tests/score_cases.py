"""What vlmsft.evaluate leaves in a run's folder beside the scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def manifest(
    tasks: Sequence[str] = ("sample",),
    limit: int | None = None,
    temperature: float = 0.0,
    data: str = "d",
    **model: Any,
) -> dict[str, Any]:
    """As <run_dir>/evaluation/<id>.json has it; model: changes to the facts about the model."""
    facts = {"engine": "vlmsft builtin", "engine_version": "v", "transformers": "4.57.6", "dtype": "bfloat16"}
    return {
        "generation": {"temperature": temperature},
        "limit": limit,
        "repeats": 1,
        "tasks": {task: {"runner": "r", "data": {"sha256": data}, "scorers": {}} for task in tasks},
        "code": {"answers": "1", "scores": "2", "commit": None, "dirty": None},
        "model": {"source": "a", "folder": "/a", "content": ["1"], **facts, **model},
    }
