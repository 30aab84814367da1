"""Whole data sets with every fault in them, read as the command reads them."""

import json
import shutil
import tarfile

import pytest
import yaml

from vlmsft.data.check.parts import Settings
from vlmsft.data.check.scan import RECORDS_OF_TASK, Scan
from vlmsft.data.check.sources import Records, shards_of
from vlmsft.errors import UserError


def turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


GOOD = {"id": "1", "image": "moon.jpg", "conversations": turns("<image>\n何ですか？", "月です。")}
LONG = "長い" * 300


@pytest.fixture
def images(tmp_path, sample_folder):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("moon.jpg", "cat.jpg"):
        shutil.copy(sample_folder / "images" / name, folder)
    whole = (folder / "cat.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "noise.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture
def settings(sample_folder):
    return Settings(str(sample_folder / "processor"), 256, "full")


def write(path, records):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return path


def scan_of(sets, settings, tmp_path, num_workers=1):
    scan = Scan(sets, num_examples=5)
    scan.run(settings, num_workers, tmp_path / "findings.jsonl", lambda *progress: None)
    return scan


def rows(tmp_path):
    return [json.loads(line) for line in (tmp_path / "findings.jsonl").read_text().splitlines()]


FAULTS = {
    "broken JSON": "{broken\n",
    "no turns": {"image": "moon.jpg"},
    "image names": {"image": 3, "conversations": turns("<image>q", "a")},
    "role": {"conversations": [{"from": "humann", "value": "q"}]},
    "content": {"conversations": turns("q", 3)},
    "empty text": {"conversations": turns("q", " ")},
    "no answer": {"conversations": turns("q", "a")[:1]},
    "markers": {"image": "moon.jpg", "conversations": turns("q", "a")},
    "missing image": {**GOOD, "id": "2", "image": "gone.jpg"},
    "unreadable image": {**GOOD, "id": "3", "image": "half.jpg"},
    "too long": {"conversations": turns(LONG, "a")},
    "truncated": {"conversations": turns("q", LONG)},
    "same record": {**GOOD, "id": "4"},
    "same id": {"id": "1", "conversations": turns("q", "other")},
}


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_is_found_alone_with_its_line(kind, tmp_path, images, settings):
    path = write(tmp_path / "train.jsonl", [GOOD, FAULTS[kind]])
    scan = scan_of([Records("training", str(path), str(images))], settings, tmp_path)
    assert dict(scan.counts) == {kind: 1}
    (row,) = rows(tmp_path)
    assert row["where"].startswith(f"{path}:2")
    assert scan.is_complete
    assert scan.is_clean == (row["outcome"] == "remark") == (kind in ("same record", "same id"))


def test_half_a_surrogate_pair_is_found(tmp_path, images, settings):
    path = write(tmp_path / "train.jsonl", [{"conversations": turns("q", "\ud83d")}])
    assert scan_of([Records("training", str(path), None)], settings, tmp_path).counts == {"content": 1}


def test_a_clean_set_and_its_statistics(tmp_path, images, settings):
    text = {"conversations": turns("首都は？", "東京。")}
    two = {"image": ["moon.jpg", "cat.jpg"], "conversations": turns("<image><image>q", "a") + turns("r", "b")}
    path = write(tmp_path / "train.jsonl", [GOOD, text, two])
    scan = scan_of([Records("training", str(path), str(images))], settings, tmp_path)
    assert scan.is_clean and not scan.counts
    statistics = scan.statistics
    assert statistics.num_records == 3
    assert statistics.images_per_sample.counts[:3].tolist() == [1, 1, 1]
    assert statistics.turns.counts.nonzero()[0].tolist() == [2, 4]
    assert statistics.num_images == 2
    assert len(scan.largest) == len(scan.smallest) == 2
    assert scan.largest[0].size > scan.largest[1].size
    longest = scan.longest[0]
    assert longest.size == statistics.token_lengths.max
    assert statistics.proposed_length(1.0) == 64


def test_lengths_are_those_of_training(tmp_path, sample_folder, settings):
    from vlmsft.data.dataset import ConversationDataset

    path, folder = sample_folder / "train.jsonl", str(sample_folder / "images")
    scan = scan_of([Records("training", str(path), folder)], settings, tmp_path)
    samples = ConversationDataset(str(path), folder, settings.processor, 256)
    lengths = sorted(len(samples[index].tokens) for index in range(len(samples)))
    counts = scan.statistics.token_lengths.counts
    assert [n for n, times in enumerate(counts) for _ in range(times)] == lengths
    tiles = sum(int(samples[index].num_tiles.sum()) for index in range(len(samples)))
    assert tiles >= scan.statistics.tiles.mean * len(scan.statistics.tiles)


def test_images_are_looked_at_as_deep_as_asked(tmp_path, images, settings):
    names = ["half.jpg", "noise.jpg", "gone.jpg"]
    path = write(tmp_path / "train.jsonl", [{**GOOD, "id": name, "image": name} for name in names * 2])
    for depth, unreadable in (("full", 2), ("headers", 1), ("none", 0)):
        scan = scan_of([Records("training", str(path), str(images))], settings._replace(images=depth), tmp_path)
        assert scan.counts["unreadable image"] == unreadable
        assert scan.counts["missing image"] == 1
        assert all(finding.text.endswith(", in 2 places") for finding in scan.examples["missing image"])


def test_a_json_list_is_read_by_workers_as_a_jsonl_file_is(tmp_path, images, settings):
    records = [GOOD, *(fault for fault in FAULTS.values() if not isinstance(fault, str))]
    lines = write(tmp_path / "train.jsonl", records)
    (tmp_path / "train.json").write_text(json.dumps(records))
    one = scan_of([Records("training", str(lines), str(images))], settings, tmp_path)
    sets = [Records("training", str(tmp_path / "train.json"), str(images))]
    other = scan_of(sets, settings, tmp_path, num_workers=2)
    assert other.counts == one.counts
    assert other.statistics == one.statistics
    assert f"{tmp_path / 'train.json'}[8] (id 2)" in [row["where"] for row in rows(tmp_path)]


def test_validation_records_that_training_holds(tmp_path, images, settings):
    train = write(tmp_path / "train.jsonl", [GOOD, {"conversations": turns("q", "a")}])
    val = write(tmp_path / "val.jsonl", [{"conversations": turns("q", "b")}, {**GOOD, "id": "9"}])
    sets = [Records("training", str(train), str(images)), Records("validation", str(val), str(images))]
    scan = scan_of(sets, settings, tmp_path)
    assert dict(scan.counts) == {"in both": 1}
    (finding,) = scan.examples["in both"]
    assert (finding.where, finding.text) == (f"{val}:2", f"as {train}:1")
    assert scan.splits == {"training": 2, "validation": 2}


def test_an_interrupt_leaves_what_was_read(tmp_path, images, settings):
    path = write(tmp_path / "train.jsonl", [{"conversations": turns("q", " ")}] * (RECORDS_OF_TASK + 1))
    scan = Scan([Records("training", str(path), None)], num_examples=1)

    def interrupt(name, done, total):
        if done:
            raise KeyboardInterrupt

    scan.run(settings, 1, tmp_path / "findings.jsonl", interrupt)
    assert not scan.is_complete
    assert scan.read == {"records": (RECORDS_OF_TASK, RECORDS_OF_TASK + 1)}
    assert scan.counts["empty text"] == len(rows(tmp_path)) == RECORDS_OF_TASK


# --- shards -----------------------------------------------------------------------------------------------------------


def shards(tmp_path, images, samples, count=None):
    """A folder with one training shard. samples: [(key, record or text or None, image names)]"""
    folder = tmp_path / "shards"
    (folder / ".nv-meta").mkdir(parents=True)
    with tarfile.open(folder / "train-00000.tar", "w") as tar:
        for key, record, names in samples:
            for position, name in enumerate(names):
                tar.add(images / name, f"{key}.{position}.jpg")
            if record is not None:
                (tmp_path / "json").write_text(record if isinstance(record, str) else json.dumps(record))
                tar.add(tmp_path / "json", f"{key}.json")
    count = len(samples) if count is None else count
    (folder / ".nv-meta" / ".info.yaml").write_text(yaml.safe_dump({"shard_counts": {"train-00000.tar": count}}))
    split = {"split_parts": {"train": ["train-00000.tar"], "val": []}, "exclude": []}
    (folder / ".nv-meta" / "split.yaml").write_text(yaml.safe_dump(split))
    return folder


SHARD_FAULTS = {
    "broken JSON": ("2", "{broken", ["moon.jpg"]),
    "markers": ("2", {**GOOD, "id": "2", "conversations": turns("q", "a")}, ["moon.jpg"]),
    "missing image": ("2", {**GOOD, "id": "2", "conversations": turns("<image>q", "a")}, []),
    "unreadable image": ("2", {**GOOD, "id": "2", "conversations": turns("<image>q", "a")}, ["half.jpg"]),
    "missing part": ("2", None, ["moon.jpg"]),
    "truncated": ("2", {"conversations": turns("q", LONG)}, []),
    "same record": ("2", {**GOOD, "id": "2"}, ["moon.jpg"]),
}


@pytest.mark.parametrize("kind", SHARD_FAULTS)
def test_each_fault_in_a_shard_is_found_alone_with_its_key(kind, tmp_path, images, settings):
    folder = shards(tmp_path, images, [("1", GOOD, ["moon.jpg"]), SHARD_FAULTS[kind]])
    scan = scan_of(shards_of(str(folder)), settings, tmp_path)
    assert dict(scan.counts) == {kind: 1}
    (finding,) = scan.examples[kind]
    place = ", sample 2" if kind == "same record" else ":2"
    assert finding.where == f"{folder / 'train-00000.tar'}{place}"
    if kind == "unreadable image":
        assert finding.image is not None, "half a picture can be shown"


def test_a_clean_shard_counts_as_its_records_do(tmp_path, images, settings):
    text = {"conversations": turns("首都は？", "東京。")}
    folder = shards(tmp_path, images, [("1", GOOD, ["moon.jpg"]), ("2", text, [])])
    scan = scan_of(shards_of(str(folder)), settings, tmp_path)
    assert scan.is_clean and not scan.counts
    path = write(tmp_path / "train.jsonl", [GOOD, text])
    assert scan_of([Records("training", str(path), str(images))], settings, tmp_path).statistics == scan.statistics


def test_a_key_repeated_in_a_row_merges_samples(tmp_path, images, settings):
    other = {"id": "2", "conversations": turns("q", "a")}
    folder = shards(tmp_path, images, [("1", GOOD, ["moon.jpg"]), ("1", other, [])], count=1)
    scan = scan_of(shards_of(str(folder)), settings, tmp_path)
    assert scan.counts["merged"] == 1 and not scan.is_clean


@pytest.mark.parametrize("keep", ["half of a member", "whole members without the end mark"])
def test_a_shard_that_breaks_off_is_read_up_to_there(keep, tmp_path, images, settings):
    folder = shards(tmp_path, images, [("1", GOOD, ["moon.jpg"]), ("2", {"conversations": turns("q", "a")}, [])])
    path = folder / "train-00000.tar"
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + (512 if keep.startswith("whole") else 10)
    path.write_bytes(path.read_bytes()[:end])
    scan = scan_of(shards_of(str(folder)), settings, tmp_path)
    assert dict(scan.counts) == {"shard": 1}
    assert scan.statistics.num_records == (2 if keep.startswith("whole") else 1)


def test_a_folder_without_metadata_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="vlmsft prepare"):
        shards_of(str(tmp_path))
