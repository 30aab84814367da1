import hashlib
import io
import json
import tarfile

import pytest

from vlmsft.data.prepare import shards
from vlmsft.data.records import RecordFile


@pytest.fixture
def folder(tmp_path, photographs):
    """A folder of images and a prepared record file of 20 records: one image, several, none."""
    for name, data in photographs.items():
        (tmp_path / name).write_bytes(data)
    names = list(photographs)
    kinds = [{"image": names[number % 6]} for number in range(18)] + [{"image": names[:3]}, {}]
    lines = [json.dumps({**kind, "conversations": [number]}, ensure_ascii=False) for number, kind in enumerate(kinds)]
    (tmp_path / "training.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def plan(folder, **changes):
    values = {"max_mb": 0.08, "max_records": 100, "shuffle_seed": 1, **changes}
    return shards.plan(folder / "shards", "train", RecordFile(folder / "training.jsonl"), folder, **values)


def test_what_tarfile_reads(folder, photographs):
    records = RecordFile(folder / "training.jsonl")
    written = list(shards.write_all(plan(folder), 2))
    assert len(written) > 3
    parts = {}
    for shard in written:
        path = folder / "shards" / shard.name
        assert path.stat().st_size == shard.num_bytes <= 0.08 * 2**20 + 20480
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard.sha256
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.uname, member.mode) == (0, 0, "", 0o644)
                parts[member.name] = tar.extractfile(member).read()
    assert parts["000000018.2.jpg"] == list(photographs.values())[2]
    assert parts["000000018.json"] == records.line(18)
    assert {name for name in parts if name.startswith("000000019")} == {"000000019.json"}
    assert len(parts) == 18 * 2 + 4 + 1


def test_the_order_is_the_seeds(folder):
    def order(**changes):
        return [int(index) for shard in plan(folder, **changes) for index in shard.indices]

    assert sorted(order()) == list(range(20)) != order()
    assert order() == order() != order(shuffle_seed=2)
    assert order(shuffle_seed=None) == list(range(20))
    assert [len(shard.indices) for shard in plan(folder, max_mb=100, max_records=7)] == [7, 7, 6]


def test_a_record_larger_than_a_shard_has_its_own(folder):
    assert all(len(shard.indices) == 1 for shard in plan(folder, max_mb=1e-6))


def test_finished_shards_are_left_alone_and_the_rest_is_made(folder):
    first = list(shards.write_all(plan(folder), 1))
    times = {path.name: path.stat().st_mtime_ns for path in (folder / "shards").iterdir()}
    (folder / "shards" / first[1].name).unlink()
    assert list(shards.write_all(plan(folder), 2)) == first
    changed = {path.name for path in (folder / "shards").iterdir() if path.stat().st_mtime_ns != times[path.name]}
    assert changed == {first[1].name}


@pytest.mark.parametrize("size", [0, 1, 511, 512, 123456789])
def test_header_is_tarfiles(size):
    info = tarfile.TarInfo("000000018.2.jpg")
    info.size = size
    assert shards.header(b"000000018.2.jpg", size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_the_tar_is_the_one_that_tarfile_writes(folder):
    (shard,) = plan(folder, max_mb=100)
    shards.write(shard)
    with tarfile.open(shard.path) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert shard.path.read_bytes() == expected.getvalue()
