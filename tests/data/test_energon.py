import io
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from shard_toys import record_parts, write_folder

from vlmsft.errors import UserError

pytestmark = pytest.mark.nemo


@pytest.fixture
def arguments(shard_folder, sample_folder):
    return {
        "path": str(shard_folder),
        "validation_path": str(shard_folder),
        "processor": str(sample_folder / "processor"),
        "seq_length": 288,
        "decoder_seq_length": 256,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "num_workers": 0,
        "seed": 3,
        "shuffle_buffer_size": 10,
        "max_samples_per_sequence": 5,
        "parallel_shard_iters": 4,
    }


@pytest.fixture
def make(arguments):
    from vlmsft.data.energon import EnergonDataModule

    def make(**changes):
        return EnergonDataModule(**{**arguments, **changes})

    return make


@pytest.fixture
def ranks(ranks, monkeypatch):
    """Both ranks are in the state that `gathered` makes."""
    from vlmsft.data import energon

    def set_ranks(rank, size):
        ranks(rank, size)
        monkeypatch.setattr(energon, "_rank_and_size", lambda: (rank, size))

    set_ranks(0, 1)
    return set_ranks


def same(one, other) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a[key], b[key]) for a, b in zip(one, other, strict=True) for key in a
    )


def test_training_has_no_length_and_validation_is_complete_even_and_repeats(make, ranks, loaders, sample_folder):
    from vlmsft.data.preloaded import PreloadedDataModule

    files = {
        "train_path": str(sample_folder / "train.jsonl"),
        "validation_path": str(sample_folder / "validation.jsonl"),
    }
    for rank in range(2):
        ranks(rank, 2)
        module = make()
        train, validation = loaders(module)
        with pytest.raises(TypeError):
            len(train)
        first = list(validation)
        assert len(first) == len(validation) == 12  # 48 samples, micro batch 2, 2 ranks
        assert same(first, list(validation))
        names = ("processor", "seq_length", "decoder_seq_length", "micro_batch_size", "global_batch_size", "seed")
        options = {name: getattr(module, name) for name in names}
        folder = str(sample_folder / "images")
        preloaded = PreloadedDataModule(**files, image_folder=folder, num_workers=0, **options)
        assert same(first, list(loaders(preloaded)[1])), "the batches of preloaded data"


def test_resume_finds_its_place_and_validation_does_not_move(make, loaders):
    module = make()
    train, validation = loaders(module)
    batches = iter(train)
    list(islice(batches, 12))
    stored = io.BytesIO()
    torch.save({**module.state_dict(), "consumed_samples": 24}, stored)
    expected = list(islice(batches, 30))
    stored.seek(0)
    resumed = make()
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    assert resumed.data_sampler.init_consumed_samples == resumed.data_sampler.prev_consumed_samples == 24
    again, validation_again = loaders(resumed)
    assert same(expected, list(islice(again, 30)))
    assert same(list(validation), list(validation_again))


def test_another_order_is_refused_with_old_and_new_value(make, ranks, loaders, tmp_path, sample_folder):
    module = make()
    loaders(module)
    state = module.state_dict()
    ranks(0, 2)
    samples = record_parts(sample_folder / "train.jsonl", sample_folder / "images")
    other = write_folder(tmp_path / "other", {"train": samples[:50]})
    changed = make(num_workers=4, micro_batch_size=1, seed=4, path=str(other))
    with pytest.raises(UserError) as raised:
        changed.load_state_dict(state)
    found = {problem.where: (problem.found, problem.expected) for problem in raised.value.problems}
    assert found.pop("data.train_sha256")
    assert found == {
        "data.num_train_samples": ("50", "106 as in the checkpoint"),
        "data.num_workers": ("4", "0 as in the checkpoint"),
        "data.micro_batch_size": ("1", "2 as in the checkpoint"),
        "data.seed": ("4", "3 as in the checkpoint"),
        "data-parallel size": ("2", "1 as in the checkpoint"),
    }


def test_a_larger_global_batch_is_no_other_order(make, loaders):
    module = make()
    loaders(module)
    make(global_batch_size=16).load_state_dict(module.state_dict())


def test_a_run_that_goes_on_without_a_place_is_refused(make, ranks):
    """As with a checkpoint of another data module, for which Lightning calls no load_state_dict."""
    module = make()
    module.trainer = SimpleNamespace(global_step=5)
    with pytest.raises(
        UserError, match="a checkpoint of step 5 that holds no place in the stream of EnergonDataModule"
    ):
        module.train_dataloader()


def test_a_worker_without_a_sample_is_refused(make, ranks):
    ranks(0, 8)
    with pytest.raises(UserError, match="found 106 training samples, expected at least 128"):
        make(num_workers=16).train_dataloader()


def test_no_validation(make, loaders):
    train, validation = loaders(make(validation_path=None))
    assert validation == [] and next(iter(train))


def test_named_datasets(make, loaders, shard_folder):
    named = {"chat": {"path": str(shard_folder), "weight": 3}, "ocr": {"path": str(shard_folder), "weight": 1}}
    module = make(path=named, validation_path=named)
    train, validation = loaders(module)
    batches = list(validation)
    assert len(batches) == 48
    assert torch.cat([batch["validation_set"] for batch in batches]).tolist() == [0] * 48 + [1] * 48
    assert "validation_set" not in next(iter(train))
    assert module.state_dict()["weights"] == {"chat": 0.75, "ocr": 0.25}


def test_the_module_travels_with_a_checkpoint(make, tmp_path):
    from nemo.collections.llm.api import _set_with_io
    from nemo.lightning import io as nemo_io

    module = make()
    _set_with_io(module, "tokenizer", module.tokenizer)  # as llm.finetune does
    module.io_dump(tmp_path, yaml_attrs=[])
    loaded = nemo_io.load(tmp_path)
    assert (loaded.path, loaded.seed, loaded.global_batch_size) == (module.path, 3, 8)
