from types import SimpleNamespace

import pytest

from vlmsft.data.skips import Skip
from vlmsft.errors import UserError
from vlmsft.runtime.skipped import SkippedSamples, num_skipped


def batch(*lines):
    return {"skipped": [Skip(f"train.jsonl:{line}", "broken", "train.jsonl", 100) for line in lines]}


def test_counts_over_ranks_and_stops_above_the_share(tmp_path):
    path = tmp_path / "skipped_samples.jsonl"
    trainer = SimpleNamespace(datamodule=SimpleNamespace(max_skipped_share=0.02), is_global_zero=True)
    step = SimpleNamespace(trainer=trainer)
    here, there = SkippedSamples(path), SkippedSamples(path)
    trainer.callbacks = [here]
    here.on_megatron_microbatch_start(step, {"tokens": 1})
    assert not path.exists() and num_skipped(trainer) == 0
    here.on_megatron_microbatch_start(step, batch(1))
    there.on_megatron_microbatch_start(step, batch(2, 1))
    assert num_skipped(trainer) == here.count == 2
    with pytest.raises(UserError, match=r"3 of 100 samples"):
        there.on_megatron_microbatch_start(step, batch(5))


def test_the_last_line_says_how_many(tmp_path, capsys):
    callback = SkippedSamples(tmp_path / "skipped_samples.jsonl")
    callback.file.add(batch(1, 7)["skipped"])
    callback.on_train_end(SimpleNamespace(is_global_zero=True), None)
    assert "2 unreadable samples of train.jsonl skipped: see" in capsys.readouterr().out
