import io
import json
from itertools import islice

import pytest
import torch
from shard_toys import record_parts, write_folder

from vlmsft.errors import UserError

pytestmark = pytest.mark.nemo  # imports megatron.energon

OPTIONS = {
    "micro_batch_size": 4,
    "num_workers": 0,
    "seed": 1,
    "shuffle_buffer_size": 10,
    "max_samples_per_sequence": 5,
    "parallel_shard_iters": 4,
}


@pytest.fixture
def stream(shard_folder, encoder):
    """stream(rank=, size=, state=, folders=, weights=, on_error=, **options)"""
    from vlmsft.data.energon_shards import ShardFolder
    from vlmsft.data.energon_stream import StreamOptions, TrainStream

    def make(rank=0, size=1, state=None, folders=(shard_folder,), weights=(1.0,), on_error="raise", **options):
        opened = [ShardFolder.open(folder, "train") for folder in folders]
        choice = StreamOptions(**{**OPTIONS, **options})
        return TrainStream(opened, weights, encoder, choice, rank=rank, size=size, on_error=on_error, state=state)

    return make


def names(batch) -> list[bytes]:
    """Each sample of a batch by its content; padding left out."""
    found = []
    for row, labels in enumerate(batch["labels"]):
        images = (batch["image_sample"] == row).nonzero().flatten().tolist()
        starts = [0, *batch["num_tiles"].cumsum(0).tolist()]
        tiles = b"".join(batch["tiles"][starts[i] : starts[i + 1]].numpy().tobytes() for i in images)
        length = int((labels != -100).nonzero().max()) + 1
        found.append(batch["tokens"][row, :length].numpy().tobytes() + labels[:length].numpy().tobytes() + tiles)
    return found


def test_each_sample_is_that_of_the_record_file(stream, sample_folder, encoder):
    """An epoch of single samples, each bit for bit a batch of preloaded data."""
    from vlmsft.data.dataset import ConversationDataset

    records = ConversationDataset(
        str(sample_folder / "train.jsonl"), str(sample_folder / "images"), encoder.processor_path, 256
    )
    expected = [records.collate([records[index]]) for index in range(len(records))]
    by_name = {names(batch)[0]: batch for batch in expected}
    single = stream(micro_batch_size=1, shuffle_buffer_size=0, max_samples_per_sequence=1)
    seen = set()
    for batch in islice(single, len(records)):
        other = by_name[names(batch)[0]]
        assert batch.keys() == other.keys()
        assert all(torch.equal(batch[key], other[key]) for key in batch)
        seen.add(names(batch)[0])
    assert seen == set(by_name), "each sample comes once"


@pytest.mark.parametrize(("num_workers", "size"), [(0, 1), (2, 1), (0, 2), (2, 2)])
def test_a_place_is_found_again_exactly(stream, num_workers, size):
    for rank in range(size):
        first = stream(rank, size, num_workers=num_workers)
        batches = iter(first)
        before = [names(batch) for batch in islice(batches, 17)]  # in the middle of an epoch and of the workers' turns
        stored = io.BytesIO()
        torch.save({"state": first.state()}, stored)
        expected = [names(batch) for batch in islice(batches, 30)]
        stored.seek(0)
        state = torch.load(stored, weights_only=True)["state"]
        again = stream(rank, size, num_workers=num_workers, state=state)
        assert [names(batch) for batch in islice(again, 30)] == expected
        assert [names(batch) for batch in islice(stream(rank, size, num_workers=num_workers), 17)] == before


def test_ranks_share_the_samples_and_the_seed_changes_their_order(stream):
    epochs = [[n for batch in islice(stream(r, 2, shuffle_buffer_size=0), 12) for n in names(batch)] for r in (0, 1)]
    assert not set(epochs[0]) & set(epochs[1])
    other = [name for batch in islice(stream(0, 2, shuffle_buffer_size=0, seed=2), 12) for name in names(batch)]
    assert epochs[0] != other


def test_weights_are_the_share_of_a_dataset(stream, sample_folder, tmp_path):
    samples = record_parts(sample_folder / "train.jsonl", sample_folder / "images")
    text = json.dumps([{"from": "human", "value": "?"}, {"from": "gpt", "value": "xyzzy"}]).encode()
    one = write_folder(tmp_path / "one", {"train": samples[:20]})
    other = write_folder(tmp_path / "other", {"train": [{"json": text}] * 20})
    blended = stream(folders=(one, other), weights=(3, 1))
    rare = set(names(next(iter(stream(folders=(other,))))))
    drawn = [name in rare for batch in islice(blended, 300) for name in names(batch)]
    assert 0.21 < sum(drawn) / len(drawn) < 0.29  # 1200 draws: 4 standard deviations are 0.05
    first = iter(blended)
    state = blended.state()
    expected = [names(batch) for batch in islice(first, 20)]
    resumed = stream(folders=(one, other), weights=(3, 1), state=state)
    assert [names(batch) for batch in islice(resumed, 20)] == expected


GOOD = {"json": b'[{"from": "human", "value": "?"}, {"from": "gpt", "value": "x"}]'}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_sample_stops_the_run_and_is_named(stream, tmp_path, num_workers):
    folder = write_folder(tmp_path / "wds", {"train": [*[GOOD] * 9, {"json": b"{"}]})
    broken = stream(folders=(folder,), micro_batch_size=2, num_workers=num_workers)
    with pytest.raises(UserError, match=r"train-00000\.tar:000000009: found broken JSON") as raised:
        list(islice(broken, 20))
    assert raised.value.state == "the run stopped"
    skipping = stream(folders=(folder,), micro_batch_size=2, num_workers=num_workers, on_error="skip")
    skips = [skip for batch in islice(skipping, 20) for skip in batch.get("skipped", [])]
    assert {skip.where for skip in skips} == {f"{folder / 'train-00000.tar'}:000000009"}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_damaged_shard_stops_the_run_and_is_named(stream, tmp_path, num_workers, on_error):
    folder = write_folder(tmp_path / "wds", {"train": [GOOD] * 20})
    damaged = stream(folders=(folder,), micro_batch_size=2, num_workers=num_workers, on_error=on_error)
    path = folder / "train-00000.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] + b"x" * (path.stat().st_size // 2))
    with pytest.raises(UserError, match=r"train-00000\.tar: found unreadable"):
        list(islice(damaged, 40))


def test_only_energons_own_states_are_read():
    from vlmsft.data.energon_stream import from_plain, to_plain

    values = [1, None, 2.5, "a", b"\x00\xff", (1, ("b",)), [True]]
    assert from_plain(json.loads(json.dumps(to_plain(values)))) == values
    with pytest.raises(ValueError, match="not part of an Energon state"):
        from_plain({"kind": "subprocess:Popen", "value": {"args": "true"}})
    with pytest.raises(ValueError, match="not part of an Energon state"):
        from_plain({"kind": "megatron.energon.epathlib.epath:EPath", "value": {}})
    with pytest.raises(TypeError, match="no plain form of a set"):
        to_plain({1})
