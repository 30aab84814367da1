import json
import pickle

import pytest
import torch
from PIL import Image

from vlmsft.data.dataset import ConversationDataset, UserErrorLoader
from vlmsft.errors import UserError


@pytest.fixture
def dataset(sample_folder):
    return ConversationDataset(
        str(sample_folder / "train.jsonl"), str(sample_folder / "images"), str(sample_folder / "processor"), 256
    )


def loader(dataset, **kwargs):
    return UserErrorLoader(dataset, mode="train", collate_fn=dataset.collate, **kwargs)


def test_the_whole_sample_set_encodes(dataset):
    counts = {len(dataset[index].num_tiles) for index in range(len(dataset))}
    assert counts == {0, 1, 2}


def test_a_negative_index_is_the_same_sample_without_loss(dataset):
    real, filler = dataset[5], dataset[~5]
    assert filler.tokens.equal(real.tokens)
    assert (filler.labels == -100).all()
    assert (real.labels != -100).any()


def test_datasets_pickle_small(dataset):
    data = pickle.dumps(dataset)
    assert len(data) < 2000
    assert pickle.loads(data)[3].tokens.equal(dataset[3].tokens)


def test_workers_and_main_process_give_the_same_batches(dataset):
    subset = {"batch_sampler": [[0, 100], [102, ~3]]}
    here, there = list(loader(dataset, **subset)), list(loader(dataset, num_workers=2, **subset))
    for one, other in zip(here, there, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_reaches_the_user_with_file_and_line(tmp_path, sample_folder, num_workers):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.jpg")
    (tmp_path / "bad.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:200])
    turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"image": n, "conversations": turns}) + "\n" for n in ("good.jpg", "bad.jpg")))
    dataset = ConversationDataset(str(path), str(tmp_path), str(sample_folder / "processor"), 256)
    batches = iter(loader(dataset, num_workers=num_workers))
    next(batches)
    with pytest.raises(UserError) as raised:
        next(batches)
    (problem,) = raised.value.problems
    assert str(problem).startswith(f"{path}:2: found unreadable image {tmp_path / 'bad.jpg'}")
