"""What scores of a few dozen to a few thousand questions can say: intervals, differences between two models, spreads.

A question is the unit: its repeats are one draw, so they are averaged first and stay together when questions are drawn
again. A difference is taken question by question, over those that both models have a score for. What is missing is
left out and counted, never a zero.

Intervals are the percentile bootstrap's (Efron and Tibshirani 1993, chapter 13; scipy.stats.bootstrap with paired=True
and method="percentile" gives the same numbers from the same seed). Where a metric averages over groups, each group is
drawn from by itself, for its size is part of the benchmark's design.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

TIE = 1e-9
"""Of two scores that differ by less: sums of the same numbers in another order."""
MOST_INDICES = 4_000_000
"""Drawn at once, 8 bytes each."""


class Value(NamedTuple):
    """A score as it counts. A group's number is 100 * sum(score) / sum(out_of) where `out_of` is given, else the mean
    of `score`; the metric's is the mean of its groups' numbers.

    score: None = missing
    out_of: what a perfect answer had got, in the metrics that are relative; given for all questions or for none
    """

    score: float | None
    out_of: float | None = None
    group: str = ""


Values = Mapping[tuple[str, int], Value]
"""(id of the question, repeat from 0) -> score."""


@dataclass(frozen=True)
class Summary:
    """One model, one metric. Everything in the metric's own unit; None where nothing can be said.

    interval: that the score lies in, were other questions of this kind asked
    repeats: the score of each repeat; spread: their standard deviation (n - 1), None for a single one
    num: questions with a score; num_missing: answers (question and repeat) without one
    """

    score: float | None
    interval: tuple[float, float] | None
    repeats: tuple[float | None, ...]
    spread: float | None
    num: int
    num_missing: int


@dataclass(frozen=True)
class Difference:
    """A model against another, over the questions that both have a score for.

    delta: this one's score minus the other's; num: how many questions those are
    win, tie, loss: questions on which this one's mean over repeats is higher, equal, lower
    """

    delta: float | None
    interval: tuple[float, float] | None
    win: int
    tie: int
    loss: int
    num: int


@dataclass(frozen=True)
class Bootstrap:
    """num_resamples: sets of questions drawn; seed: of the draws; confidence: share of them inside the interval"""

    num_resamples: int = 9999
    seed: int = 0
    confidence: float = 0.95


def summarize(values: Values, bootstrap: Bootstrap) -> Summary:
    """The score of a model with its interval."""
    questions = _average(values)
    repeats = tuple(_score(_average(_only(values, repeat))) for repeat in sorted({repeat for _, repeat in values}))
    return Summary(
        score=_score(questions),
        interval=_interval([questions], bootstrap),
        repeats=repeats,
        spread=_spread(repeats),
        num=len(questions),
        num_missing=sum(value.score is None for value in values.values()),
    )


def compare(values: Values, base: Values, bootstrap: Bootstrap) -> Difference:
    """How far the model of `values` lies above that of `base`."""
    ours, theirs = _average(values), _average(base)
    both = [id for id in ours if id in theirs]
    ours, theirs = {id: ours[id] for id in both}, {id: theirs[id] for id in both}
    deltas = [ours[id].mean - theirs[id].mean for id in both]
    score, other = _score(ours), _score(theirs)
    return Difference(
        delta=None if score is None or other is None else score - other,
        interval=_interval([ours, theirs], bootstrap),
        win=sum(delta > TIE for delta in deltas),
        tie=sum(abs(delta) <= TIE for delta in deltas),
        loss=sum(delta < -TIE for delta in deltas),
        num=len(both),
    )


# --- one number for each question -------------------------------------------------------------------------------------


class _Question(NamedTuple):
    """mean: over repeats; out_of: 100 where the metric isn't relative, so that 100 * mean / out_of is the mean."""

    mean: float
    out_of: float
    group: str


def _average(values: Values) -> dict[str, _Question]:
    """Questions with at least one score, in the order they come in."""
    scored: dict[str, list[Value]] = {}
    for (id, _), value in values.items():
        if value.score is not None:
            scored.setdefault(id, []).append(value)
    return {id: _question(of_id) for id, of_id in scored.items()}


def _question(values: Sequence[Value]) -> _Question:
    mean = sum(value.score for value in values if value.score is not None) / len(values)
    out_of = [100.0 if value.out_of is None else value.out_of for value in values]
    return _Question(mean, sum(out_of) / len(out_of), values[0].group)


def _only(values: Values, repeat: int) -> dict[tuple[str, int], Value]:
    return {key: value for key, value in values.items() if key[1] == repeat}


def _score(questions: Mapping[str, _Question]) -> float | None:
    sums: dict[str, list[float]] = {}
    for question in questions.values():
        group = sums.setdefault(question.group, [0.0, 0.0])
        group[0] += question.mean
        group[1] += question.out_of
    if not sums or any(out_of == 0 for _, out_of in sums.values()):
        return None
    return sum(100 * mean / out_of for mean, out_of in sums.values()) / len(sums)


def _spread(repeats: Iterable[float | None]) -> float | None:
    import numpy as np

    known = [score for score in repeats if score is not None]
    return float(np.std(known, ddof=1)) if len(known) > 1 else None


# --- intervals --------------------------------------------------------------------------------------------------------


def _interval(models: Sequence[Mapping[str, _Question]], bootstrap: Bootstrap) -> tuple[float, float] | None:
    """Of the score of a single model, or of the first one's minus the second one's; they have the same questions.

    None for fewer than two questions: nothing is known of the others.
    """
    import numpy as np

    if len(models[0]) < 2:
        return None
    generator = np.random.default_rng(bootstrap.seed)
    groups = sorted({question.group for question in models[0].values()})
    drawn = np.zeros(bootstrap.num_resamples)
    for group in groups:
        ids = [id for id, question in models[0].items() if question.group == group]
        columns = [
            np.array([[of_model[id].mean, of_model[id].out_of] for id in ids], dtype=np.float64) for of_model in models
        ]
        drawn += _resample(columns, bootstrap.num_resamples, generator)
    drawn /= len(groups)
    if not np.isfinite(drawn).all():
        return None
    tail = (1 - bootstrap.confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def _resample(columns: Sequence[np.ndarray], num_resamples: int, generator: np.random.Generator) -> np.ndarray:
    """(num_resamples,): a group's number, or the difference of two models', in each draw of its questions.

    columns: (questions, 2) for each model, mean and out_of; the same draw holds for all models
    """
    import numpy as np

    num = len(columns[0])
    at_once = max(1, MOST_INDICES // num)
    parts = []
    for start in range(0, num_resamples, at_once):
        indices = generator.integers(0, num, (min(at_once, num_resamples - start), num))
        with np.errstate(divide="ignore", invalid="ignore"):
            scores = [100 * of[:, 0][indices].sum(axis=1) / of[:, 1][indices].sum(axis=1) for of in columns]
        parts.append(scores[0] - scores[1] if len(scores) == 2 else scores[0])
    return np.concatenate(parts)
