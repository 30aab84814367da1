"""How fast samples come: NeMo's own path (MLlamaDataset, preloaded) beside ours, in the same run, on the same files.

    python benchmarks/data_speed.py
    python benchmarks/data_speed.py --processor models/Llama-3.2-11B-Vision-Instruct --samples 400

Photographs of 640x480 (from the sample set) with a Japanese question and answer. Prints Markdown tables:

encoding    one process; samples per second of CPU time, so that other programs on the machine don't count. NeMo loads
            its tokenizer again for each sample (from the hub's cache; here from a folder): "as shipped". "Tokenizer
            cached" is what is left without that, and what NeMo's users who patched it see.
loading     micro batches through worker processes, first to last batch: samples per second by the clock, and CPU time
            of the workers for each sample. NeMo's batches are float32 tiles, padded to 4; ours uint8, real tiles only.
opening     a file of 156 000 records: CPU seconds until a record can be read, and the private memory of a forked
            worker that has read 20 000 of them.

Without --processor the sample set's tokenizer is used with the real model's tiles of 560 pixels.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hardware import processor, versions
from PIL import Image

from vlmsft.config_files import sample_set

SIZE = (640, 480)
NUM_RECORDS = 156_000
ENDLESS = 8192
TURNS = [
    {"from": "human", "value": "<image>\nこの写真には何が写っていますか？詳しく説明してください。"},
    {"from": "gpt", "value": "草地の上に一匹の猫が座っています。背景には木立があり、空は曇っています。" * 2},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processor", help="folder of an Mllama processor")
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        processor = arguments.processor or make_processor(folder / "processor")
        make_records(folder, arguments.samples)
        size, workers = arguments.micro_batch_size, arguments.workers
        ours, shards = our_dataset(folder, processor), our_shards(folder, processor)
        rows = {
            "vlmsft preloaded": rate(ours, arguments.samples),
            "vlmsft energon shards": rate(shards, arguments.samples),
        }
        loading = {
            "vlmsft preloaded": through_workers(our_loader(ours, size, workers), size),
            "vlmsft energon": through_workers(our_stream(folder, processor, size, workers, len(ours)), size),
        }
        # Only now: without TransformerEngine, objects that NeMo leaves behind fail in Energon's workers, which look at
        # every object of the process
        nemo = nemo_dataset(folder, processor)
        rows["NeMo as shipped"] = rate(nemo, 6)
        loading["NeMo as shipped"] = through_workers(nemo_loader(nemo, size, workers, 8 * size), size)
        with tokenizer_cached():
            rows["NeMo, tokenizer cached"] = rate(nemo, 60)
            loader = nemo_loader(nemo, size, workers, 24 * size)
            loading["NeMo, tokenizer cached"] = through_workers(loader, size)
        opened = opening(folder)
    print(f"\n{environment()}\n")
    print("| what | value | unit |\n|---|---|---|")
    for name, value in rows.items():
        print(f"| encoding, {name} | {value:.1f} | samples/s/core |")
    for name, (seconds, mebibytes) in opened.items():
        print(f"| opening {NUM_RECORDS:,} records, {name} | {seconds:.2f} | s |")
        print(f"| private memory of a worker, {name} | {mebibytes:.1f} | MiB |")
    print(f"\n{workers} workers, micro batches of {size}:\n")
    print("| through workers | samples/s | CPU ms/sample |\n|---|---|---|")
    for name, (by_clock, milliseconds) in loading.items():
        print(f"| {name} | {by_clock:.1f} | {milliseconds:.1f} |")


def environment() -> str:
    packages = ("nemo_toolkit", "megatron-energon", "transformers", "torch", "pillow")
    return f"{time.strftime('%Y-%m-%d')}, {processor()}; {versions(packages)}"


# --- the files --------------------------------------------------------------------------------------------------------


def make_processor(folder: Path) -> str:
    """The sample set's, with the real model's tiles."""
    shutil.copytree(Path(sample_set(), "processor"), folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["size"] = {"height": 560, "width": 560}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


def make_records(folder: Path, count: int) -> None:
    """train.jsonl, train.json and images/ with `count` photographs, about 100 KB each."""
    (folder / "images").mkdir()
    sources = sorted(Path(sample_set(), "images").glob("*.jpg"))
    records = []
    for number in range(count):
        with Image.open(sources[number % len(sources)]) as image:
            moved = image.convert("RGB").resize((SIZE[0] + 7 * (number % 9), SIZE[1] + 7)).crop((0, 0, *SIZE))
        moved.save(folder / "images" / f"{number:06d}.jpg", quality=96)
        records.append({"id": str(number), "image": f"{number:06d}.jpg", "conversations": TURNS})
    write_records(folder / "train", records)


def write_records(path: Path, records: list[dict]) -> None:
    path.with_suffix(".json").write_text(json.dumps(records, ensure_ascii=False))
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.with_suffix(".jsonl").write_text(lines)


# --- the data sets ----------------------------------------------------------------------------------------------------


def nemo_dataset(folder: Path, processor: str) -> Any:
    """MLlamaDataset. Its tokenizer's hub id is hard-coded: here it names the processor's folder."""
    from nemo.collections.vlm.mllama.data.preloaded import MLlamaDataset
    from nemo.collections.vlm.neva.data.config import ImageDataConfig
    from nemo.collections.vlm.neva.data.conversation import conv_templates
    from transformers import AutoProcessor

    conv_templates["mllama"].tokenizer_name_or_path = processor
    loaded = AutoProcessor.from_pretrained(processor)
    config = ImageDataConfig(image_folder=str(folder / "images"), conv_template="mllama")
    return MLlamaDataset(str(folder / "train.json"), config, loaded.tokenizer, loaded.image_processor, ENDLESS)


def our_dataset(folder: Path, processor: str) -> Any:
    from vlmsft.data.dataset import ConversationDataset

    return ConversationDataset(str(folder / "train.jsonl"), str(folder / "images"), processor, ENDLESS)


def our_shards(folder: Path, processor: str) -> Any:
    from vlmsft.data.encode import SampleEncoder
    from vlmsft.data.energon_shards import ShardDataset, ShardFolder
    from vlmsft.data.prepare import energon, shards
    from vlmsft.data.records import RecordFile

    target = folder / "shards"
    target.mkdir()
    records = RecordFile(folder / "train.jsonl")
    options: dict[str, Any] = {"max_mb": 100.0, "max_records": 100, "shuffle_seed": None}
    planned = shards.plan(target, "train", records, folder / "images", **options)
    written = list(shards.write_all(planned, 1))
    energon.write_metadata(target, {one.name: one.num_records for one in written}, 1)
    return ShardDataset(ShardFolder.open(target, "train"), SampleEncoder(processor, ENDLESS))


# --- measuring --------------------------------------------------------------------------------------------------------


def rate(dataset: Any, count: int) -> float:
    """Samples per second of this process's CPU time."""
    _ = dataset[0]  # loads what is loaded once
    started = time.process_time()
    for index in range(count):
        _ = dataset[index % len(dataset)]
    return count / (time.process_time() - started)


@contextmanager
def tokenizer_cached() -> Iterator[None]:
    from transformers import AutoTokenizer

    shipped = AutoTokenizer.from_pretrained
    AutoTokenizer.from_pretrained = functools.cache(shipped)
    try:
        yield
    finally:
        AutoTokenizer.from_pretrained = shipped


def nemo_loader(dataset: Any, size: int, workers: int, count: int) -> Iterable[Any]:
    from torch.utils.data import DataLoader, Subset

    subset = Subset(dataset, [index % len(dataset) for index in range(count)])
    return DataLoader(subset, batch_size=size, num_workers=workers, collate_fn=dataset.collate_fn)


def our_loader(dataset: Any, size: int, workers: int) -> Iterable[Any]:
    from vlmsft.data.dataset import UserErrorLoader

    options: dict[str, Any] = {"batch_size": size, "num_workers": workers, "collate_fn": dataset.collate}
    return UserErrorLoader(dataset, mode="train", **options)


def our_stream(folder: Path, processor: str, size: int, workers: int, count: int) -> Iterable[Any]:
    from itertools import islice

    from vlmsft.data.encode import SampleEncoder
    from vlmsft.data.energon_shards import ShardFolder
    from vlmsft.data.energon_stream import StreamOptions, TrainStream

    options = StreamOptions(size, workers, 0, 100, 100, 16)
    folders = [ShardFolder.open(folder / "shards", "train")]
    stream = TrainStream(folders, [1.0], SampleEncoder(processor, ENDLESS), options, rank=0, size=1)
    return islice(stream, count // size)


def through_workers(loader: Iterable[Any], size: int) -> tuple[float, float]:
    """(samples per second by the clock, CPU milliseconds of the workers per sample), without their start."""
    cpu = children_seconds()
    batches = iter(loader)
    next(batches)
    started, count = time.perf_counter(), 0
    for batch in batches:
        count += 1
        _ = batch["tokens"].sum()
    seconds = time.perf_counter() - started
    del batches, loader  # ends the workers, whose CPU time counts from then on
    wait_for_children()
    return count * size / seconds, 1000 * (children_seconds() - cpu) / ((count + 1) * size)


def children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def wait_for_children() -> None:
    import gc

    gc.collect()
    for child in multiprocessing.active_children():
        child.join(20)


# --- opening ----------------------------------------------------------------------------------------------------------


def opening(folder: Path) -> dict[str, tuple[float, float]]:
    """{name: (seconds, MiB)}."""
    from vlmsft.data.records import RecordFile

    generator = random.Random(0)
    answer = TURNS[1]["value"]
    records = []
    for number in range(NUM_RECORDS):
        turns = [TURNS[0], {"from": "gpt", "value": answer * generator.randint(1, 6)}] * generator.randint(1, 2)
        records.append({"id": f"{number:012d}", "image": f"{number:012d}.jpg", "conversations": turns})
    write_records(folder / "large", records)
    del records
    ways: dict[str, Callable[[], Any]] = {
        "NeMo (json.load)": lambda: json.loads((folder / "large.json").read_text()),
        "vlmsft": lambda: RecordFile(folder / "large.jsonl"),
    }
    return {name: in_fresh_process(open_file) for name, open_file in ways.items()}


def in_fresh_process(open_file: Callable[[], Any]) -> tuple[float, float]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_open_and_fork, args=(open_file, theirs))
    process.start()
    result = ours.recv()
    process.join()
    return result


def _open_and_fork(open_file: Callable[[], Any], connection: Any) -> None:
    started = time.process_time()
    records = open_file()
    _ = records[len(records) // 2]
    seconds = time.process_time() - started
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=_read_records, args=(records, theirs))
    worker.start()
    connection.send((seconds, ours.recv()))
    worker.join()


def _read_records(records: Any, connection: Any) -> None:
    """What reading adds to a worker's own pages, in MiB."""
    before = private_mebibytes()
    order = random.Random(1).sample(range(len(records)), 20_000)
    for index in order:
        record = records[index]
        _ = [turn["value"] for turn in record["conversations"]]
    connection.send(private_mebibytes() - before)


def private_mebibytes() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


if __name__ == "__main__":
    main()
