"""Intervals are scipy's; repeats stay together; what is missing is counted and is no zero."""

import numpy as np
import pytest
import scipy.stats

from vlmsft.evaluation import statistics
from vlmsft.evaluation.statistics import Bootstrap, Value, compare, summarize

BOOTSTRAP = Bootstrap(num_resamples=999, seed=3)


def values(scores, repeat=0, **more):
    return {
        (f"q{number}", repeat): Value(None if score is None else float(score), **more)
        for number, score in enumerate(scores)
    }


def scores(num=60, seed=1, mean=50.0):
    return np.random.default_rng(seed).normal(mean, 20, num)


def seeded(statistic, *data, paired=False):
    """scipy draws from default_rng where it gets a Generator, as statistics.py does."""
    found = scipy.stats.bootstrap(
        data,
        statistic,
        paired=paired,
        vectorized=True,
        n_resamples=999,
        method="percentile",
        rng=np.random.default_rng(3),
    )
    return pytest.approx(tuple(found.confidence_interval), rel=1e-12)


def test_the_interval_of_a_mean_is_scipys():
    given = scores()
    found = summarize(values(given), BOOTSTRAP)
    assert found.score == pytest.approx(given.mean())
    assert found.interval == seeded(np.mean, given)
    assert found.score is not None and found.interval is not None
    assert found.interval[0] < found.score < found.interval[1]


def test_the_interval_of_a_difference_is_scipys_paired_one():
    ours, theirs = scores(seed=1), scores(seed=1) + scores(seed=2, mean=2.0) / 10
    found = compare(values(ours), values(theirs), BOOTSTRAP)
    assert found.delta == pytest.approx(ours.mean() - theirs.mean())
    assert found.interval == seeded(lambda a, b, axis: a.mean(axis) - b.mean(axis), ours, theirs, paired=True)
    alone = summarize(values(ours), BOOTSTRAP).interval
    assert alone is not None and found.interval is not None
    assert found.interval[1] - found.interval[0] < (alone[1] - alone[0]) / 5  # what pairing is for


def test_draws_in_parts_are_the_same_draws(monkeypatch):
    whole = summarize(values(scores()), BOOTSTRAP)
    monkeypatch.setattr(statistics, "MOST_INDICES", 60 * 100)
    assert summarize(values(scores()), BOOTSTRAP) == whole


def test_the_same_seed_gives_the_same_interval_and_another_one_another():
    assert summarize(values(scores()), BOOTSTRAP) == summarize(values(scores()), BOOTSTRAP)
    assert summarize(values(scores()), BOOTSTRAP) != summarize(values(scores()), Bootstrap(999, seed=4))


def test_confidence_is_the_share_inside():
    half = summarize(values(scores()), Bootstrap(999, seed=3, confidence=0.5)).interval
    most = summarize(values(scores()), BOOTSTRAP).interval
    assert half is not None and most is not None and most[0] < half[0] < half[1] < most[1]


def test_win_tie_loss_and_their_number():
    found = compare(values([1, 2, 3, 0.1 + 0.2]), values([0, 2, 4, 0.3]), BOOTSTRAP)
    assert (found.win, found.tie, found.loss, found.num) == (1, 2, 1, 4)
    assert found.delta == pytest.approx(0)


def test_what_is_missing_is_counted_and_is_no_zero():
    found = summarize(values([80, None, 100, None]), BOOTSTRAP)
    assert (found.score, found.num, found.num_missing) == (90, 2, 2)


def test_a_difference_is_over_what_both_have():
    found = compare(values([80, None, 100, 50]), values([70, 10, None, 60]), BOOTSTRAP)
    assert (found.num, found.delta, found.win, found.tie, found.loss) == (2, 0, 1, 0, 1)


def test_repeats_of_a_question_are_one_draw():
    """Ten times the same answer tells no more than one of them."""
    once = values(scores(20))
    often = {(id, repeat): value for (id, _), value in once.items() for repeat in range(10)}
    assert summarize(often, BOOTSTRAP).interval == pytest.approx(summarize(once, BOOTSTRAP).interval, rel=1e-12)
    assert summarize(often, BOOTSTRAP).num == 20
    assert compare(often, values(scores(20, seed=5)), BOOTSTRAP).num == 20


def test_spread_over_repeats():
    found = summarize({**values([10, 20]), **values([30, 40], repeat=1), **values([20, None], repeat=2)}, BOOTSTRAP)
    assert found.repeats == (15, 35, 20)
    assert found.spread == pytest.approx(np.std([15, 35, 20], ddof=1))
    assert found.num_missing == 1
    assert found.score == pytest.approx(
        (20 + 30) / 2
    )  # each question counts once, however many of its repeats are there
    assert summarize(values([10, 20]), BOOTSTRAP).spread is None


def test_a_metric_over_groups_is_their_mean_and_each_group_keeps_its_size():
    """JIC-VQA's: the mean of the domains' accuracies."""
    given = {**{("a", 0): Value(100.0, group="A")}, **{(f"b{n}", 0): Value(0.0, group="B") for n in range(9)}}
    found = summarize(given, BOOTSTRAP)
    assert found.score == 50
    assert found.interval == (50, 50)  # drawn without groups the only question of A is often absent


def test_a_relative_metric_is_a_ratio_of_sums():
    """Heron-Bench's: the judge's points for the model over those for the reference, a category at a time."""
    given = {
        ("a", 0): Value(6.0, 8.0, "conv"),
        ("b", 0): Value(4.0, 8.0, "conv"),
        ("c", 0): Value(3.0, 10.0, "detail"),
        ("d", 0): Value(None, None, "detail"),
    }
    found = summarize(given, BOOTSTRAP)
    assert found.score == pytest.approx((100 * 10 / 16 + 30) / 2)
    assert found.num_missing == 1

    ours, theirs = scores(40), np.abs(scores(40, seed=9)) + 1
    ratio = {(f"q{n}", 0): Value(score, of) for n, (score, of) in enumerate(zip(ours, theirs, strict=True))}
    expected = seeded(lambda a, b, axis: 100 * a.sum(axis) / b.sum(axis), ours, theirs, paired=True)
    assert summarize(ratio, BOOTSTRAP).interval == expected


@pytest.mark.parametrize("given", [{}, values([None, None])])
def test_of_nothing_nothing_is_said(given):
    found = summarize(given, BOOTSTRAP)
    assert (found.score, found.interval, found.spread, found.num) == (None, None, None, 0)
    assert found.num_missing == len(given)
    difference = compare(given, values([1, 2]), BOOTSTRAP)
    assert (difference.delta, difference.interval, difference.num) == (None, None, 0)


def test_one_question_has_no_interval():
    assert summarize(values([70]), BOOTSTRAP).interval is None


def test_an_impossible_ratio_is_no_number():
    assert summarize({("a", 0): Value(1.0, 0.0), ("b", 0): Value(1.0, 0.0)}, BOOTSTRAP).score is None
