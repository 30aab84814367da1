"""How fast shards are written: tarfile alone, webdataset's ShardWriter, and vlmsft.data.prepare, in the same run.

Each way reads the same photographs (640x480, from the sample set) from files in the page cache and writes the same
members. Ours also hashes what it writes, for the manifest. Each way's best of --repeat rounds; the ways take turns.

    python benchmarks/shard_writing.py
    python benchmarks/shard_writing.py --records 5000 --folder /dev/shm
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from webdataset.writer import ShardWriter

from vlmsft.config_files import sample_set
from vlmsft.data.prepare import shards
from vlmsft.data.records import RecordFile

MEBIBYTE = 1 << 20
MAX_RECORDS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=4000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", help="where files are written; a temporary folder by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        source = make_records(Path(scratch), arguments.records)
        target = Path(scratch) / "shards"
        ways: dict[str, Callable[[], None]] = {
            "tarfile.addfile": lambda: with_tarfile(source, target),
            "webdataset.ShardWriter": lambda: with_webdataset(source, target),
            "vlmsft, 1 thread": lambda: with_vlmsft(source, target, 1),
            f"vlmsft, {os.cpu_count()} threads": lambda: with_vlmsft(source, target, os.cpu_count() or 1),
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(arguments.repeat):
            for name, write in ways.items():
                target.mkdir()
                started, cpu_started = time.perf_counter(), time.process_time()
                write()
                seconds[name].append((time.perf_counter() - started, time.process_time() - cpu_started))
                size = sum(path.stat().st_size for path in target.iterdir())
                shutil.rmtree(target)
        split = {name: tuple(zip(*times, strict=True)) for name, times in seconds.items()}
        print_table({name: (min(wall), min(cpu)) for name, (wall, cpu) in split.items()}, arguments.records, size)


def make_records(folder: Path, num_records: int) -> RecordFile:
    """A record file over 100 photographs of 640x480, about 100 KB each."""
    (folder / "images").mkdir()
    photographs = sorted((Path(sample_set()) / "images").iterdir())
    for number in range(100):
        with Image.open(photographs[number % len(photographs)]) as image:
            photograph = image.convert("RGB").resize((640, 480))
            photograph.save(folder / "images" / f"{number:03d}.jpg", quality=92 + number % 4)
    turns = [{"from": "human", "value": "<image>\n何が写っていますか？"}, {"from": "gpt", "value": "写真です。" * 20}]
    lines = [
        json.dumps({"image": f"{index % 100:03d}.jpg", "conversations": turns}, ensure_ascii=False)
        for index in range(num_records)
    ]
    path = folder / "training.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return RecordFile(path)


def with_tarfile(records: RecordFile, target: Path) -> None:
    images = records.path.parent / "images"
    for start in range(0, len(records), MAX_RECORDS):
        with tarfile.open(target / f"{start:09d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(start, min(start + MAX_RECORDS, len(records))):
                record = records[index]
                parts = {
                    "0.jpg": (images / record["image"]).read_bytes(),
                    "json": json.dumps(record, ensure_ascii=False).encode(),
                }
                for part, data in parts.items():
                    member = tarfile.TarInfo(f"{index:09d}.{part}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def with_webdataset(records: RecordFile, target: Path) -> None:
    images = records.path.parent / "images"
    with ShardWriter(str(target / "%09d.tar"), maxcount=MAX_RECORDS, verbose=0) as writer:
        for index in range(len(records)):
            record = records[index]
            image = (images / record["image"]).read_bytes()
            writer.write(
                {"__key__": f"{index:09d}", "0.jpg": image, "json": json.dumps(record, ensure_ascii=False).encode()}
            )


def with_vlmsft(records: RecordFile, target: Path, num_threads: int) -> None:
    images = records.path.parent / "images"
    plan = shards.plan(target, "train", records, images, max_mb=1 << 20, max_records=MAX_RECORDS, shuffle_seed=1)
    for _ in shards.write_all(plan, num_threads):
        pass


def print_table(seconds: dict[str, tuple[float, float]], num_records: int, num_bytes: int) -> None:
    raw, raw_cpu = seconds["tarfile.addfile"]
    print(f"{num_records} records, {num_bytes / MEBIBYTE:.0f} MiB")
    print("| way | seconds | records/s | MiB/s | speed of tarfile's | CPU seconds | CPU of tarfile's |")
    print("|---|---|---|---|---|---|---|")
    for name, (taken, cpu) in seconds.items():
        rates = f"{num_records / taken:.0f} | {num_bytes / taken / MEBIBYTE:.0f} | {raw / taken:.2f}"
        print(f"| {name} | {taken:.2f} | {rates} | {cpu:.2f} | {cpu / raw_cpu:.2f} |")


if __name__ == "__main__":
    main()
