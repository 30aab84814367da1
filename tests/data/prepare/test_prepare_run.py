import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import replace

import pytest

from vlmsft.config_files import root
from vlmsft.data.prepare import run, shards
from vlmsft.data.prepare.files import sha256_of
from vlmsft.data.prepare.run import prepare
from vlmsft.data.records import RecordFile, parse
from vlmsft.errors import UserError


def state(folder):
    """Content and time of every file."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, sha256_of(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def keys_in(folder, prefix):
    keys = []
    for name in shards.file_names(folder):
        if name.startswith(prefix):
            with tarfile.open(folder / name) as tar:
                keys += dict.fromkeys(member.name.split(".")[0] for member in tar)
    return keys


def test_from_the_web_to_shards_and_a_second_time(settings, server, zip_archive):
    """The tutorial's way: names coco/train2017/..., an archive from the web that is cut twice."""
    server.content = zip_archive.read_bytes()
    server.cut_after = len(server.content) // 2
    asked = settings(images=server.url, images_sha256=sha256_of(zip_archive))
    manifest = prepare(asked)
    out = asked.output
    assert manifest["finished"] and len(server.requests) == 2
    assert manifest["counts"] == {
        "records": 40, "training": 36, "validation": 4, "text_only": 1, "multi_image": 1, "images": 6, "dropped": {},
    }  # fmt: skip
    assert manifest["inputs"]["images"]["sha256"] == sha256_of(zip_archive)
    for name, facts in manifest["outputs"].items():
        assert facts["sha256"] == sha256_of(out / name) and facts["bytes"] == (out / name).stat().st_size
    records = RecordFile(out / "training.jsonl")
    assert all((out / "images" / name).is_file() for n in range(36) for name in parse(records[n]).images)
    assert (
        sorted(keys_in(out / "shards", "train")) == [f"{n:09d}" for n in range(36)] != keys_in(out / "shards", "train")
    )
    assert keys_in(out / "shards", "val") == [f"{n:09d}" for n in range(4)]
    assert not (out / ".work").exists() and not list(out.rglob("*.partial"))

    before = state(out)
    assert prepare(asked) == manifest
    assert state(out) == before and len(server.requests) == 2


def test_energon_reads_the_shards(settings, zip_archive):
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        WorkerConfig,
        get_loader,
        get_train_dataset,
        get_val_dataset,
    )

    asked = settings(images=str(zip_archive), formats=("energon",))
    prepare(asked)
    assert not (asked.output / "training.jsonl").exists()

    class Encoder(DefaultTaskEncoder):
        cookers = [Cooker(dict)]  # noqa: RUF012

        def encode_sample(self, sample):
            return sample

        def batch(self, samples):
            return samples

        def encode_batch(self, batch):
            return batch

    options = {"batch_size": 1, "worker_config": WorkerConfig(0, 1, 0), "task_encoder": Encoder()}
    validation = [batch[0] for batch in get_loader(get_val_dataset(asked.shard_folder, **options))]
    assert [sample["__key__"].split("/")[1] for sample in validation] == [f"{n:09d}" for n in range(4)]
    assert all(isinstance(sample["json"], bytes) for sample in validation)
    training = get_loader(
        get_train_dataset(asked.shard_folder, shuffle_buffer_size=None, max_samples_per_sequence=None, **options)
    )
    keys = [batch[0]["__key__"].split("/")[1] for batch, _ in zip(training, range(72), strict=False)]
    assert set(keys) == {f"{n:09d}" for n in range(36)}


def test_shards_are_those_of_the_same_input_elsewhere(settings, zip_archive, tar_archive, tmp_path):
    one = prepare(settings(images=str(zip_archive)))
    other = prepare(settings(images=str(tar_archive), output=tmp_path / "other", num_threads=1))
    assert one["outputs"] == other["outputs"]


def test_a_folder_of_images_is_used_where_it_is(settings, tmp_path, photographs):
    folder = tmp_path / "photos"
    (folder / "coco/train2017").mkdir(parents=True)
    for name, data in photographs.items():
        (folder / "coco/train2017" / name).write_bytes(data)
    asked = settings(images=str(folder), split_by="image", validation_fraction=0.2)
    manifest = prepare(asked)
    assert not (asked.output / "images").exists() and manifest["inputs"]["images"]["files"] == 6
    sides = []
    for name in ("training", "validation"):
        records = RecordFile(asked.output / f"{name}.jsonl")
        sides.append({image for n in range(len(records)) for image in parse(records[n]).images})
    assert sides[0] and sides[1] and not sides[0] & sides[1]

    path = folder / "coco/train2017" / next(iter(photographs))
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match=r"images.bytes"):
        prepare(asked)


@pytest.mark.parametrize("change", [{"seed": 1}, {"split_by": "image"}, {"shard_size_mb": 3}, {"formats": ("jsonl",)}])
def test_other_parameters_are_refused_by_name(settings, zip_archive, change):
    asked = settings(images=str(zip_archive))
    prepare(asked)
    before = state(asked.output)
    with pytest.raises(UserError, match=next(iter(change))) as error:
        prepare(replace(asked, **change))
    assert len(error.value.problems) == 1 and state(asked.output) == before


def test_changed_conversations_are_refused(settings, zip_archive, conversations):
    asked = settings(images=str(zip_archive))
    prepare(asked)
    conversations.write_text(conversations.read_text() + conversations.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match=r"conversations.sha256"):
        prepare(asked)


def test_conversations_corrected_after_a_failed_start_are_read_again(settings, zip_archive, conversations):
    good = conversations.read_text()
    conversations.write_text(good + json.dumps({"image": "nowhere.jpg", "conversations": TURNS}) + "\n")
    asked = settings(images=str(zip_archive))
    with pytest.raises(UserError, match=r"nowhere\.jpg"):
        prepare(asked)
    conversations.write_text(good)
    assert prepare(asked)["counts"]["records"] == 40


def test_conversations_changed_behind_a_stopped_start_are_refused(settings, zip_archive, conversations, monkeypatch):
    asked = settings(images=str(zip_archive))
    monkeypatch.setattr(run._Preparation, "write_shards", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(asked)
    monkeypatch.undo()
    conversations.write_text(conversations.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match=r"conversations\.sha256"):
        prepare(asked)


TURNS = [{"from": "human", "value": "<image>\n何ですか。"}, {"from": "gpt", "value": "図です。"}]


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("name", "part"),
    [("a/b.JPG", "0.jpg"), ("図1.東京", "0.img"), ("none", "0.img"), ("a.b c", "0.img"), (f"a.{'x' * 90}", "0.img")],
)
def test_names_of_images_in_a_shard(name, part):
    assert shards.part_name(0, name) == part


def test_an_output_that_was_changed_or_deleted(settings, zip_archive):
    asked = settings(images=str(zip_archive))
    manifest = prepare(asked)
    path = asked.output / "shards" / "train-00001.tar"
    content = path.read_bytes()
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"train-00001.tar: found 4 bytes"):
        prepare(asked)
    path.unlink()
    (asked.output / "shards" / "val-00000.tar.idx").unlink()
    assert prepare(asked) == manifest and path.read_bytes() == content


def test_a_folder_of_something_else_is_refused(settings, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="didn't make"):
        prepare(settings())
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]


def test_a_forgotten_value_can_be_given_after_the_first_look(settings, zip_archive):
    with pytest.raises(UserError, match=r"no such image.*Set dataset.images"):
        prepare(settings())
    assert prepare(settings(images=str(zip_archive)))["finished"]


# --- what is wrong with the data


@pytest.fixture
def with_bad_records(conversations):
    lines = conversations.read_text().splitlines()
    lines[3] = json.dumps({"conversations": [{"from": "human", "value": "?"}]})
    lines[7] = json.dumps(
        {"image": "../x.jpg", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "!"}]}
    )
    conversations.write_text("\n".join(lines) + "\n")


def test_bad_records_stop_it_all_at_once_or_are_dropped_and_counted(settings, zip_archive, with_bad_records):
    asked = settings(images=str(zip_archive))
    with pytest.raises(UserError) as error:
        prepare(asked)
    assert "mine.jsonl:4: found no gpt turn" in str(error.value) and "mine.jsonl:8: found image ../x.jpg" in str(
        error.value
    )
    manifest = prepare(replace(asked, on_problem="drop"))
    assert manifest["counts"]["dropped"] == {"no answer": 1, "image names": 1}
    assert manifest["counts"]["training"] + manifest["counts"]["validation"] == 38
    dropped = [json.loads(line) for line in (asked.output / "dropped.jsonl").read_text().splitlines()]
    assert [item["record"] for item in dropped] == [3, 7]
    with pytest.raises(UserError, match="on_problem"):
        prepare(asked)


def test_a_dropped_record_moves_no_other_to_the_other_side(settings, zip_archive, conversations, tmp_path):
    prepare(settings(images=str(zip_archive), formats=("jsonl",)))
    whole = (tmp_path / "out" / "validation.jsonl").read_text().splitlines()
    lines = conversations.read_text().splitlines()
    number = next(
        n for n, line in enumerate(lines) if json.loads(line)["conversations"] == json.loads(whole[1])["conversations"]
    )
    lines[number] = "{}"
    conversations.write_text("\n".join(lines) + "\n")
    prepare(settings(images=str(zip_archive), formats=("jsonl",), on_problem="drop", output=tmp_path / "other"))
    assert (tmp_path / "other" / "validation.jsonl").read_text().splitlines() == [whole[0], *whole[2:]]


def test_a_truncated_photograph_is_named_and_the_others_stay(settings, tar_archive, tmp_path, photographs):
    name = list(photographs)[2]
    (tmp_path / "train2017" / name).write_bytes(photographs[name][:-3000])
    with tarfile.open(tar_archive, "w:gz") as tar:
        tar.add(tmp_path / "train2017", "train2017")
    asked = settings(images=str(tar_archive))
    with pytest.raises(UserError, match=f"{name}: found a damaged image.*truncated") as error:
        prepare(asked)
    assert "stays" in error.value.state and len(list((asked.output / "images").rglob("*.jpg"))) == 6
    (asked.output / "images/coco/train2017" / name).write_bytes(photographs[name])  # mended by hand
    assert prepare(asked)["counts"]["dropped"] == {}


def test_records_of_damaged_images_are_dropped(settings, zip_archive, photographs):
    content = bytearray(zip_archive.read_bytes())
    start = content.index(list(photographs.values())[2][1000:1100])
    content[start : start + 50] = bytes(50)
    zip_archive.write_bytes(content)
    asked = settings(images=str(zip_archive))
    with pytest.raises(UserError, match="a damaged member"):
        prepare(asked)
    manifest = prepare(replace(asked, on_problem="drop"))
    assert manifest["counts"]["dropped"] == {"a damaged member": 6} and manifest["counts"]["images"] == 5


def test_a_wrong_checksum(settings, zip_archive):
    with pytest.raises(UserError, match=r"dataset.images_sha256"):
        prepare(settings(images=str(zip_archive), images_sha256="0" * 64))


# --- stopped in the middle


def in_child(asked, tmp_path, code=""):
    """prepare(asked) in another process."""
    (tmp_path / "settings").write_bytes(pickle.dumps(asked))
    code = f"import pickle, vlmsft.data.prepare.run as run\n{code}\nrun.prepare(pickle.load(open('settings', 'rb')))"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root())},
        stderr=subprocess.PIPE,
    )


SLOW = """
import time, vlmsft.data.prepare.shards as shards
add = shards.TarWriter.add
shards.TarWriter.add = lambda *a: (time.sleep(0.05), add(*a))
"""


def test_killed_while_it_writes_shards_it_goes_on(settings, zip_archive, tmp_path):
    expected = prepare(settings(images=str(zip_archive), output=tmp_path / "expected"))
    asked = settings(images=str(zip_archive))
    child = in_child(asked, tmp_path, SLOW)
    deadline = time.monotonic() + 60
    while len(list(asked.shard_folder.glob("*.tar"))) < 2:
        assert time.monotonic() < deadline and child.poll() is None, child.stderr.read()
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stderr.close()
    before = state(asked.shard_folder)
    finished = {name for name in before if name.endswith(".tar")}
    assert len(finished) < len([name for name in expected["outputs"] if name.endswith(".tar")])
    assert prepare(asked)["outputs"] == expected["outputs"]
    after = state(asked.shard_folder)
    assert all(after[name] == before[name] for name in finished)
    assert not list(asked.output.rglob("*.partial"))


@pytest.mark.parametrize(
    "point", ["image_names", "unpack", "check_images", "write_splits", "describe", "finished_manifest"]
)
def test_stopped_anywhere_it_goes_on(settings, zip_archive, tmp_path, monkeypatch, point):
    asked = settings(images=str(zip_archive), formats=("jsonl",))
    with monkeypatch.context() as patch:
        owner = {"unpack": run, "image_names": shards}.get(point, run._Preparation)
        patch.setattr(owner, point, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(asked)
    assert not json.loads((asked.output / "manifest.json").read_text())["finished"]
    elsewhere = prepare(settings(images=str(zip_archive), formats=("jsonl",), output=tmp_path / "other"))
    assert prepare(asked) == elsewhere


def test_two_at_once(settings, zip_archive):
    import filelock

    asked = settings(images=str(zip_archive))
    asked.output.mkdir()
    with filelock.FileLock(asked.output / ".lock"), pytest.raises(UserError, match="another prepare"):
        prepare(asked)
    assert prepare(asked)["finished"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_said_and_after_room_is_made_it_goes_on(settings, small_disk, tmp_path, photographs):
    photos = tmp_path / "photos" / "coco" / "train2017"
    photos.mkdir(parents=True)
    for name, data in photographs.items():
        (photos / name).write_bytes(data + bytes(30_000))
    asked = settings(images=str(tmp_path / "photos"), output=small_disk / "out", num_threads=1, verify_images=False)
    with pytest.raises(UserError, match="no space left on the disk") as error:
        prepare(asked)
    finished = {name: facts for name, facts in state(asked.shard_folder).items() if name.endswith(".tar")}
    assert f"({len(finished)} finished shards)" in error.value.state and finished
    for name in finished:
        with tarfile.open(asked.shard_folder / name) as tar:
            assert tar.getmembers()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    manifest = prepare(asked)
    assert manifest["finished"]
    after = state(asked.shard_folder)
    assert {name: after[name] for name in finished} == finished


def test_shards_hold_each_record_once(settings, zip_archive):
    asked = settings(images=str(zip_archive), shard_max_records=3)
    prepare(asked)
    assert set(Counter(keys_in(asked.shard_folder, "train")).values()) == {1}
