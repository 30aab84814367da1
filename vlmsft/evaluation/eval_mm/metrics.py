"""llm-jp-eval-mm's scores as the store has them: percent for accuracies, ROUGE and BLEU, the judges' own scales."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

PERCENT = {"exact-match", "substring-match", "jmmmu", "mmmu", "jdocqa", "jic-vqa", "mecha-ja"}
"""Given as 0 to 1 there."""
JUDGED = {"llm-as-a-judge", "heron-bench"}
METRICS = (*sorted(PERCENT | JUDGED), "rougel")
"""Those that the ten tasks of the tutorial use; cc-ocr's is left out."""
GROUPS = {"heron-bench": "category", "jic-vqa": "domain"}
"""The field over whose values a metric is averaged first."""
POINTS = {"llm-as-a-judge": (1, 5), "heron-bench": (1, 10)}


def score_of(metric: str, given: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """`score`, `out_of` and `group` of vlmsft.evaluation.store.Score.

    given: by llm-jp-eval-mm for one answer; None where there is nothing or a judge failed
    """
    group = str(fields[GROUPS[metric]]) if metric in GROUPS else ""
    if metric == "heron-bench":
        if given is None or -1 in given.values():
            return {"score": None, "group": group}
        return {"score": float(given["score"]), "out_of": float(given["score_gpt"]), "group": group}
    score = None if given is None else float(given) * (100 if metric in PERCENT else 1)
    return {"score": score, "group": group}


def verdict_of(metric: str, reply: str) -> float | None:
    """The points that llm-jp-eval-mm reads in a judge's reply; None where there are none, or none on the scale.

    Any reply of a scorer that isn't llm-jp-eval-mm's is its own to read.
    """
    if metric == "llm-as-a-judge":
        match = re.search(r"\d+(?:\.\d+)?", reply)
        found = [float(match[0])] if match else []
    elif metric == "heron-bench":
        found = _heron_points(reply)
    else:
        return 0.0
    least, most = POINTS[metric]
    return found[0] if found and all(least <= points <= most for points in found) else None


def _heron_points(reply: str) -> list[float]:
    """Of the model's answer and of the reference."""
    for text in re.findall(r"\{.*?\}", reply, re.DOTALL):
        try:
            read = json.loads(re.sub(r"[\x00-\x1f\x7f]", "", text))
            return [int(read["score"]), int(read["score_gpt"])]
        except (ValueError, TypeError, KeyError):
            continue
    return []
