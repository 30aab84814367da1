from __future__ import annotations

import pytest
import torch

from vlmsft.data.encode import EncodedSample
from vlmsft.runtime.overfit import permute_images


def sample(*pictures: int) -> EncodedSample:
    """One tile for each picture, filled with its number."""
    ones = torch.ones(len(pictures), dtype=torch.int64)
    return EncodedSample(
        tokens=torch.arange(4),
        labels=torch.arange(4),
        tiles=torch.stack([torch.full((3, 2, 2), picture, dtype=torch.uint8) for picture in pictures]),
        num_tiles=ones,
        aspect_ratio_ids=ones,
        visible_from=ones * 0,
        visible_until=ones * 4,
    )


def test_every_sample_gets_another_picture_and_keeps_its_text():
    samples = [sample(1), sample(1), sample(2), sample(3), sample(3)]
    permuted = permute_images(samples)
    for before, after in zip(samples, permuted, strict=True):
        assert not torch.equal(before.tiles, after.tiles)
        assert torch.equal(before.labels, after.labels)


def test_samples_are_exchanged_with_others_of_as_many_images():
    permuted = permute_images([sample(1), sample(2, 3), sample(4), sample(5, 6)])
    assert [len(after.num_tiles) for after in permuted] == [1, 2, 1, 2]


def test_no_other_picture_is_an_error():
    with pytest.raises(ValueError, match="sample 0"):
        permute_images([sample(1), sample(1)])
