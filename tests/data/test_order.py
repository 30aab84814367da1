from itertools import islice

import numpy as np
import pytest

from vlmsft.data.order import (
    BlendOrder,
    EvaluationOrder,
    Share,
    TrainOrder,
    blend_counts,
    epoch_order,
    next_dataset,
    whole_weights,
)


def global_batches(micro, size, count, consumed=0, num_samples=50, global_batch_size=8):
    """Sets of the first `count` global batches, put together from all ranks' micro batches."""
    streams = []
    for rank in range(size):
        share = Share(micro, global_batch_size, rank, size)
        stream = iter(TrainOrder(num_samples, 7, consumed, share))
        streams.append([list(islice(stream, share.num_microbatches)) for _ in range(count)])
    batches = [[i for stream in streams for micro_batch in stream[k] for i in micro_batch] for k in range(count)]
    assert all(len(batch) == global_batch_size for batch in batches)
    return [sorted(batch) for batch in batches]


@pytest.mark.parametrize(("micro", "size"), [(1, 2), (2, 2), (2, 4), (8, 1), (1, 8), (4, 1)])
def test_global_batches_do_not_depend_on_ranks_or_micro_batch_size(micro, size):
    assert global_batches(micro, size, 14) == global_batches(1, 1, 14)


@pytest.mark.parametrize("num_samples", [50, 8, 3])
def test_every_sample_comes_once_in_each_epoch(num_samples):
    stream = iter(TrainOrder(num_samples, 7, 0, Share(1, 8, 0, 1)))
    seen = [index for batch in islice(stream, 4 * num_samples) for index in batch]
    epochs = [seen[n * num_samples : (n + 1) * num_samples] for n in range(4)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(num_samples))] * 4
    assert num_samples == 3 or epochs[0] != epochs[1]


def test_a_resumed_stream_continues_exactly_across_epochs_and_shapes():
    whole = global_batches(1, 1, 20)
    assert global_batches(1, 1, 10, consumed=80) == whole[10:]
    assert global_batches(2, 4, 10, consumed=80) == whole[10:]  # on other hardware


def test_resume_with_another_global_batch_size_goes_on_behind_the_consumed_samples():
    whole = [i for batch in islice(TrainOrder(50, 7, 0, Share(1, 8, 0, 1)), 100) for i in batch]
    resumed = [i for batch in islice(TrainOrder(50, 7, 24, Share(2, 4, 0, 1)), 20) for i in batch]
    assert resumed == whole[24:64]


@pytest.mark.parametrize(("micro", "size"), [(2, 1), (2, 2), (4, 2)])
def test_similar_lengths_share_a_micro_batch_and_steps_keep_their_samples(micro, size):
    lengths = np.random.default_rng(0).permutation(50)
    shares = [Share(micro, 8, rank, size) for rank in range(size)]
    streams = [iter(TrainOrder(50, 7, 0, share, lambda indices: lengths[indices])) for share in shares]
    for expected in global_batches(1, 1, 14):
        # side by side, every other round from the last rank to the first
        rounds = [[next(stream) for stream in streams] for _ in range(shares[0].num_microbatches)]
        rounds[1::2] = [batches[::-1] for batches in rounds[1::2]]
        step = [index for batches in rounds for batch in batches for index in batch]
        assert sorted(step) == expected
        assert [lengths[index] for index in step] == sorted(lengths[expected], reverse=True)


def test_no_rank_has_the_longest_texts_of_all_rounds():
    """Padded tokens of a rank, over many steps: the ranks wait for the one with the most at each step's end."""
    lengths = np.random.default_rng(0).permutation(400)
    streams = [iter(TrainOrder(400, 7, 0, Share(4, 64, r, 4), lambda indices: lengths[indices])) for r in range(4)]
    steps = [[sum(lengths[next(s)].max() for _ in range(4)) for s in streams] for _ in range(50)]
    most_over_mean = [max(step) / np.mean(step) for step in steps]
    assert np.mean(most_over_mean) < 1.03  # 1.18 if each round began with rank 0


def test_a_blend_sorts_by_length_within_a_step():
    lengths = np.random.default_rng(0).permutation(sum(SIZES))
    plain = BlendOrder(SIZES, WEIGHTS, 7, 0, Share(8, 8, 0, 1))
    by_length = BlendOrder(SIZES, WEIGHTS, 7, 0, Share(8, 8, 0, 1), lambda indices: lengths[indices])
    for expected, step in islice(zip(plain, by_length, strict=True), 20):
        assert step == sorted(expected, key=lambda index: -lengths[index])


@pytest.mark.parametrize("blend", [False, True])
def test_a_resumed_stream_sorts_by_length_as_the_whole_one_did(blend):
    def rounds(micro, size, count, consumed=0):
        """`count` x 8 samples in the order in which the ranks compute them, side by side; texts of five lengths."""
        shares = [Share(micro, 8, rank, size) for rank in range(size)]
        ends = [(consumed, share, lambda indices: indices % 5) for share in shares]
        streams = [BlendOrder(SIZES, WEIGHTS, 7, *end) if blend else TrainOrder(50, 7, *end) for end in ends]
        side_by_side = islice(zip(*streams, strict=True), count * shares[0].num_microbatches)
        return [index for batches in side_by_side for batch in batches for index in batch]

    whole = rounds(1, 1, 20)
    assert rounds(1, 1, 10, consumed=80) == whole[80:]
    assert rounds(2, 4, 10, consumed=80) == whole[80:], "on other hardware"


def test_the_order_depends_on_seed_and_epoch_only():
    assert epoch_order(50, 1, 0).tolist() == epoch_order(50, 1, 0).tolist()
    assert len({tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@pytest.mark.parametrize("num_samples", [1, 7, 8, 21])
@pytest.mark.parametrize(("micro", "size"), [(1, 1), (2, 2), (1, 4), (4, 2)])
def test_evaluation_is_complete_ordered_repeatable_and_even(num_samples, micro, size):
    orders = [EvaluationOrder(num_samples, Share(micro, 8, rank, size)) for rank in range(size)]
    streams = [list(order) for order in orders]
    assert streams == [list(order) for order in orders]
    assert {len(stream) for stream in streams} == {len(orders[0])}
    assert len(orders[0]) % Share(micro, 8, 0, size).num_microbatches == 0
    assert {len(batch) for stream in streams for batch in stream} == {micro}
    # micro batch m of all ranks, one after the other, is the file's order
    seen = np.array(streams).transpose(1, 0, 2).reshape(-1)
    assert seen[:num_samples].tolist() == list(range(num_samples))
    assert (seen[num_samples:] < 0).all()  # fill carries no loss
    assert (~seen[num_samples:] < num_samples).all()


def test_each_step_of_an_evaluation_has_a_sample_that_counts():
    for num_samples in range(1, 30):
        order = EvaluationOrder(num_samples, Share(1, 8, 0, 1))
        steps = np.array(list(order)).reshape(-1, 8)
        assert (steps >= 0).any(axis=1).all()


SIZES, WEIGHTS = (50, 20, 7), (5, 3, 1)


def blended(micro, size, count, consumed=0):
    """The first `count` global batches of 8, put together from all ranks' micro batches."""
    shares = [Share(micro, 8, rank, size) for rank in range(size)]
    streams = [iter(BlendOrder(SIZES, WEIGHTS, 7, consumed, share)) for share in shares]
    batches = []
    for _ in range(count):
        parts = [list(islice(stream, share.num_microbatches)) for stream, share in zip(streams, shares, strict=True)]
        batches.append(sorted(i for part in parts for micro_batch in part for i in micro_batch))
    return batches


@pytest.mark.parametrize(("micro", "size"), [(1, 2), (2, 2), (8, 1), (1, 8)])
def test_a_blend_does_not_depend_on_ranks_or_micro_batch_size_and_resumes(micro, size):
    assert blended(micro, size, 30) == blended(1, 1, 30)
    assert blended(micro, size, 10, consumed=160) == blended(1, 1, 30)[20:]


def test_a_blend_keeps_its_shares_and_each_dataset_its_epochs():
    stream = [index for batch in islice(BlendOrder(SIZES, WEIGHTS, 7, 0, Share(8, 8, 0, 1)), 90) for index in batch]
    starts = (0, 50, 70)
    for dataset, (start, size, weight) in enumerate(zip(starts, SIZES, WEIGHTS, strict=True)):
        own = [index - start for index in stream if start <= index < start + size]
        assert len(own) == 720 * weight // 9
        counts = np.bincount(own, minlength=size)
        assert counts.max() - counts.min() <= 1, f"dataset {dataset}: each sample once before one comes again"


def test_a_rank_sees_all_datasets():
    """Two datasets by turns, two ranks: without a shuffle each rank would only ever see one of them."""
    stream = islice(BlendOrder((10, 10), (1, 1), 7, 0, Share(1, 8, 0, 2)), 40)
    assert {index >= 10 for batch in stream for index in batch} == {False, True}


@pytest.mark.parametrize("weights", [(7, 3), (1, 1, 1), (5, 3, 1), (1000, 1)])
def test_counts_of_a_blend_are_those_of_taking_one_after_the_other(weights):
    counts = [0] * len(weights)
    for num_samples in range(500):
        assert blend_counts(weights, num_samples) == counts
        assert all(abs(n - num_samples * w / sum(weights)) < 1 for n, w in zip(counts, weights, strict=True))
        counts[next_dataset(weights, counts)] += 1


def test_weights_become_whole_numbers():
    assert whole_weights([0.7, 0.3]) == (7, 3)
    assert whole_weights([2, 4.0, 0.5]) == (4, 8, 1)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="isn't a multiple of micro_batch_size 3 x data-parallel size 2"):
        Share(3, 8, 0, 2)
    with pytest.raises(ValueError, match="no sample"):
        TrainOrder(0, 0, 0, Share(1, 1, 0, 1))
    with pytest.raises(ValueError, match="no sample"):
        EvaluationOrder(0, Share(1, 1, 0, 1))
