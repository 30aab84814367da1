import numpy as np
import pytest

from vlmsft.report.downsample import keep_extremes, part_means


@pytest.mark.parametrize("length", [1001, 1999, 20_000, 123_457])
def test_extremes_and_ends_survive(length):
    values = np.random.default_rng(length).normal(size=length)
    values[length // 3], values[2 * length // 3] = 50.0, -50.0
    kept = keep_extremes(values, 1000)
    assert 400 < len(kept) <= 1000
    assert (np.diff(kept) > 0).all()
    assert {0, length - 1, length // 3, 2 * length // 3} <= set(kept.tolist())


def test_each_spike_of_many_survives():
    values = np.zeros(100_000)
    spikes = np.arange(50, 100_000, 400)  # fewer than parts, each in one of its own
    values[spikes] = np.arange(1, len(spikes) + 1)
    assert set(spikes.tolist()) <= set(keep_extremes(values, 1000).tolist())


def test_short_curves_stay_as_they_are():
    assert keep_extremes(np.arange(1000.0)).tolist() == list(range(1000))
    assert keep_extremes(np.array([])).tolist() == []


def test_gaps_stay_gaps_and_are_no_extremes():
    values = np.sin(np.arange(30_000) / 500)
    values[7_000:9_000] = np.nan
    values[12_345] = np.inf
    kept = keep_extremes(values, 1000)
    assert len(kept) <= 1000
    shown = values[kept]
    assert np.isnan(shown[(kept >= 7_000) & (kept < 9_000)]).all()
    assert ((kept >= 7_000) & (kept < 9_000)).sum() > 10
    assert 12_345 in kept
    assert np.nanmax(shown[np.isfinite(shown)]) == np.nanmax(values[np.isfinite(values)])


def test_a_curve_of_nan_alone():
    kept = keep_extremes(np.full(5000, np.nan), 1000)
    assert 300 < len(kept) <= 1000


def test_means_of_equal_parts():
    assert part_means(np.arange(10.0), 5).tolist() == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert part_means(np.arange(7.0), 3).tolist() == [0.5, 2.5, 5.0]
    means = part_means(np.array([1.0, np.nan, np.nan, np.nan, 3.0, 5.0]), 3)
    assert means[0] == 1.0 and np.isnan(means[1]) and means[2] == 4.0
