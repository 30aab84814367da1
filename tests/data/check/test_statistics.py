import pickle
import random

import numpy as np

from vlmsft.data.check.statistics import Histogram, Statistics


def test_a_histogram_counts_as_numpy_does():
    values = [random.Random(0).randrange(500) for _ in range(999)]
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    assert len(histogram) == 999
    assert histogram.max == max(values)
    assert histogram.mean == np.mean(values)
    assert histogram.above(250) == sum(value > 250 for value in values)
    for share in (0.5, 0.99, 0.999, 1.0):
        assert histogram.quantile(share) == np.quantile(values, share, method="inverted_cdf")


def test_parts_add_up_in_any_order():
    parts = [Statistics(num_records=n) for n in range(3)]
    for number, part in enumerate(parts):
        part.token_lengths.add(100 * number)
        part.sizes[number, 1] += 2
    whole, other = Statistics(), Statistics()
    for part in parts:
        whole.merge(part)
    for part in reversed(parts):
        other.merge(pickle.loads(pickle.dumps(part)))
    assert whole.num_records == 3 and len(whole.token_lengths) == 3
    assert whole.sizes == {(0, 1): 2, (1, 1): 2, (2, 1): 2}
    assert (whole.num_records, whole.sizes) == (other.num_records, other.sizes)
    assert whole.token_lengths.quantile(1.0) == other.token_lengths.quantile(1.0) == 200


def test_nothing_is_no_trouble():
    assert Histogram().max == Histogram().quantile(0.5) == Histogram().mean == 0
    assert Statistics().proposed_length(1.0) == 64


def test_proposed_lengths_hold_what_they_say():
    statistics = Statistics()
    statistics.token_lengths.add(100, 999)
    statistics.token_lengths.add(3000)
    assert statistics.proposed_length(0.999) == 128
    assert statistics.proposed_length(1.0) == 3008
