"""Every problem that can be known before a GPU is taken, all at once. Arithmetic on the config, without NeMo; torch and
transformers only to look through the data.

What a value may be by itself (its type, a wrong name) recipe.py finds from NeMo's signatures. Here is how values fit
each other and the files; feasibility.py has what depends on sizes and on the machine. A value that is absent or not
set yet is no problem here: each check runs when all that it looks at is known.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from omegaconf import DictConfig
from rich.progress import Progress

from vlmsft.checkpoints.find import is_checkpoint, resolve_checkpoint
from vlmsft.errors import Problem, UserError, nearest
from vlmsft.estimates import needs_megatrons_layers
from vlmsft.facts import CPU_STRATEGY, LOCAL_EXECUTOR, TENSOR_PARALLEL, TEXT, VISION, Facts, shapes
from vlmsft.feasibility import infeasible
from vlmsft.launch_checks import paths_survive_nemo_run, secrets_stay_out, time_is_left_before_the_signal
from vlmsft.mllama import sizes
from vlmsft.paths import DATASETS, is_local, with_absolute_paths
from vlmsft.runtime.logging import console

if TYPE_CHECKING:
    from vlmsft.data.encode import SampleEncoder

SLOW_SECONDS = 2.0
"""A look through the data that takes longer says how far it is."""


def find_problems(cfg: DictConfig, world_size: int | None = None) -> list[Problem]:
    """The problems of a config composed from conf/train.yaml: malformed(cfg) and vlmsft.feasibility.infeasible(cfg).

    world_size: number of processes that torchrun or srun started; None = trainer.num_nodes x trainer.devices
    """
    return malformed(cfg, world_size) + infeasible(cfg, world_size)


def malformed(cfg: DictConfig, world_size: int | None = None) -> list[Problem]:
    """What is wrong whatever the machine and the sizes are: for a whole sweep, where infeasible points are left out."""
    facts = Facts(with_absolute_paths(cfg), world_size)
    return [problem for check in CHECKS for problem in check(facts)]


# --- values by themselves ---------------------------------------------------------------------------------------------

MINIMA = {
    "seed": 0,
    "data.micro_batch_size": 1,
    "data.global_batch_size": 1,
    "data.decoder_seq_length": 1,
    "data.num_workers": 0,
    "data.verify_images": 0,
    "data.max_skipped_share": 0,
    "data.shuffle_buffer_size": 0,
    "data.max_samples_per_sequence": 1,
    "data.parallel_shard_iters": 1,
    TENSOR_PARALLEL: 1,
    "trainer.num_nodes": 1,
    "trainer.limit_val_batches": 0,
    "trainer.log_every_n_steps": 1,
    "optim.max_lr": 0,
    "optim.min_lr": 0,
    "optim.warmup_steps": 0,
    "optim.constant_steps": 0,
    "optim.weight_decay": 0,
    "optim.adam_eps": 0,
    "optim.clip_grad": 0,
    "peft.dim": 1,
    "log.ckpt.save_top_k": -1,
    "log.ckpt.every_n_train_steps": 0,
    "trainer.callbacks.early_stopping.patience": 1,
}


def run_has_a_folder(facts: Facts) -> Iterator[Problem]:
    """An id or name that is no folder's own name would put a run among, or into, those of others."""
    if "run_dir" not in facts.cfg:  # another command's config
        return
    for key in ("name", "id"):
        parts = ("" if facts[key] is None else str(facts[key])).split("/")
        if not {"", ".", ".."}.isdisjoint(parts) or (key == "id" and len(parts) > 1):
            yield Problem(key, repr(facts[key]), "a folder's name: runs lie in runs/<name>/<id>")
    if not isinstance(facts["run_dir"], str):
        yield Problem("run_dir", repr(facts["run_dir"]), "a folder")


def image_folder_is_text(facts: Facts) -> Iterator[Problem]:
    folder = facts["data.image_folder"]
    if folder is not None and not isinstance(folder, str):
        remedy = f"A number as text: 'data.image_folder=\"{folder}\"'"
        yield Problem("data.image_folder", repr(folder), "a folder", remedy)


def minima(facts: Facts) -> Iterator[Problem]:
    for key, least in MINIMA.items():
        value = facts[key]
        if type(value) in (int, float) and value < least:
            yield Problem(key, str(value), f"at least {least}")


def memory_limit_is_a_number(facts: Facts) -> Iterator[Problem]:
    limit = facts["gpu_memory_gib"]
    if limit is not None and (type(limit) not in (int, float) or limit <= 0):
        yield Problem("gpu_memory_gib", repr(limit), "a number of GiB above 0, or null to leave memory unchecked")


# --- parallelism ------------------------------------------------------------------------------------------------------


def unsupported_layers(facts: Facts) -> Iterator[Problem]:
    """What Megatron's configs offer and MLlama's forward has no code for."""
    allowed = {
        "cpu_offloading": ((False,), "false"),
        "fp8": ((), "null"),
        "recompute_granularity": (("full", "selective"), "full, selective or null"),
    }
    for part in (TEXT, VISION):
        for name, (values, expected) in allowed.items():
            found = facts[f"{part}.{name}"]
            if found is not None and found not in values:
                yield Problem(f"{part}.{name}", str(found), expected, "MLlama's forward has no code for it")


def lean_forward_is_possible(facts: Facts) -> Iterator[Problem]:
    if facts["model.config.lean_forward"] is True:
        yield from needs_megatrons_layers(facts)


def frozen_fp8_is_possible(facts: Facts) -> Iterator[Problem]:
    """But for the GPU, which the model looks at when it is built."""
    key, which = "model.config.frozen_fp8", facts["model.config.frozen_fp8"]
    if which is None:
        return
    if which not in sizes.FP8_PARTS:
        expected = f"{', '.join(sizes.FP8_PARTS)} or null"
        yield Problem(key, repr(which), expected, nearest(str(which), sizes.FP8_PARTS))
        return
    tp, lean_forward = facts[TENSOR_PARALLEL], facts["model.config.lean_forward"]
    if type(tp) is int and tp > 1:
        yield Problem(TENSOR_PARALLEL, str(tp), f"1 with {key}={which}", f"Or {key}=null")
    elif lean_forward is not True:  # lean_forward_is_possible says it then
        yield from needs_megatrons_layers(facts, f"{key}={which}", f"{key}=null")
    if lean_forward is False:
        expected = f"null or true with {key}"
        yield Problem("model.config.lean_forward", "false", expected, "Megatron's classes have bf16 only")
    if not _tower_is_frozen(facts):
        remedy = "peft=lora or model.config.freeze_vision_model=true freezes it"
        yield Problem(key, which, "null where something of the tower trains", remedy)
    if which == "all" and not any(facts[f"{of}.freeze_language_model"] is True for of in ("model.config", "peft")):
        remedy = "peft=lora or model.config.freeze_language_model=true freezes them"
        yield Problem(key, which, "tower or null where the text decoder's own weights train", remedy)
    parts = (VISION, TEXT) if which == "all" else (VISION,)
    for name in [f"{part}.{width}" for part in parts for width in ("hidden_size", "ffn_hidden_size")]:
        if type(facts[name]) is int and facts[name] % sizes.FP8_MULTIPLE:
            yield Problem(name, str(facts[name]), f"a multiple of {sizes.FP8_MULTIPLE} with {key}")
    if which == "all":
        yield from _heads_fit_fp8(facts, key)


def _heads_fit_fp8(facts: Facts, key: str) -> Iterator[Problem]:
    known = shapes(facts)
    if known is None:
        return
    text, _ = known
    for name, width in (("num_attention_heads", text.query_size), ("num_query_groups", 2 * text.key_size)):
        if width % sizes.FP8_MULTIPLE:
            found = f"{facts[f'{TEXT}.{name}']}: a matrix with {width} outputs"
            yield Problem(f"{TEXT}.{name}", found, f"outputs as a multiple of {sizes.FP8_MULTIPLE} with {key}")


def _tower_is_frozen(facts: Facts) -> bool:
    if not any(facts[f"{of}.freeze_vision_model"] is True for of in ("model.config", "peft")):
        return False
    targets, known = facts["peft.target_modules"], shapes(facts)
    if known is None or not isinstance(targets, list):
        return True
    matrices = [name for name in sizes.lora_matrices(*known) if ".vision_encoder." in name]
    return not any(sizes.lora_hits(target, matrices) for target in targets if isinstance(target, str))


def world_size_is_started(facts: Facts) -> Iterator[Problem]:
    configured = Facts(facts.cfg).world_size
    if facts.started is not None and configured is not None and facts.started != configured:
        expected = f"{facts.started} processes in all, which torchrun or srun started"
        yield Problem("trainer.devices", f"{configured} with trainer.num_nodes", expected)


def devices_are_a_number(facts: Facts) -> Iterator[Problem]:
    """As Lightning reads them: a number of processes on each node, or a list of GPUs."""
    devices = facts["trainer.devices"]
    is_text = isinstance(devices, str) and (devices in ("auto", "-1") or re.fullmatch(r"[\d, ]+", devices))
    if devices is None or devices == -1 or is_text or (isinstance(devices, list) and devices):
        return
    if type(devices) is not int or devices < 1:
        yield Problem("trainer.devices", repr(devices), "a number from 1 on, auto, or a list of GPUs")


def devices_of_other_machines_are_numbered(facts: Facts) -> Iterator[Problem]:
    """The schemas of their executors want an integer, which -1 is, too."""
    devices = facts["trainer.devices"]
    if devices == -1 and not facts.runs_here:
        expected = "a number of GPUs: only launch=local and launch=torchrun count those of the machine"
        yield Problem("trainer.devices", str(devices), expected)


def torchrun_is_one_node(facts: Facts) -> Iterator[Problem]:
    num_nodes = facts["trainer.num_nodes"]
    if facts["launch.executor._target_"] == LOCAL_EXECUTOR and type(num_nodes) is int and num_nodes > 1:
        remedy = "launch=slurm, or launch=local below a torchrun or srun on each node"
        yield Problem("trainer.num_nodes", str(num_nodes), "1 with launch=torchrun", remedy)


def cpu_and_gpu(facts: Facts) -> Iterator[Problem]:
    on_cpu, accelerator = facts["strategy._target_"] == CPU_STRATEGY, facts["trainer.accelerator"]
    if on_cpu and str(facts["precision"]) != "32":
        yield Problem("precision", repr(facts["precision"]), "'32' with strategy=cpu")
    if on_cpu and accelerator != "cpu":
        yield Problem("trainer.accelerator", repr(accelerator), "'cpu' with strategy=cpu")
    if not on_cpu and accelerator == "cpu":
        yield Problem("trainer.accelerator", "'cpu'", f"'gpu' with {facts['strategy._target_']}", "Or strategy=cpu")
    if on_cpu and facts["model.config.layers"] == "transformer_engine":
        yield Problem("model.config.layers", "'transformer_engine'", "'torch' or 'auto' with strategy=cpu")


# --- batches and steps ------------------------------------------------------------------------------------------------


def steps(facts: Facts) -> Iterator[Problem]:
    max_steps = facts["trainer.max_steps"]
    if type(max_steps) is not int:
        return
    if max_steps < 1:
        remedy = "The data never ends, and the learning rate's schedule is as long as the run"
        yield Problem("trainer.max_steps", str(max_steps), "at least 1", remedy)
        return
    interval = facts["trainer.val_check_interval"]
    if type(interval) is float and facts.validates:
        yield Problem("trainer.val_check_interval", str(interval), "a whole number of steps")
    elif type(interval) is int and interval < 1:
        yield Problem("trainer.val_check_interval", str(interval), "at least 1")
    elif type(interval) is int and interval > max_steps and facts.validates:
        remedy = "The run would end without a validation. Without one on purpose: data.validation_path=null"
        yield Problem("trainer.val_check_interval", str(interval), f"at most trainer.max_steps {max_steps}", remedy)
    accumulate = facts["trainer.accumulate_grad_batches"]
    if type(accumulate) is int and accumulate != 1:
        remedy = "Megatron accumulates by itself: set data.global_batch_size"
        yield Problem("trainer.accumulate_grad_batches", str(accumulate), "1", remedy)


def validation_batches(facts: Facts) -> Iterator[Problem]:
    limit = facts["trainer.limit_val_batches"]
    if type(limit) is float and limit not in (0.0, 1.0):
        remedy = "A fraction may cut a global batch in two"
        expected = "1.0 (all), 0, or a number of micro batches"
        yield Problem("trainer.limit_val_batches", str(limit), expected, remedy)


def validation_is_needed(facts: Facts) -> Iterator[Problem]:
    if facts.validates or not facts.names_training_data:
        return
    monitor = facts["log.ckpt.monitor"]
    if isinstance(monitor, str) and monitor.startswith("val"):
        yield Problem(
            "log.ckpt.monitor", repr(monitor), "a metric of training", "There is no validation: reduced_train_loss"
        )
    if facts["trainer.callbacks.early_stopping"] is not None:
        yield Problem("trainer.callbacks.early_stopping", "early stopping", "null", "There is no validation to stop by")


def checkpoints_are_saved(facts: Facts) -> Iterator[Problem]:
    """NeMo's ModelCheckpoint saves after validations, and at the end only if the last step is not a validation's.

    To go on with the best save_top_k, a continued run reads the monitor's values out of the checkpoints' names.
    """
    monitor, filename = facts["log.ckpt.monitor"], facts["log.ckpt.filename"]
    if facts["log.ckpt"] is None or not facts.names_training_data:
        return
    example = "val_loss" if facts.validates else "reduced_train_loss"
    if facts["log.ckpt.save_top_k"] != -1:
        if not isinstance(monitor, str):
            yield Problem("log.ckpt.monitor", str(monitor), "the name of a metric", f"log.ckpt.monitor={example}")
        elif (problem := wrong_metric(facts, "log.ckpt.monitor")) is not None:
            yield problem
        elif isinstance(filename, str) and not re.search(rf"\{{{re.escape(monitor)}[:}}]", filename):
            remedy = "A continued run finds its best checkpoints by their names"
            yield Problem("log.ckpt.filename", repr(filename), f"a name with {{{monitor}:.4f}}", remedy)
    if not facts.validates:
        yield from _saved_without_validation(facts)


def early_stopping_has_a_metric(facts: Facts) -> Iterator[Problem]:
    problem = wrong_metric(facts, "trainer.callbacks.early_stopping.monitor")
    if problem is not None and facts.validates:
        yield problem


def wrong_metric(facts: Facts, key: str) -> Problem | None:
    """The value of `key` as a problem where it is a validation loss that is not logged, or a metric misspelt.

    Other names are let through, since callbacks can log what they like.
    """
    metric = facts[key]
    if not isinstance(metric, str):
        return None
    names = [source.name for source in facts.datasets if source.key.startswith("data.validation_path")]
    validations = ["val_loss", *(f"val_loss_{name}" for name in names if name is not None)]
    known = [*validations, *TRAINING_METRICS]
    hint = nearest(metric, known)
    if metric in known or not (metric.startswith("val_loss") or hint):
        return None
    return Problem(key, repr(metric), f"a metric of this run: {', '.join(known)}", hint)


TRAINING_METRICS = ("reduced_train_loss", "grad_norm", "lr")


def _saved_without_validation(facts: Facts) -> Iterator[Problem]:
    where, every = "log.ckpt.every_n_train_steps", facts["log.ckpt.every_n_train_steps"]
    sizes = facts.whole("trainer.max_steps", "trainer.val_check_interval")
    if sizes is None or min(sizes) < 1:
        return
    max_steps, interval = sizes
    wanted = every if type(every) is int and every > 0 else interval
    fitting = next(steps for steps in range(min(wanted, max_steps), 0, -1) if max_steps % steps == 0)
    if not every and facts["log.ckpt.train_time_interval"] is None:
        remedy = f"{where}={fitting}, or log.ckpt.train_time_interval={{minutes: 15}}"
        yield Problem(where, str(every), "a number of steps: there is no validation to save a checkpoint after", remedy)
        return
    at_the_end = bool(facts["log.ckpt.save_last"]) and max_steps % interval != 0
    if not at_the_end and not (type(every) is int and every > 0 and max_steps % every == 0):
        remedy = f"Else the last steps are saved nowhere: {where}={fitting} log.ckpt.train_time_interval=null"
        yield Problem(where, str(every), f"a divisor of trainer.max_steps {max_steps}", remedy)


def saving_fits_peft(facts: Facts) -> Iterator[Problem]:
    if facts["peft"] is not None and facts["strategy.ckpt_async_save"]:
        remedy = "NeMo's PEFT callback can't save asynchronously"
        yield Problem("strategy.ckpt_async_save", "true", "false with peft", remedy)


def learning_rate(facts: Facts) -> Iterator[Problem]:
    highest, lowest = facts["optim.max_lr"], facts["optim.min_lr"]
    if isinstance(highest, (int, float)) and isinstance(lowest, (int, float)) and lowest > highest:
        yield Problem("optim.min_lr", str(lowest), f"at most optim.max_lr {highest}")
    counts = facts.whole("optim.warmup_steps", "optim.constant_steps", "trainer.max_steps")
    if counts is not None and counts[0] + counts[1] >= counts[2] > 0:
        expected = f"less than trainer.max_steps {counts[2]}"
        yield Problem("optim.warmup_steps", f"{counts[0]} and optim.constant_steps {counts[1]}", expected)


def datasets_are_named(facts: Facts) -> Iterator[Problem]:
    for key in DATASETS:
        try:
            facts.sources(key)
        except UserError as error:
            yield from error.problems


# --- sizes ------------------------------------------------------------------------------------------------------------


def something_is_trained(facts: Facts) -> Iterator[Problem]:
    names = [f"model.config.freeze_{part}" for part in ("language_model", "vision_model", "vision_projection")]
    if facts["peft"] is None and all(facts[name] is True for name in names):
        yield Problem(", ".join(names), "all true", "false for one of them, or peft=lora: else nothing is trained")


def lora_targets(facts: Facts) -> Iterator[Problem]:
    """NeMo passes over a pattern that hits nothing, and would train nothing."""
    targets, known = facts["peft.target_modules"], shapes(facts)
    if known is None or not isinstance(targets, list):
        return
    matrices = sizes.lora_matrices(*known)
    names = sizes.matrix_names(matrices)
    for target in targets:
        if isinstance(target, str) and not sizes.lora_hits(target, matrices):
            expected = f"a pattern that hits one of the model's matrices: {', '.join(names)}"
            remedy = nearest(target.rpartition(".")[2], names)
            yield Problem("peft.target_modules", repr(target), expected, remedy)


# --- files ------------------------------------------------------------------------------------------------------------


def processor_fits(facts: Facts) -> Iterator[Problem]:
    """What the processor makes is what the model takes; on the first process of a run only, as data_files."""
    processor = facts["data.processor"]
    if not isinstance(processor, str) or not facts.reads_files:
        return
    if is_local(processor) and not Path(processor).is_dir():
        yield Problem("processor", repr(processor), "a folder, or the id of a repository on the Hugging Face hub")
        return
    if not is_local(processor) and not any(Path(source.path).exists() for source in facts.datasets):
        return  # nothing is downloaded for a configuration that has no data here
    encoder, problems = load_processor(processor)
    yield from problems
    if encoder is None:
        return
    made = {
        f"{VISION}.vision_chunk_size": encoder.tile_size,
        f"{VISION}.max_num_tiles": encoder.max_tiles,
        # The vocabulary ends before <|image|>: its embedding is the first of the extra ones
        f"{TEXT}.vocab_size": encoder.image_token_id,
    }
    for key, value in made.items():
        if type(facts[key]) is int and facts[key] != value:
            yield Problem(key, str(facts[key]), f"{value}, as in the processor {processor}")


@functools.cache
def load_processor(processor: str) -> tuple[SampleEncoder | None, list[Problem]]:
    """An encoder of the processor, or why there is none. Tried once: a download that fails takes its time."""
    from vlmsft.data.encode import SampleEncoder

    encoder = SampleEncoder(processor, decoder_seq_length=1)
    try:
        _ = encoder.image_token_id
    except UserError as error:
        return None, error.problems
    return encoder, []


def checkpoint_exists(facts: Facts) -> Iterator[Problem]:
    path = facts["restore_from"]
    if path is None or not facts.runs_here or (isinstance(path, str) and ("://" in path or is_checkpoint(Path(path)))):
        return
    yield Problem("restore_from", repr(path), "the folder of a NeMo checkpoint", _checkpoint_meant_by(str(path)))


def _checkpoint_meant_by(path: str) -> str:
    if Path(path, "config.json").is_file():
        return f"A Hugging Face model becomes one: python -m vlmsft.import_ckpt source={path} output=..."
    with suppress(UserError):
        return f"Of this run: \"restore_from='{resolve_checkpoint(path, 'last')}'\""
    return "Fresh random weights on purpose: restore_from=null"


def data_files(facts: Facts) -> Iterator[Problem]:
    """What vlmsft.data finds in the files, on the first process of a run only: the others would repeat it."""
    if not facts.reads_files or facts.reads_shards:
        return
    folder_problems = set()
    max_skipped = facts["data.max_skipped_share"] if facts["data.on_error"] == "skip" else None
    limits = (facts["data.processor"], facts["data.decoder_seq_length"], facts["data.verify_images"], max_skipped)
    for source in facts.datasets:
        if not Path(source.path).is_file():
            yield Problem(source.key, repr(source.path), "a JSON or JSONL file of records")
            continue
        for problem in problems_of_file(source.path, Look(source.image_folder, *limits)):
            if problem.where != source.image_folder:
                yield problem
            elif problem not in folder_problems:  # it isn't there for both files
                folder_problems.add(problem)
                is_shared = source.image_folder == facts["data.image_folder"]
                key = "data.image_folder" if is_shared else f"{source.key}.image_folder"
                yield replace(problem, where=key, found=f"no folder {source.image_folder!r}")


def data_shards(facts: Facts) -> Iterator[Problem]:
    """Folders of shards: metadata, missing and cut shards, and a sample for each worker; the shards aren't read.

    Imports torch, as data_files does.
    """
    if not facts.reads_files or not facts.reads_shards:
        return
    from vlmsft.data.energon_shards import ShardFolder

    sizes, said = facts.whole("data.num_workers"), set()
    for split, key in (("train", "data.path"), ("val", "data.validation_path")):
        for source in (source for source in facts.datasets if source.key.startswith(key)):
            try:
                num_samples = len(ShardFolder.open(source.path, split, source.key))
            except UserError as error:  # a folder that isn't there is none for validation either
                new = {problem.found: problem for problem in error.problems if problem.found not in said}
                said.update(new)
                yield from new.values()
                continue
            if split == "train" and sizes is not None and facts.data_parallel_size is not None:
                workers = max(1, sizes[0]) * facts.data_parallel_size
                if num_samples < workers:
                    expected = f"at least {workers}, one for each loader process of all ranks"
                    remedy = "Fewer data.num_workers, or more samples"
                    yield Problem(source.key, f"{num_samples} training samples", expected, remedy)


class Look(NamedTuple):
    """What a look through records depends on beside the file; each None where the config doesn't tell."""

    image_folder: str | None
    processor: str | None
    decoder_seq_length: int | None
    verify_images: int | None
    max_skipped_share: float | None  # None as well where no sample is skipped

    @property
    def encoder(self) -> SampleEncoder | None:
        """None where it can't be made: processor_fits says why."""
        processor, length = self.processor, self.decoder_seq_length
        if not isinstance(processor, str) or type(length) is not int or length < 1:
            return None
        if is_local(processor) and not Path(processor).is_dir():
            return None
        encoder, _ = load_processor(processor)
        return None if encoder is None else encoder.with_limit(length)


def problems_of_file(path: str, look: Look) -> list[Problem]:
    """The first problems of a file of records; looked for once, however many jobs of a multirun use the file."""
    from vlmsft.data import records, skips

    stat = os.stat(path)
    key = (path, stat.st_size, stat.st_mtime_ns, look)
    if key not in _checked:
        encoder = look.encoder  # loading it takes seconds, which are not the data's
        options = {} if look.verify_images is None else {"verify_images": look.verify_images}
        with _progress_if_slow(f"looking through {path}") as progress:
            found = records.find_problems(
                path,
                look.image_folder,
                encoder=encoder,
                progress=progress,
                not_decoded=lambda number: _say_not_decoded(path, number),
                **options,
            )
        if look.max_skipped_share is not None:
            left = skips.not_skippable(found, path, look.max_skipped_share)
            if len(left) < len(found):
                _say_skipped(path, [problem for problem in found if problem not in left])
            found = left
        _checked[key] = records.capped(found)
    return _checked[key]


_checked: dict[tuple[str, int, int, Look], list[Problem]] = {}


def _say_skipped(path: str, problems: list[Problem]) -> None:
    text = f"{path}: {len(problems)} problem(s), whose samples will be skipped; the first: {problems[0]}"
    console().print(text, markup=False, highlight=False, soft_wrap=True)


def _say_not_decoded(path: str, number: int) -> None:
    text = f"{path}: {number} images not decoded: a broken one is found when its turn comes"
    console().print(f"{text}; data.verify_images={number} decodes them", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _progress_if_slow(text: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function of (done, total) that shows a bar on the console once SLOW_SECONDS have gone by."""
    started, bar, task = time.monotonic(), None, None

    def show(done: int, total: int) -> None:
        nonlocal bar, task
        if bar is None and time.monotonic() - started < SLOW_SECONDS:
            return
        if bar is None:
            out = console()
            if not out.is_terminal:
                out.print(f"{text} ...", markup=False, highlight=False)
            bar = Progress(console=out, transient=True, disable=not out.is_terminal)
            task = bar.add_task(text)
            bar.start()
        assert task is not None  # made with the bar
        bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        if bar is not None:
            bar.stop()


CHECKS: tuple[Callable[[Facts], Iterator[Problem]], ...] = (
    run_has_a_folder,
    image_folder_is_text,
    minima,
    memory_limit_is_a_number,
    unsupported_layers,
    lean_forward_is_possible,
    frozen_fp8_is_possible,
    world_size_is_started,
    devices_are_a_number,
    devices_of_other_machines_are_numbered,
    torchrun_is_one_node,
    cpu_and_gpu,
    steps,
    validation_batches,
    validation_is_needed,
    checkpoints_are_saved,
    early_stopping_has_a_metric,
    saving_fits_peft,
    learning_rate,
    datasets_are_named,
    something_is_trained,
    lora_targets,
    secrets_stay_out,
    paths_survive_nemo_run,
    time_is_left_before_the_signal,
    processor_fits,
    checkpoint_exists,
    data_files,
    data_shards,
)

CHECKS_OF_FILES = (processor_fits, checkpoint_exists, data_files, data_shards)
"""Those of CHECKS that look at more than the config."""
