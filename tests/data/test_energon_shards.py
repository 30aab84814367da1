import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from shard_toys import record_parts, write_folder

from vlmsft.data.dataset import ConversationDataset, FailedBatch
from vlmsft.data.encode import EncodedSample
from vlmsft.data.energon_shards import ShardDataset, ShardFolder
from vlmsft.errors import UserError


def assert_equal(one: EncodedSample, other: EncodedSample):
    for field in fields(EncodedSample):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


@pytest.mark.parametrize(("split", "file"), [("train", "train.jsonl"), ("val", "validation.jsonl")])
def test_samples_equal_those_of_the_record_file(shard_folder, sample_folder, encoder, split, file):
    """All of them: text only, one image, several images."""
    shards = ShardDataset(ShardFolder.open(shard_folder, split), encoder)
    records = ConversationDataset(
        str(sample_folder / file), str(sample_folder / "images"), encoder.processor_path, encoder.decoder_seq_length
    )
    assert len(shards) == len(records)
    if split == "train":
        assert {len(records.sample(index).num_tiles) for index in range(len(records))} >= {0, 1, 2}
    for index in range(len(records)):
        assert_equal(shards.sample(index), records.sample(index))
    assert_equal(shards[~3], records[~3])
    batch, expected = (dataset.collate([dataset[0], dataset[7]]) for dataset in (shards, records))
    assert isinstance(batch, dict) and isinstance(expected, dict) and batch.keys() == expected.keys()
    assert all(torch.equal(batch[key], expected[key]) for key in batch)


def test_the_folder_above_will_do(shard_folder, tmp_path):
    (tmp_path / "shards").symlink_to(shard_folder)
    assert len(ShardFolder.open(tmp_path, "train")) == 106


def test_the_tutorials_shards_are_read(sample_folder, encoder, tmp_path):
    """Members <id>.jpg and <id>.json, the list of turns alone."""
    record = {
        "image": "cat.jpg",
        "conversations": [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "猫"}],
    }
    image = (sample_folder / "images" / "cat.jpg").read_bytes()
    theirs = {"jpg": image, "json": json.dumps(record["conversations"]).encode()}
    ours = {"0.jpg": image, "json": json.dumps(record).encode()}
    folder = ShardFolder.open(write_folder(tmp_path / "wds", {"train": [theirs, ours]}), "train")
    dataset = ShardDataset(folder, encoder)
    assert_equal(dataset.sample(0), dataset.sample(1))


def test_images_come_in_the_order_of_their_numbers(sample_folder, encoder, tmp_path):
    (parts,) = [p for p in record_parts(sample_folder / "train.jsonl", sample_folder / "images") if len(p) == 3][:1]
    turned = dict(reversed(parts.items()))
    dataset = ShardDataset(
        ShardFolder.open(write_folder(tmp_path / "wds", {"train": [parts, turned]}), "train"), encoder
    )
    assert_equal(dataset.sample(0), dataset.sample(1))


@pytest.fixture
def folder(sample_folder, tmp_path) -> Path:
    samples = record_parts(sample_folder / "train.jsonl", sample_folder / "images")[:10]
    return write_folder(tmp_path / "wds", {"train": samples, "val": samples}, size=5)


def problems(folder: Path, split: str = "train") -> str:
    with pytest.raises(UserError) as raised:
        ShardFolder.open(folder, split)
    return str(raised.value)


def test_a_missing_folder_names_the_command_that_makes_one(tmp_path):
    assert "python -m vlmsft.prepare dataset=sample" in problems(tmp_path / "none") and "no such folder" in problems(
        tmp_path / "none"
    )
    assert "no .nv-meta in" in problems(tmp_path)


def test_a_split_without_shards_is_refused(folder):
    assert "none (splits: train, val), expected shards in split 'test'" in problems(folder, "test")


def test_cut_and_missing_shards_are_all_named_before_training(folder):
    path = folder / "train-00000.tar"
    path.write_bytes(path.read_bytes()[:5000])
    (folder / "train-00001.tar").unlink()
    found = problems(folder)
    assert "5000 bytes, expected at least" in found and "the shard is cut" in found and "no such shard" in found
    assert len(ShardFolder.open(folder, "val")) == 10


def test_an_index_of_another_shard_is_refused(folder):
    index = folder / "train-00000.tar.idx"
    index.write_bytes(index.read_bytes()[:-8])
    assert "4 samples in its index, expected 5" in problems(folder)
    index.unlink()
    assert "the shard's index" in problems(folder)


def test_excluded_shards_are_left_out_and_single_samples_refused(folder):
    path = folder / ".nv-meta" / "split.yaml"
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**content, "exclude": ["train-00000.tar"]}))
    assert list(ShardFolder.open(folder, "train").counts) == ["train-00001.tar"]
    path.write_text(yaml.safe_dump({**content, "exclude": ["train-00000.tar/3"]}))
    assert "expected names of whole shards" in problems(folder)


def test_broken_metadata_is_named(folder):
    (folder / ".nv-meta" / ".info.yaml").write_text("shard_counts: [")
    assert ".info.yaml: found unreadable" in problems(folder)


def test_the_fingerprint_knows_shards_and_their_order(folder, sample_folder, tmp_path):
    before = ShardFolder.open(folder, "train").fingerprint
    samples = record_parts(sample_folder / "train.jsonl", sample_folder / "images")[:10]
    same = write_folder(tmp_path / "again", {"train": samples}, size=5)
    other = write_folder(tmp_path / "other", {"train": samples[::-1]}, size=5)
    assert ShardFolder.open(same, "train").fingerprint == before
    assert ShardFolder.open(other, "train").fingerprint != before


TURNS = b'[{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "x"}]'
RECORD = b'{"image": "a.jpg", "conversations": ' + TURNS + b"}"
BROKEN = {
    "part 0.jpg": {"0.jpg": b"no image", "json": RECORD},
    "a part json": {"0.jpg": b"no image"},
    "broken JSON": {"json": b"{"},
    "image part(s) (none)": {"json": RECORD},
    "robot": {"json": b'[{"from": "robot", "value": "x"}]'},
}


@pytest.mark.parametrize("expected", BROKEN)
def test_a_broken_sample_is_named_by_shard_and_key_or_skipped(encoder, tmp_path, expected):
    good = {"json": b'[{"from": "human", "value": "?"}, {"from": "gpt", "value": "x"}]'}
    folder = ShardFolder.open(write_folder(tmp_path / "wds", {"train": [good, BROKEN[expected]]}), "train")
    where = f"{folder.path / 'train-00000.tar'}:000000001"
    dataset = ShardDataset(folder, encoder)
    batch = dataset.collate([dataset[0], dataset[1]])
    assert isinstance(batch, FailedBatch)
    assert batch.problems[0].where.startswith(where) and expected in str(batch.problems[0])
    skipping = ShardDataset(folder, encoder, on_error="skip")
    (skip,) = skipping.collate([skipping[0], skipping[1]])["skipped"]
    assert (skip.where, skip.dataset, skip.num_samples) == (where, str(folder.path), 2)


def test_a_damaged_shard_is_never_skipped(folder, encoder):
    opened = ShardFolder.open(folder, "train")
    (folder / "train-00000.tar").write_bytes(b"x" * (folder / "train-00000.tar").stat().st_size)
    dataset = ShardDataset(opened, encoder, on_error="skip")
    item = dataset[2]
    assert isinstance(item, UserError) and "train-00000.tar, sample 2: found unreadable" in str(item)
