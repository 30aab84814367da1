"""The demo's own assertions: each of them fails for a model that deserves it, and for no other."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch

from vlmsft.data.encode import IGNORE, EncodedSample
from vlmsft.errors import UserError
from vlmsft.runtime.overfit import OverfitCheck, permute_images


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


# --- the check --------------------------------------------------------------------------------------------------------

NUM_ANSWERS = 10


def question(number: int) -> EncodedSample:
    """Picture and text both tell the answer, which is `number`, twice."""
    answer = torch.tensor([IGNORE, number, number, IGNORE])
    return dataclasses.replace(sample(number), tokens=torch.full((4,), number), labels=answer)


class Model:
    """Answers every question with one number, which `answer` reads from (picture, text)."""

    def __init__(self, answer):
        self.answer = answer
        self.modes = []

    def eval(self):
        self.modes.append("eval")

    def train(self):
        self.modes.append("train")

    def data_step(self, batches):
        return next(batches)

    def forward_step(self, batch):
        assert "labels" not in batch and self.modes[-1] == "eval"
        logits = torch.zeros(*batch["tokens"].shape, NUM_ANSWERS)
        for row, tile in zip(batch["image_sample"], batch["tiles"], strict=True):
            logits[row, :, self.answer(int(tile[0, 0, 0]), int(batch["tokens"][row, 0]))] = 1.0
        return logits


def looks(picture, text):
    return picture


def knows_the_text_only(picture, text):
    return text


def has_not_learned(picture, text):
    return 0


def has_learned_all_but_one(picture, text):
    return 0 if picture == 5 else picture


@pytest.fixture
def check(monkeypatch):
    """Runs the check at the end of a training of 5 questions, and gives what on_fit_end raised."""
    gather = SimpleNamespace(gather_from_tensor_model_parallel_region=lambda logits: logits)  # one rank
    monkeypatch.setitem(sys.modules, "megatron.core.tensor_parallel", gather)
    samples = [question(number) for number in (1, 2, 3, 4, 5)]

    class Dataset:
        encoder = SimpleNamespace(pad_token_id=0)

        def __len__(self):
            return len(samples)

        def sample(self, index):
            return samples[index]

    validation = SimpleNamespace(dataset=Dataset())

    def check(answer, loss=0.1, loader=validation):
        data = SimpleNamespace(val_dataloader=lambda: loader, micro_batch_size=2)
        metrics = {"reduced_train_loss": torch.tensor(loss)}
        trainer = SimpleNamespace(datamodule=data, callback_metrics=metrics, is_global_zero=True)
        callback, model = OverfitCheck(max_train_loss=0.3, min_answers=1.0, max_answers_permuted=0.5), Model(answer)
        callback.on_train_end(trainer, model)
        try:
            callback.on_fit_end(trainer, model)
        except UserError as error:
            return str(error)
        return None

    return check


def test_a_model_that_learned_and_looks_passes(check, capsys):
    assert check(looks) is None
    said = "training loss 0.1000; validation answers reproduced: 100.0%, with the images permuted: 0.0%"
    assert said in capsys.readouterr().out


PREFIX = "OverfitCheck: "
NOT_REPRODUCED = PREFIX + "share of answers reproduced: found {}, expected at least 1.0"


@pytest.mark.parametrize(
    ("answer", "loss", "problem"),
    [
        (looks, 0.3, PREFIX + "training loss: found 0.3, expected under 0.3"),
        (looks, float("nan"), PREFIX + "training loss: found nan, expected under 0.3"),
        (has_not_learned, 0.1, NOT_REPRODUCED.format("0")),
        (has_learned_all_but_one, 0.1, NOT_REPRODUCED.format("0.8")),
        (
            knows_the_text_only,
            0.1,
            PREFIX + "share of answers reproduced with the images permuted: found 1, expected under 0.5",
        ),
    ],
)
def test_each_assertion_alone_fails_the_run(check, answer, loss, problem):
    assert check(answer, loss) == problem


def test_all_that_failed_is_told_at_once(check):
    assert len(check(has_not_learned, loss=2.0).splitlines()) == 2


def test_a_run_without_validation_can_not_pass(check):
    assert "found no validation set" in check(looks, loader=[])
