"""Fine-tuning MLlama-11B on the GPUs of one host: python benchmarks/train_gpus.py [--only GROUP ...]

    lora      LoRA data-parallel over 1, 2, 4, 8 GPUs: samples/s, its share of one GPU's so many times, and losses
              beside one GPU's (without dropout, whose masks are a rank's own)
    losses    full fine-tuning of a model with few text layers, from one checkpoint, in every layout of the host's
              GPUs, with and without overlapped communication: losses beside those of one process
    full      full fine-tuning of the 11B model in every layout, the tower trained and frozen
    tutorial  experiment=llava_instruct_ja for 30 steps (4 on fewer than 8 GPUs), extrapolated to its 1160
    larger    the same with larger micro batches, and with layers as functions (model.config.lean_forward)
    nemo, larger-nemo   beside them NeMo's recipe with its own data module and the tutorial's values
              (train_gpus_nemo.py), at its micro batch of 1 and at 2
    sweep     sweeps=tp_micro_batch through the launcher, several jobs at once

Each case is what a user types, below torchrun: `python -m vlmsft.train ...`, with random weights and open gates, on the
photographs and conversations of input_pipeline.py; its metrics.csv is read afterwards. Its processes import NeMo while
an earlier case has the GPUs (waiting.py). A layout that is estimated not to fit the GPUs is not started, and a case
that fails is a line, too: each line is written as soon as it is known. A case whose line is in the output already, of
the same command on the same kind of machine, is not run again (but for the checkpoint of losses, and the sweep).

samples/s   of all GPUs, the global batch by the median step of the second half: kernels are compiled in the first one,
            and for some dozens of micro batches attention meets numbers of images and tiles that it has no plan for
peak        torch's, of the first rank, the highest so far; "estimated" is what `vlmsft plan` says, for texts as long
            as data.decoder_seq_length and images of 4 tiles: the micro batches that a case saw are smaller
losses      the largest relative difference, over all steps, from the case that they should equal

Without GPUs: the tiny model in fp32 over gloo, in --gpus processes. That shows that the script works, and losses are
compared as on GPUs; it measures no speed.

--table lines.jsonl prints the Markdown of an earlier run.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import input_pipeline as photographs
import yaml
from input_pipeline import formatted, median
from waiting import Waiting

RUNS = "benchmark"
TUTORIAL_STEPS = 1160
TUTORIAL_MICRO_BATCHES = 32  # of each data-parallel rank in a step: 128 samples on 4 of them
COUNTS = (1, 2, 4, 8)
TEXT = "model.config.language_model_config"
LORA = ("peft=lora", "peft.dropout=0.0")
OVERLAP = (
    "strategy.ddp={{_target_:megatron.core.distributed.DistributedDataParallelConfig,check_for_nan_in_grad:true,"
    "overlap_grad_reduce:true,overlap_param_gather:true,bucket_size:{bucket_size}}}"
)
"""NeMo hands it to Megatron as it is, but for use_distributed_optimizer, which follows the optimizer."""
COLUMNS = ("samples_per_second", "step_seconds", "tokens_per_second", "tflops_per_second_per_gpu", "mfu")


@dataclass(frozen=True)
class Case:
    """A training. overrides: of conf/train.yaml, beside those of all cases

    gpus: data-parallel size x tensor-parallel size
    equals: the case whose losses it should give
    """

    group: str
    name: str
    gpus: int
    overrides: tuple[str, ...] = ()
    tp: int = 1
    equals: str = ""

    @property
    def id(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in f"{self.group}-{self.name}")


@dataclass(frozen=True)
class Scale:
    """What differs between GPUs and the trial without them.

    gpu_memory_gib: None = not checked
    few_layers: the model of which one GPU holds weights, gradients and optimizer
    bucket_size: elements that overlapped communication sends at once; null = Megatron's 40 million
    """

    gpus: int
    photographs: photographs.Scale
    gpu_memory_gib: float | None
    model: tuple[str, ...]
    few_layers: tuple[str, ...]
    lora: tuple[str, ...]
    lora_steps: int
    full: tuple[str, ...]
    steps: int
    tutorial: tuple[str, ...]
    tutorial_larger: dict[str, tuple[str, ...]]
    tutorial_steps: int
    sweep: tuple[str, ...]
    bucket_size: str = "null"


def on_gpus(gpus: int, gib: float) -> Scale:
    return Scale(
        gpus=gpus,
        photographs=photographs.ON_GPU,
        gpu_memory_gib=gib,
        model=("model=mllama_11b", "strategy=megatron", "data.num_workers=6", "data.decoder_seq_length=512"),
        few_layers=(f"{TEXT}.num_layers=4", f"{TEXT}.num_cross_attention_layers=1"),
        lora=(*LORA, "optim.max_lr=1e-4", "data.global_batch_size=64", "data.micro_batch_size=8"),
        lora_steps=16,
        full=("data.global_batch_size=16", "data.micro_batch_size=1"),
        steps=6,
        tutorial=("experiment=llava_instruct_ja",),
        tutorial_larger={
            ", micro batch 2": ("data.micro_batch_size=2",),
            ", micro batch 4, tower recomputed": (
                "data.micro_batch_size=4",
                "data.decoder_seq_length=768",  # none of these texts is longer: so that the estimate fits
                "model.config.vision_model_config.recompute_granularity=full",
            ),
        },
        tutorial_steps=30 if gpus >= 8 else 4,
        sweep=("peft=lora",),
    )


def trial(gpus: int) -> Scale:
    longer = ("data.decoder_seq_length=1024", f"{TEXT}.seq_length=1024", "trainer.callbacks.overfit=null")
    return Scale(
        gpus=gpus,
        photographs=photographs.TRIAL,
        gpu_memory_gib=None,
        model=("experiment=demo", *longer),
        few_layers=(),
        lora=(*LORA, "optim.max_lr=1e-3", "data.global_batch_size=8", "data.micro_batch_size=4"),
        lora_steps=6,
        full=("data.global_batch_size=4", "data.micro_batch_size=1"),
        steps=5,
        tutorial=("experiment=demo", *longer, "data.micro_batch_size=1"),
        tutorial_larger={", micro batch 2": ("data.micro_batch_size=2",)},
        tutorial_steps=3,
        sweep=("strategy.tensor_model_parallel_size=1,2", "data.micro_batch_size=4"),
        bucket_size="60000",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("train_gpus.jsonl"))
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--gpus", type=int, help="all of the host's; without a GPU 2 processes")
    parser.add_argument("--limit", type=float, default=300, help="seconds for each case")
    parser.add_argument("--table", type=Path)
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table([json.loads(line) for line in arguments.table.read_text(encoding="utf-8").splitlines()]))
        return
    memory = gpu_memory_gib()
    scale = on_gpus(arguments.gpus or len(memory), min(memory)) if memory else trial(arguments.gpus or 2)
    output = arguments.output.absolute()
    results = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        waiting(process_counts(arguments.only, scale.gpus), Path(scratch)) as ranks,
    ):
        files = photographs.make_files(Path(scratch), scale.photographs)
        bench = Bench(scale, files, output, arguments.limit, ranks)
        for group in arguments.only:
            results += GROUPS[group](bench)
    print(f"\n{table(results)}")


def process_counts(groups: list[str], gpus: int) -> set[int]:
    """That the first cases of these groups take."""
    found = {gpus} if set(groups) - {"sweep"} else set()
    if {"lora", "losses"} & set(groups):
        found.add(1)
    return found | {count for count in COUNTS if "lora" in groups and count <= gpus}


def gpu_memory_gib() -> list[float]:
    """Of each GPU what a process can use. Asked without torch, which would take some of it."""
    asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [int(line) / 1024 - 1.6 for line in answer.splitlines()]  # as conf/train.yaml's 78 of an H100


# --- the cases --------------------------------------------------------------------------------------------------------


def lora_cases(bench: Bench) -> Iterator[dict[str, Any]]:
    for count in COUNTS:
        if count <= bench.scale.gpus:
            case = Case("lora", f"DP {count}", count, bench.scale.lora, equals="DP 1")
            yield bench.run(case, steps=bench.scale.lora_steps)


def loss_cases(bench: Bench) -> Iterator[dict[str, Any]]:
    """All from one checkpoint, as a seed alone gives other weights at another tensor-parallel size."""
    few = (*bench.scale.full, *bench.scale.few_layers)
    saved = ("log.ckpt={}".format("{monitor:reduced_train_loss,every_n_train_steps:1,save_top_k:1}"),)
    start = Case("losses", "start", 1, (*few, *saved, "strategy.ckpt_save_optimizer=false"))
    yield bench.run(start, steps=1, with_checkpoint=True)
    checkpoint = bench.checkpoint(start)
    if checkpoint is None:
        return
    from_start = (*few, f"restore_from='{checkpoint}'")
    first = "TP 1 DP 1"
    yield bench.run(Case("losses", first, 1, from_start))
    for case in layouts("losses", bench.scale, from_start):
        yield bench.run(Case(case.group, case.name, case.gpus, case.overrides, case.tp, equals=first))


def full_cases(bench: Bench) -> Iterator[dict[str, Any]]:
    for name, frozen in (("", ()), (", tower frozen", ("model.config.freeze_vision_model=true",))):
        for case in layouts("full", bench.scale, (*bench.scale.full, *frozen), name):
            yield bench.run(case)


def layouts(group: str, scale: Scale, overrides: tuple[str, ...], name: str = "") -> Iterator[Case]:
    """Every tensor-parallel size on all GPUs; where there are several data-parallel ranks, with overlap as well, and
    with tensor parallelism sequence parallelism: neither should change a loss."""
    gpus, overlap = scale.gpus, OVERLAP.format(bucket_size=scale.bucket_size)
    for tp in (size for size in (1, 2, 4) if gpus % size == 0):
        plain = f"TP {tp} DP {gpus // tp}{name}"
        yield Case(group, plain, gpus, overrides, tp)
        if gpus > tp:
            yield Case(group, f"{plain}, overlap", gpus, (*overrides, overlap), tp, equals=plain)
        if tp > 1:
            functions = (*overrides, "model.config.lean_forward=true")
            yield Case(group, f"{plain}, functions", gpus, functions, tp, equals=plain)
            split = (*overrides, "strategy.sequence_parallel=true")
            yield Case(group, f"{plain}, sequence parallel", gpus, split, tp, equals=plain)


def tutorial_cases(bench: Bench) -> Iterator[dict[str, Any]]:
    """Micro batches of one sample as the tutorial's, as many for each data-parallel rank."""
    yield tutorial(bench, "")


def larger_cases(bench: Bench) -> Iterator[dict[str, Any]]:
    """Larger micro batches, and layers as functions rather than Megatron's classes. Neither should change a loss."""
    functions = "model.config.lean_forward=true"
    yield tutorial(bench, ", functions", functions)
    for name, more in bench.scale.tutorial_larger.items():
        yield tutorial(bench, name, *more)
        yield tutorial(bench, f"{name}, functions", *more, functions, equals=name)


def tutorial(bench: Bench, name: str, *more: str, equals: str = "") -> dict[str, Any]:
    scale = bench.scale
    tp = 2 if scale.gpus % 2 == 0 else 1
    layout = f"TP {tp} DP {scale.gpus // tp}"
    global_batch = f"data.global_batch_size={TUTORIAL_MICRO_BATCHES * scale.gpus // tp}"
    overrides = (*scale.tutorial, global_batch, *more)
    case = Case("tutorial", layout + name, scale.gpus, overrides, tp, equals=layout + equals)
    return bench.run(case, steps=scale.tutorial_steps, with_model=False)


def nemo_cases(bench: Bench) -> Iterator[dict[str, Any]]:
    yield nemo(bench, "NeMo's recipe, as the tutorial", 1)


def larger_nemo_cases(bench: Bench) -> Iterator[dict[str, Any]]:
    yield nemo(bench, "NeMo's recipe, micro batch 2", 2)


def nemo(bench: Bench, name: str, micro_batch_size: int) -> dict[str, Any]:
    """In the trial its recipe and its data are made, and nothing is trained: its model needs a GPU."""
    is_trial = bench.scale.gpu_memory_gib is None
    script, gpus = Path(__file__).with_name("train_gpus_nemo.py"), 1 if is_trial else bench.scale.gpus
    folder = bench.files.folder / f"nemo-{micro_batch_size}"
    words = [str(script), str(bench.files.folder), str(folder), str(gpus), str(micro_batch_size)]
    words += ["--make-only"] * is_trial
    case = Case("nemo", name, gpus, tp=2)
    return bench.record(case, {}, words, lambda: json.loads((folder / "speed.json").read_text()))


def sweep_cases(bench: Bench) -> Iterator[dict[str, Any]]:
    """A line for the multirun, whose seconds are those of all jobs, and one for each job that ran."""
    case = Case("sweep", "all jobs", bench.scale.gpus)
    varied = ("id=", "trainer.devices=", "strategy.tensor_model_parallel_size=")
    common = [word for word in bench.overrides(case, None) if not word.startswith(varied)]
    options = ["sweeps=tp_micro_batch", *common, *bench.scale.sweep, "sweep.id=benchmark"]
    yield bench.record(case, {}, ["-m", "vlmsft.train", "-m", *options], lambda: {}, starts_its_own=True)
    for folder in sorted((bench.files.folder / "runs" / RUNS).glob("benchmark-*")):
        yield bench.write(job_of_sweep(bench, folder))


def job_of_sweep(bench: Bench, folder: Path) -> dict[str, Any]:
    words = yaml.safe_load((folder / "overrides.yaml").read_text(encoding="utf-8"))
    about, _ = bench.plan([word for word in words if not word.startswith("hydra")])
    result = {"group": "sweep", "gpus": about["tp"], **about}
    result["name"] = f"TP {about['tp']}, micro batch {about['micro_batch_size']}"
    try:
        return result | speeds(folder / "metrics.csv")
    except (OSError, ValueError, KeyError, IndexError) as error:
        return result | {"error": repr(error)}


GROUPS: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
    "lora": lora_cases,
    "losses": loss_cases,
    "full": full_cases,
    "tutorial": tutorial_cases,
    "larger": larger_cases,
    "nemo": nemo_cases,
    "larger-nemo": larger_nemo_cases,
    "sweep": sweep_cases,
}


# --- one case ---------------------------------------------------------------------------------------------------------


def ranks_for(num_processes: int, folder: Path) -> Waiting:
    def start(words: list[str]) -> subprocess.Popen[str]:
        return photographs.start([*torchrun(num_processes), *words], folder, CUDA_DEVICE_MAX_CONNECTIONS="1")

    return Waiting(start, folder)


@contextlib.contextmanager
def waiting(sizes: set[int], folder: Path) -> Iterator[dict[int, Waiting]]:
    """By number of processes; those that still wait at the end are killed."""
    ranks = {size: ranks_for(size, folder) for size in sizes}
    try:
        yield ranks
    finally:
        for one in ranks.values():
            one.kill()


@dataclass
class Bench:
    scale: Scale
    files: photographs.Files
    output: Path
    limit: float
    ranks: dict[int, Waiting]

    def __post_init__(self) -> None:
        self.losses: dict[tuple[str, str], list[float]] = {}

    def run(
        self,
        case: Case,
        steps: int | None = None,
        *,
        with_checkpoint: bool = False,
        with_model: bool = True,
    ) -> dict[str, Any]:
        """The case's line.

        with_checkpoint: it saves one, and runs although the output has its line: another run's checkpoint is gone
        with_model: sizes are the scale's, not those of an experiment
        """
        overrides = self.overrides(case, steps, with_checkpoint=with_checkpoint, with_model=with_model)
        about, problem = self.plan(overrides)
        if problem is not None:
            return self.write({**self.about(case), **about, "error": problem})
        csv_file = self.files.folder / "runs" / RUNS / case.id / "metrics.csv"
        words = ["-m", "vlmsft.train", *overrides]
        return self.record(case, about, words, lambda: speeds(csv_file), again=with_checkpoint)

    def overrides(
        self, case: Case, steps: int | None, *, with_checkpoint: bool = False, with_model: bool = True
    ) -> list[str]:
        steps = steps or self.scale.steps
        found = [*(self.scale.model if with_model else ()), *case.overrides]
        if not any(word.startswith("restore_from=") for word in found):
            found.append("restore_from=null")
        found += [] if with_checkpoint else ["log.ckpt=null"]
        return [
            *found,
            f"data.train_path={self.files.records}",
            f"data.image_folder={self.files.images}",
            "data.validation_path=null",
            f"processor={self.files.processor}",
            "model.config.gate_init=0.5",
            f"strategy.tensor_model_parallel_size={case.tp}",
            f"trainer.devices={case.gpus}",
            f"trainer.max_steps={steps}",
            f"trainer.val_check_interval={steps}",
            "trainer.log_every_n_steps=1",
            "trainer.callbacks.answers=null",
            "optim.warmup_steps=0",
            f"gpu_memory_gib={self.scale.gpu_memory_gib or 'null'}",
            f"name={RUNS}",
            f"id={case.id}",
        ]

    def plan(self, overrides: list[str]) -> tuple[dict[str, Any], str | None]:
        """Sizes and estimated memory, and what keeps it from being started. Without torch and NeMo."""
        import hydra

        from vlmsft import estimates, feasibility
        from vlmsft.config_files import register_resolvers, root
        from vlmsft.facts import Facts
        from vlmsft.mllama.sizes import GIB

        register_resolvers()
        with hydra.initialize_config_dir(str(root() / "conf"), version_base="1.3"):
            cfg = hydra.compose("train", overrides)
        problems = [str(problem) for problem in feasibility.infeasible(cfg)]
        facts = Facts(cfg)
        about = {
            "dp": facts.data_parallel_size,
            "tp": cfg.strategy.tensor_model_parallel_size,
            "micro_batch_size": cfg.data.micro_batch_size,
            "global_batch_size": cfg.data.global_batch_size,
            "text_tokens": cfg.data.decoder_seq_length,
            "estimated_peak_gib": round(estimates.memory(facts).peak / GIB, 1),
            "steps": cfg.trainer.max_steps,
        }
        return about, "; ".join(problems) or None

    def about(self, case: Case) -> dict[str, Any]:
        return {"group": case.group, "name": case.name, "gpus": case.gpus, "tp": case.tp, "dp": case.gpus // case.tp}

    def record(
        self,
        case: Case,
        about: dict[str, Any],
        words: list[str],
        read: Callable[[], dict[str, Any]],
        starts_its_own: bool = False,
        again: bool = False,
    ) -> dict[str, Any]:
        """Runs `python WORDS` in the case's processes, or (starts_its_own) as one that starts them, and writes down
        what `read` finds then, or the end of what was printed."""
        command = [sys.executable, *words] if starts_its_own else [*torchrun(case.gpus), *words]
        shown = " ".join(["python", *command[1:]]).replace(f"{self.files.folder}/", "")
        earlier = None if again or starts_its_own else self.earlier(case, shown)
        if earlier is not None:
            print(f"of {earlier['date']}: {describe(earlier)}", flush=True)
            return earlier
        started = time.monotonic()
        if starts_its_own:
            process = photographs.start(command, self.files.folder, CUDA_DEVICE_MAX_CONNECTIONS="1")
        else:
            process = self.start(case.gpus, words)
        printed, code = photographs.end_of(process, self.limit)
        result = {**self.about(case), **about, "command": shown, "seconds": round(time.monotonic() - started, 1)}
        try:
            result |= read()
        except (OSError, ValueError, KeyError, IndexError) as error:
            result["error"] = f"{error!r}, exit code {code}: {printed[-1500:]}"
        if code != 0:
            result.setdefault("error", f"exit code {code}: {printed[-1500:]}")
        return self.write(self.with_differences(case, result))

    def earlier(self, case: Case, command: str) -> dict[str, Any] | None:
        """The output's line of the same command on the same kind of machine, if it didn't fail."""
        here = machine()
        same = {"group": case.group, "name": case.name, "command": command}
        same |= {key: here[key] for key in ("device", "cores", "versions")}
        for line in self.output.read_text(encoding="utf-8").splitlines() if self.output.exists() else ():
            result = json.loads(line)
            if "error" not in result and all(result.get(key) == value for key, value in same.items()):
                self.losses[case.group, case.name] = result.get("losses", [])
                return result
        return None

    def start(self, num_processes: int, words: list[str]) -> subprocess.Popen[str]:
        """Gives ranks their words, and has the next ones import meanwhile."""
        ranks = self.ranks.pop(num_processes, None) or ranks_for(num_processes, self.files.folder)
        self.ranks[num_processes] = ranks_for(num_processes, self.files.folder)
        return ranks.run(words)

    def with_differences(self, case: Case, result: dict[str, Any]) -> dict[str, Any]:
        losses = result.get("losses", [])
        self.losses[case.group, case.name] = losses
        wanted = self.losses.get((case.group, case.equals), [])
        if not losses or case.equals == case.name or len(wanted) != len(losses):
            return result
        difference = max(abs(loss - want) / abs(want) for loss, want in zip(losses, wanted, strict=True))
        return {**result, "equals": case.equals, "loss_difference": difference}

    def checkpoint(self, case: Case) -> Path | None:
        folder = self.files.folder / "runs" / RUNS / case.id / "checkpoints"
        return next((path for path in sorted(folder.glob("*")) if not path.name.endswith("-last")), None)

    def write(self, result: dict[str, Any]) -> dict[str, Any]:
        result = {**result, **machine(), **self.files.about}
        with open(self.output, "a", encoding="utf-8") as file:
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
        print(describe(result), flush=True)
        return result


def machine() -> dict[str, Any]:
    found = photographs.machine()
    return {key: found[key] for key in ("date", "device", "cores", "versions")}


def torchrun(num_processes: int) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={num_processes}"]


def speeds(path: Path) -> dict[str, Any]:
    """Medians of the second half, the highest memory, and each step's time and loss."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    warm = rows[len(rows) // 2 :]
    waited = sum(float(row["data_wait_fraction"]) * float(row["step_seconds"]) for row in warm)
    memory = [float(row["peak_memory_gib"]) for row in rows if row.get("peak_memory_gib")]
    return {
        **{name: median([row.get(name) for row in warm]) for name in COLUMNS},
        "data_wait_share": waited / sum(float(row["step_seconds"]) for row in warm),
        "peak_memory_gib": max(memory, default=None),
        "seconds_of_steps": [float(row["step_seconds"]) for row in rows],
        "losses": [float(row["reduced_train_loss"]) for row in rows],
    }


# --- what is shown ----------------------------------------------------------------------------------------------------


def describe(result: dict[str, Any]) -> str:
    found = f"{result['group']}: {result['name']}, {result.get('seconds', 0)} s: "
    if "error" in result:
        return found + f"failed: {result['error']}"
    cells = [f"{name} {result[name]:.4g}" for name in (*COLUMNS, "peak_memory_gib") if result.get(name) is not None]
    if "loss_difference" in result:
        cells.append(f"losses differ by {result['loss_difference']:.1e} from {result['equals']}")
    return found + ", ".join(cells)


def table(results: list[dict[str, Any]]) -> str:
    if not results:
        return "no results"
    last = results[-1]
    about = (
        f"{last['photographs']} photographs of {last['mean_kilobytes']} KB and {last['mean_tiles']} tiles on average, "
    )
    about += f"{last['mean_tokens']} text tokens ({last['tokens_from_to'][0]} to {last['tokens_from_to'][1]})"
    lines = [
        f"{last['date']}, {last['device']}, {last['cores']} cores, {last['versions']}; {about}",
        "",
        "| what | GPUs | micro batch | samples/s | of the first's, times GPUs | step s | MFU | waiting for data "
        "| peak GiB, estimated | losses differ by | |",
        "|" + "---|" * 11,
    ]
    lines += [f"| {' | '.join(cells_of(result, results))} |" for result in results]
    return "\n".join([*lines, *extrapolations(results)])


def cells_of(result: dict[str, Any], results: list[dict[str, Any]]) -> list[str]:
    first = next((one for one in results if one["group"] == result["group"] and one["gpus"] == 1), None)
    speed, scaling = result.get("samples_per_second"), ""
    if result["group"] == "lora" and speed and first and first.get("samples_per_second"):
        scaling = f"{speed / result['gpus'] / first['samples_per_second']:.0%}"
    note = result["error"].strip().splitlines()[-1][:100] if "error" in result else ""
    return [
        f"{result['group']}, {result['name']}",
        str(result["gpus"]),
        str(result.get("micro_batch_size", "")),
        formatted(speed, ".2f"),
        scaling,
        formatted(result.get("step_seconds"), ".2f"),
        formatted(result.get("mfu"), ".1%"),
        formatted(result.get("data_wait_share"), ".1%"),
        ", ".join(formatted(result.get(name), ".1f") for name in ("peak_memory_gib", "estimated_peak_gib")),
        formatted(result.get("loss_difference"), ".1e"),
        note,
    ]


def extrapolations(results: list[dict[str, Any]]) -> list[str]:
    """Hours of the tutorial's run, without validation and checkpoints."""
    lines = [""]
    for result in results:
        if result["group"] not in ("tutorial", "nemo") or not result.get("samples_per_second"):
            continue
        hours = TUTORIAL_STEPS * 128 / result["samples_per_second"] / 3600
        lines.append(f"- {result['name']}: {TUTORIAL_STEPS} steps of 128 samples would take {hours:.2f} hours")
    return lines


if __name__ == "__main__":
    main()
