"""Does the GPU wait for photographs? `python -m vlmsft.train` at the 11B model's shape, LoRA, one GPU, files from disk.

    python benchmarks/input_pipeline.py --output pipeline.jsonl
    python benchmarks/input_pipeline.py --cases main more
    python benchmarks/input_pipeline.py --table pipeline.jsonl

Each case is a process of its own, which runs what a user would type, with random weights; what it wrote into
metrics.csv is read afterwards. A JSON line is written as soon as a case has ended, a case that fails is one, and a
Markdown table comes last. A case takes two minutes, most of it to build the model and to compile its kernels.

photographs   400 JPEG files of 1, 2 and 4 tiles (SIZES), cropped and scaled from the packaged sample set, with noise as
              a camera has, so that a file of 640x480 has the 100 to 200 KB of a real one. The same on every machine.
conversations 1 to 4 turns in Japanese, the sample set's sentences recombined, 50 to 600 tokens
processor     the sample set's with tiles of 560 pixels and Llama 3.2's ids: a vocabulary of 128256, special tokens at
              128000 to 128255, <|image|> at 128256. The merges are still the sample set's 240: Meta's tokenizer may not
              be passed on. Both are byte-level BPE in the `tokenizers` package behind the same split.
loader alone  before each case, in a process without a model: samples per second that the same workers bring, pinned;
              meanwhile the training's process imports NeMo on a core of its own

data wait     share of the time after the first WARM_UP steps that the training's process waited for its loader. LIMIT
              is what the GPU may lose to it
first wait    seconds in the first step: its workers start, load the tokenizer and fill the first batches

Without a GPU: the tiny model on the CPU, which shows that the script works and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hardware import versions
from PIL import Image
from waiting import Waiting

from vlmsft.config_files import sample_set

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch",
    "transformer_engine",
    "megatron-core",
    "nemo_toolkit",
    "megatron-energon",
    "transformers",
    "pillow",
)
LIMIT = 0.02
WARM_UP = 4  # steps; kernels are compiled in the first ones
SIZES = {  # width and height: how often. What COCO has, and larger ones
    (640, 480): 8,
    (480, 640): 4,
    (640, 427): 4,
    (500, 375): 4,
    (420, 560): 1,
    (1024, 768): 2,
    (1280, 960): 2,
    (960, 1280): 1,
}
TOKENS = (50, 600)
TEXT_VOCABULARY, VOCABULARY = 128000, 128256
NAMED_SPECIAL_TOKENS = 16  # the first ones, in the sample set as in Llama
SPEEDS = (
    "samples_per_second",
    "tokens_per_second",
    "step_seconds",
    "tflops_per_second_per_gpu",
    "mfu",
)


@dataclass(frozen=True)
class Case:
    data: str
    micro_batch_size: int
    num_workers: int
    group: str = "main"


CASES = (
    Case("preloaded", 4, 8),
    Case("energon", 4, 8),
    Case("preloaded", 8, 8, "more"),
    Case("preloaded", 1, 8, "more"),
    Case("preloaded", 4, 2, "default workers"),
    Case("energon", 8, 4, "other"),
)


@dataclass(frozen=True)
class Scale:
    """What differs between a GPU and the trial without one."""

    photographs: int
    tile: int
    steps: int
    global_batch_size: int
    overrides: tuple[str, ...]

    @property
    def is_trial(self) -> bool:
        return self.tile != 560


ON_GPU = Scale(
    photographs=400,
    tile=560,
    steps=14,
    global_batch_size=32,
    overrides=(
        "model=mllama_11b",
        "peft=lora",
        "model.config.gate_init=0.5",
        "strategy=megatron",
        "precision=bf16-mixed",
        "data.decoder_seq_length=768",
        "gpu_memory_gib=null",  # the estimate is of the longest texts and 4 tiles, which few samples have
        "optim.max_lr=1e-4",
    ),
)
TRIAL = Scale(
    photographs=64,
    tile=112,
    steps=6,
    global_batch_size=8,
    overrides=(
        "experiment=demo",
        "peft=lora",
        "trainer.callbacks.overfit=null",
        "data.decoder_seq_length=1024",
        "model.config.language_model_config.seq_length=1024",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file for the JSON lines, appended to")
    parser.add_argument("--cases", nargs="+", default=["main"], choices=sorted({case.group for case in CASES}))
    parser.add_argument("--data", choices=("preloaded", "energon"), help="only the cases with it")
    parser.add_argument("--steps", type=int, help=f"of each case; {ON_GPU.steps} if not given")
    parser.add_argument("--case-timeout", type=float, default=300, help="seconds after which a case is ended")
    parser.add_argument("--logs", type=Path, help="folder that keeps each case's output")
    parser.add_argument("--table", type=Path, help="print the table of an earlier run's lines instead")
    parser.add_argument("--padding", action="store_true", help="count padded text tokens only; needs no GPU")
    parser.add_argument("--alone", nargs=2, metavar=("CASE", "FOLDER"), help="measure a loader only, as each case does")
    arguments = parser.parse_args()
    if arguments.alone is not None:
        speed = samples_per_second(Case(**json.loads(arguments.alone[0])), arguments.alone[1])
        print(f"alone: {speed:.1f} samples/s", flush=True)
        os._exit(0)  # left to the end of the process, Energon's loader waits five seconds for each of its workers
    if arguments.table is not None:
        print(table([json.loads(line) for line in arguments.table.read_text(encoding="utf-8").splitlines()]))
        return
    if arguments.padding:
        with tempfile.TemporaryDirectory() as scratch:
            print(padding(Path(scratch)))
        return
    scale = ON_GPU if gpu_name() else TRIAL
    steps = arguments.steps or scale.steps
    cases = [case for case in CASES if case.group in arguments.cases and arguments.data in (None, case.data)]
    results = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as processes:

        def training() -> Waiting:  # it imports while files are made, a loader is alone, or an earlier one trains
            return processes.enter_context(Waiting(lambda words: start([sys.executable, *words], folder), folder))

        folder = Path(scratch)
        following = training()
        files = make_files(folder, scale)
        for number, case in enumerate(cases, 1):
            process, following = following, training() if number < len(cases) else following
            result = {**run(case, process, scale, files, steps, arguments), **files.about}
            results.append(result)
            print({name: value for name, value in result.items() if name not in ("rows", "command")}, flush=True)
            if arguments.output is not None:
                with open(arguments.output, "a", encoding="utf-8") as file:
                    file.write(json.dumps(result, ensure_ascii=False) + "\n")
    print(f"\n{table(results)}")


# --- the files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """The data set in a folder. about: what the results say of it"""

    folder: Path
    about: dict[str, Any]

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def records(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def processor(self) -> Path:
        return self.folder / "processor"


def make_files(folder: Path, scale: Scale) -> Files:
    started = time.monotonic()
    files = Files(folder, {})
    make_processor(files.processor, scale.tile)
    files.images.mkdir()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda number: make_photograph(files.images, number), range(scale.photographs)))
    write_records(files, scale.photographs)
    write_shards(files)
    files.about.update(about(files, scale.photographs))
    print(f"{time.monotonic() - started:.1f} s for {files.about}", flush=True)
    return files


def make_processor(folder: Path, tile: int) -> None:
    """The sample set's with tiles of `tile` pixels; Llama's ids where these are the model's (560)."""
    shutil.copytree(Path(sample_set(), "processor"), folder)
    rewrite(folder / "preprocessor_config.json", lambda settings: settings | {"size": {"height": tile, "width": tile}})
    if tile == 560:
        rewrite(folder / "tokenizer.json", with_llama_ids)
        rewrite(folder / "tokenizer_config.json", without_ids)


def rewrite(path: Path, change: Any) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")


def with_llama_ids(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Tokens that no text becomes up to 128000, special tokens up to 128255, <|image|> behind them."""
    vocabulary, tokens = tokenizer["model"]["vocab"], tokenizer["added_tokens"]
    vocabulary.update({f"<unused {number}>": number for number in range(len(vocabulary), TEXT_VOCABULARY)})
    *named, image = tokens
    assert len(named) == NAMED_SPECIAL_TOKENS, named
    highest = max(
        int(found[1]) for token in named if (found := re.search(r"reserved_special_token_(\d+)", token["content"]))
    )
    num_more = VOCABULARY - TEXT_VOCABULARY - len(named)
    more = [image | {"content": f"<|reserved_special_token_{highest + 1 + n}|>"} for n in range(num_more)]
    for number, token in enumerate([*named, *more, image]):
        token["id"] = TEXT_VOCABULARY + number
    tokenizer["added_tokens"] = [*named, *more, image]
    for name, token in tokenizer["post_processor"]["special_tokens"].items():
        token["ids"] = [entry["id"] for entry in named if entry["content"] == name]
    return tokenizer


def without_ids(settings: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json has them."""
    return {name: value for name, value in settings.items() if name != "added_tokens_decoder"}


def make_photograph(folder: Path, number: int) -> None:
    chooser = random.Random(number)
    sources = sorted(Path(sample_set(), "images").glob("*.jpg"))
    width, height = chooser.choices(list(SIZES), list(SIZES.values()))[0]
    with Image.open(sources[number % len(sources)]) as source:
        photograph = source.convert("RGB")
    share = chooser.uniform(0.6, 1.0)  # of the source, in the shape of the new one
    scale = share * min(photograph.width / width, photograph.height / height)
    left = chooser.uniform(0, photograph.width - scale * width)
    top = chooser.uniform(0, photograph.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    pixels = np.asarray(photograph.resize((width, height), Image.Resampling.BICUBIC, box), np.float32)
    noise = np.random.default_rng(number).normal(0, 5, (height, width, 1)).astype(np.float32)
    noisy = Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))
    noisy.save(folder / f"{number:06d}.jpg", quality=90)


def write_records(files: Files, count: int) -> None:
    """One record a photograph; lengths spread evenly over TOKENS' logarithm."""
    from vlmsft.data.encode import SampleEncoder

    tokenizer = SampleEncoder(str(files.processor), TOKENS[1]).processor.tokenizer
    questions, answers = ({text: len(tokenizer.tokenize(text)) for text in texts} for texts in sentences())
    with open(files.records, "w", encoding="utf-8") as file:
        for number in range(count):
            chooser = random.Random(number)
            length = round(np.exp(chooser.uniform(*np.log(TOKENS))))
            turns = conversation(chooser, questions, answers, length)
            record = {"id": str(number), "image": f"{number:06d}.jpg", "conversations": turns}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def sentences() -> tuple[list[str], list[str]]:
    """Questions and answers of the sample set."""
    lines = Path(sample_set(), "train.jsonl").read_text(encoding="utf-8").splitlines()
    turns = [turn for line in lines for turn in json.loads(line)["conversations"]]
    questions = {turn["value"].replace("<image>\n", "") for turn in turns if turn["from"] == "human"}
    return sorted(questions), sorted({turn["value"] for turn in turns if turn["from"] == "gpt"})


def conversation(
    chooser: random.Random, questions: dict[str, int], answers: dict[str, int], length: int
) -> list[dict[str, str]]:
    """Turns of about `length` tokens in all, from texts and their tokens; long answers are of several sentences."""
    num_turns, turns, so_far = chooser.randint(1, 4), [], 0
    for number in range(num_turns):
        question = chooser.choice(list(questions))
        chosen = [chooser.choice(list(answers))]
        so_far += questions[question] + answers[chosen[0]]
        while so_far < length * (number + 1) / num_turns:
            chosen.append(chooser.choice(list(answers)))
            so_far += answers[chosen[-1]]
        turns.append({"from": "human", "value": f"<image>\n{question}" if number == 0 else question})
        turns.append({"from": "gpt", "value": "".join(chosen)})
        if so_far >= length:
            break
    return turns


def write_shards(files: Files) -> None:
    """As vlmsft.prepare writes them."""
    from vlmsft.data.prepare import energon, shards
    from vlmsft.data.records import RecordFile

    files.shards.mkdir()
    options: dict[str, Any] = {"max_mb": 16.0, "max_records": 1000, "shuffle_seed": 42}
    planned = shards.plan(files.shards, "train", RecordFile(files.records), files.images, **options)
    written = list(shards.write_all(planned, 4))
    energon.write_metadata(files.shards, {shard.name: shard.num_records for shard in written}, 1)


def text_tokens(files: Files) -> list[int]:
    """Of each record."""
    from vlmsft.data.encode import SampleEncoder
    from vlmsft.data.records import RecordFile, parse

    encoder, records = SampleEncoder(str(files.processor), 4096), RecordFile(files.records)
    return [len(encoder.encode_text(parse(records[number]).turns).tokens) for number in range(len(records))]


def about(files: Files, count: int) -> dict[str, Any]:
    """Means over the samples."""
    from vlmsft.data.encode import SampleEncoder

    encoder = SampleEncoder(str(files.processor), 4096)
    tokens = text_tokens(files)
    tiles, sizes = [], []
    for path in files.images.iterdir():
        sizes.append(path.stat().st_size)
        with Image.open(path) as photograph:
            tiles.append(np.prod(encoder.canvas(*photograph.size)))
    return {
        "photographs": count,
        "mean_kilobytes": round(statistics.mean(sizes) / 1000),
        "mean_tiles": round(float(np.mean(tiles)), 2),
        "mean_tokens": round(statistics.mean(tokens)),
        "tokens_from_to": [min(tokens), max(tokens)],
    }


# --- one case ---------------------------------------------------------------------------------------------------------


def run(
    case: Case, process: Waiting, scale: Scale, files: Files, steps: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """What the case gave, or the end of what it printed as `error`."""
    name = f"{case.data}-{case.micro_batch_size}-{case.num_workers}"
    words = ["-m", "vlmsft.train", *overrides(case, scale, files, steps, name)]
    shown = " ".join(["python", *words]).replace(f"{files.folder}/", "")
    result = {**asdict(case), "steps": steps, "global_batch_size": scale.global_batch_size, **machine()}
    result |= {"alone_samples_per_second": loader_alone(case, files), "command": shown}
    started = time.monotonic()
    output, code = end_of(process.run(words), arguments.case_timeout)
    if arguments.logs is not None:
        arguments.logs.mkdir(parents=True, exist_ok=True)
        (arguments.logs / f"{name}.log").write_text(output, encoding="utf-8")
    result["seconds"] = round(time.monotonic() - started, 1)
    try:
        result |= speeds(files.folder / "runs" / "pipeline" / name / "metrics.csv")
    except (OSError, ValueError, KeyError) as error:
        return result | {"error": f"exit code {code}, {error!r}: {output[-1500:]}"}
    return result if code == 0 else result | {"error": f"exit code {code}: {output[-1500:]}"}


def overrides(case: Case, scale: Scale, files: Files, steps: int, name: str) -> list[str]:
    paths = {
        "preloaded": [f"data.train_path={files.records}", f"data.image_folder={files.images}"],
        "energon": [f"data.path={files.shards}"],
    }
    return [
        f"data={case.data}",
        *scale.overrides,
        *paths[case.data],
        "data.validation_path=null",
        f"processor={files.processor}",
        f"data.micro_batch_size={case.micro_batch_size}",
        f"data.global_batch_size={scale.global_batch_size}",
        f"data.num_workers={case.num_workers}",
        "name=pipeline",
        f"id={name}",
        "restore_from=null",
        "trainer.devices=1",
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={steps}",
        "trainer.callbacks.answers=null",
        "optim.warmup_steps=2",
        "log.ckpt=null",
    ]


def output_of(command: list[str], folder: Path, timeout: float, **variables: str) -> tuple[str, int]:
    """What it printed, and its exit code. Ends all of its processes after `timeout` seconds.

    variables: of the environment, beside this process'
    """
    return end_of(start(command, folder, **variables), timeout)


def start(command: list[str], folder: Path, **variables: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)


def end_of(process: subprocess.Popen[str], timeout: float) -> tuple[str, int]:
    """As output_of, of a process that `start` gave."""
    try:
        printed, _ = process.communicate(timeout=timeout)
        return printed, process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # to torchrun, too, which ends its workers
    except BaseException:  # Ctrl-C, which its session doesn't get
        os.killpg(process.pid, signal.SIGKILL)
        raise
    try:
        printed, _ = process.communicate(timeout=40)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
    return f"{printed}\nended after {timeout:.0f} s", 124


def speeds(path: Path) -> dict[str, Any]:
    """Medians after the warm-up; the wait as a share of the whole time, in which a single long one shows."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    warm = rows[min(WARM_UP, len(rows) - 1) :]
    waits = [float(row["data_wait_fraction"]) * float(row["step_seconds"]) for row in rows]
    share = sum(waits[-len(warm) :]) / sum(float(row["step_seconds"]) for row in warm)
    return {
        **{name: median(row[name] for row in warm) for name in SPEEDS},
        "data_wait_share": share,
        "longest_wait_seconds": max(waits[-len(warm) :]),
        "first_wait_seconds": waits[0],
        "first_step_seconds": float(rows[0]["step_seconds"]),
        "peak_memory_gib": median([rows[-1]["peak_memory_gib"]]),
        "is_within_limit": share < LIMIT,
        "rows": [
            {name: row[name] for name in ("step_seconds", "data_wait_fraction", "samples_per_second")} for row in rows
        ],
    }


def median(cells: Iterable[str | None]) -> float | None:
    values = [float(cell) for cell in cells if cell]
    return statistics.median(values) if values else None


# --- the loader alone -------------------------------------------------------------------------------------------------


def loader_alone(case: Case, files: Files) -> float | None:
    """Samples per second, in a process of its own: pinning takes memory of the GPU."""
    command = [sys.executable, __file__, "--alone", json.dumps(asdict(case)), str(files.folder)]
    output, code = output_of(command, files.folder, timeout=90)
    found = re.search(r"^alone: ([\d.]+)", output, re.MULTILINE)
    if code != 0 or found is None:  # the training says more
        print(f"the loader alone: exit code {code}: {output[-500:]}", flush=True)
        return None
    return float(found[1])


def samples_per_second(case: Case, folder: str, num_batches: int = 60) -> float:
    import torch

    from vlmsft.data.encode import SampleEncoder

    _ = SampleEncoder(str(Files(Path(folder), {}).processor), 1024).processor  # before the workers start, as a training
    batches = iter(batches_of(case, Files(Path(folder), {}), torch.cuda.is_available()))
    for _ in range(2 * case.num_workers + 1):  # these are made while the workers start
        next(batches)
    started = time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    return num_batches * case.micro_batch_size / (time.perf_counter() - started)


def batches_of(case: Case, files: Files, pin_memory: bool) -> Iterable[Any]:
    """Endless, through what the training's data module loads with for one rank; preloaded samples in any order."""
    processor = str(files.processor)
    if case.data == "energon":
        from vlmsft.data.encode import SampleEncoder
        from vlmsft.data.energon_shards import ShardFolder
        from vlmsft.data.energon_stream import StreamOptions, TrainStream

        folders, encoder = [ShardFolder.open(files.shards, "train")], SampleEncoder(processor, 1024)
        options = StreamOptions(case.micro_batch_size, case.num_workers, 0, 100, 100, 16)
        return TrainStream(folders, [1.0], encoder, options, rank=0, size=1, pin_memory=pin_memory)
    from vlmsft.data.dataset import ConversationDataset, UserErrorLoader
    from vlmsft.data.order import Share, TrainOrder

    dataset = ConversationDataset(str(files.records), str(files.images), processor, 1024)
    share = Share(case.micro_batch_size, case.micro_batch_size, 0, 1)
    order: Any = TrainOrder(len(dataset), 0, 0, share)
    loading: dict[str, Any] = {"num_workers": case.num_workers, "pin_memory": pin_memory}
    return UserErrorLoader(dataset, mode="train", batch_sampler=order, collate_fn=dataset.collate, **loading)


def padding(folder: Path) -> str:
    """Markdown: text tokens that a GPU computes a sample, padded as its micro batch is, over 20 epochs."""
    from vlmsft.data.collate import padded_length
    from vlmsft.data.order import Share, TrainOrder
    from vlmsft.data.records import RecordFile

    files = Files(folder, {})
    make_processor(files.processor, ON_GPU.tile)
    write_records(files, ON_GPU.photographs)
    records, lengths = RecordFile(files.records), np.array(text_tokens(files))
    lines = [
        "| global batch | micro batch | text tokens | padded, any order | padded, by length |",
        "|---|---|---|---|---|",
    ]
    for global_batch_size, micro_batch_size in ((32, 4), (32, 8), (128, 4), (128, 8)):
        cells = [global_batch_size, micro_batch_size, round(lengths.mean())]
        for sizes in (None, records.sizes):
            order = TrainOrder(len(records), 0, 0, Share(micro_batch_size, global_batch_size, 0, 1), sizes)
            batches = itertools.islice(order, 20 * len(records) // micro_batch_size)
            cells.append(round(np.mean([padded_length(int(lengths[batch].max())) for batch in batches])))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


# --- what it ran on, and the table ------------------------------------------------------------------------------------


@functools.cache
def gpu_name() -> str | None:
    """Of the first GPU; asked without torch, which would take some of its memory."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def machine() -> dict[str, Any]:
    shared = shutil.disk_usage("/dev/shm").total / 2**30 if Path("/dev/shm").exists() else None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": gpu_name() or "CPU (a trial)",
        "cores": len(os.sched_getaffinity(0)),
        "shared_memory_gib": shared and round(shared, 1),
        "versions": versions(PACKAGES),
    }


def table(results: list[dict[str, Any]]) -> str:
    first = results[0]
    lines = [
        f"{first['date']}, {first['device']}, {first['cores']} cores, {first['versions']}",
        "",
        f"{first['photographs']} photographs of {first['mean_kilobytes']} KB and {first['mean_tiles']} tiles on "
        f"average, {first['mean_tokens']} text tokens ({first['tokens_from_to'][0]} to {first['tokens_from_to'][1]}), "
        f"global batch {first['global_batch_size']}, medians after {WARM_UP} of {first['steps']} steps:",
        "",
        "| data | micro batch | workers | samples/s | loader alone | tokens/s | MFU | TFLOP/s | peak GiB | step s "
        f"| data wait (limit {LIMIT:.0%}) | longest wait in a step | first wait |",
        "|" + "---|" * 13,
    ]
    for result in results:
        cells = [result["data"], result["micro_batch_size"], result["num_workers"]]
        if "error" in result:
            cells.append(f"failed: {result['error'].strip().splitlines()[-1][:80]}")
        if "samples_per_second" in result:
            cells += [
                formatted(result["samples_per_second"], ".1f"),
                formatted(result["alone_samples_per_second"], ".0f"),
                formatted(result["tokens_per_second"], ".0f"),
                formatted(result["mfu"], ".1%"),
                formatted(result["tflops_per_second_per_gpu"], ".1f"),
                formatted(result["peak_memory_gib"], ".1f"),
                formatted(result["step_seconds"], ".2f"),
                formatted(result["data_wait_share"], ".2%"),
                formatted(1000 * result["longest_wait_seconds"], ".0f") + " ms",
                formatted(result["first_wait_seconds"], ".1f") + " s",
            ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, "", f"`{first['command']}`"])


def formatted(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    main()
