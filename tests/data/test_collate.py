import pytest
import torch

from vlmsft.data.collate import collate, padded_length
from vlmsft.data.encode import IGNORE, SampleEncoder
from vlmsft.data.records import Turn

PAD = 500


def conversation(question, answer="猫。"):
    return [Turn.from_text("user", question), Turn.from_text("assistant", answer)]


@pytest.fixture
def samples(encoder, photo):
    two = encoder.encode(conversation("<image>\n<image>\n違いは？"), [photo, photo.resize((50, 50))])
    none = encoder.encode(conversation("首都は？", "東京です。" * 20), [])
    one = encoder.encode(conversation("<image>\n何？"), [photo])
    return [two, none, one]


def test_mixed_image_counts_follow_the_contract(samples):
    batch = collate(samples, PAD)
    length = padded_length(max(len(s.tokens) for s in samples))
    for key, dtype in [("tokens", torch.int64), ("labels", torch.int64), ("position_ids", torch.int64)]:
        assert batch[key].shape == (3, length)
        assert batch[key].dtype == dtype
    assert batch["loss_mask"].dtype == torch.float32
    assert batch["image_sample"].tolist() == [0, 0, 2]
    assert batch["num_tiles"].tolist() == [4, 1, 4]
    assert batch["tiles"].shape == (9, 3, 112, 112)
    assert batch["tiles"].dtype == torch.uint8
    assert batch["tiles"][5:].equal(samples[2].tiles)
    assert batch["visible_from"].tolist() == [5, 6, 5]
    assert batch["visible_until"].tolist() == [len(samples[0].tokens)] * 2 + [len(samples[2].tokens)]
    for row, sample in enumerate(samples):
        size = len(sample.tokens)
        assert batch["tokens"][row].tolist() == sample.tokens.tolist() + [PAD] * (length - size)
        assert batch["labels"][row].tolist() == sample.labels.tolist() + [IGNORE] * (length - size)
    assert batch["loss_mask"].equal((batch["labels"] != IGNORE).float())
    assert batch["position_ids"][2].tolist() == list(range(length))


def test_text_only_batch_has_no_tile(samples):
    batch = collate([samples[1]], PAD)
    assert batch["tiles"].shape == (0, 3, 112, 112)
    for key in ("image_sample", "num_tiles", "aspect_ratio_ids", "visible_from", "visible_until"):
        assert batch[key].shape == (0,)
        assert batch[key].dtype == torch.int64


def test_lengths_are_multiples_of_64_within_the_rounded_limit(encoder):
    assert [padded_length(n) for n in (1, 64, 65, 180, 256)] == [64, 64, 128, 192, 256]
    limited = SampleEncoder(encoder.processor_path, 180)
    batch = collate([limited.encode(conversation("何？", "長い" * 200), [])], PAD)
    assert batch["tokens"].shape == (1, 192)
    assert batch["num_truncated_tokens"].tolist()[0] > 0
    assert batch["num_text_tokens"].tolist() == [180]


def test_a_sample_without_loss_has_an_empty_loss_mask(samples):
    batch = collate([samples[0].without_loss(), samples[1]], PAD)
    assert batch["loss_mask"][0].sum() == 0
    assert batch["loss_mask"][1].sum() > 0
    assert batch["tokens"][0, : len(samples[0].tokens)].equal(samples[0].tokens)
