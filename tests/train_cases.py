"""Helpers of test_train.py: worker processes that train one job after the other, and callbacks that look inside."""

from __future__ import annotations

import contextlib
import csv
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import shutil
import signal
import socket
import threading
import time
from dataclasses import asdict, dataclass
from multiprocessing.managers import SyncManager
from pathlib import Path

import lightning.pytorch as pl
import psutil
import torch
from nemo_forks import Forked, environment, run_module, wait_for_all

from vlmsft.config_files import sample_set

RUNS = Path("runs/demo")
"""Where the demo leaves its runs, from a worker's working directory."""
TRAINED = "trained "
"""What a worker's line begins with that says that a training ended."""
CHECKPOINT_AFTER, KILLED_AFTER = 5, 8
"""What a run that is cut had saved (after a validation) and done, in steps."""


@dataclass
class Job:
    """One training of conf/train.yaml with `overrides` in runs/demo/`name`.

    weights_from: the run whose last checkpoint's weights it starts from
    cut_from: the run that it goes on from, as if that had been killed (see cut)
    cut_after: steps that this one had saved
    """

    name: str
    overrides: list[str]
    weights_from: str | None = None
    cut_from: str | None = None
    cut_after: int = CHECKPOINT_AFTER
    port: int = 0


# --- in the test's process --------------------------------------------------------------------------------------------


def run_jobs(folder: Path, jobs: list[Job], num_processes: int = 1) -> None:
    """Train the jobs one after the other in `num_processes` gloo ranks whose working directory is `folder`."""
    jobs_file = folder / f"jobs-{time.monotonic_ns()}.json"
    ports = free_ports(len(jobs))
    jobs_file.write_text(json.dumps([asdict(job) | {"port": port} for job, port in zip(jobs, ports, strict=True)]))
    ranks = [
        Forked(work, str(jobs_file), folder=folder, environment=_environment(rank, num_processes))
        for rank in range(num_processes)
    ]
    wait_for_all(ranks, seconds=900)
    print("".join(line for line in ranks[0].output().splitlines(keepends=True) if line.startswith(TRAINED)))


@dataclass
class Killed:
    """How a training ended of which a rank was killed.

    seconds: from then to the end of the command
    left: processes that it started and that were still there then
    rows: of metrics.csv, by column
    """

    exit_code: int
    output: str
    seconds: float
    left: list[int]
    rows: dict[str, list[float]]


def kill_a_rank(folder: Path, name: str, overrides: list[str], *, rank: int, after_step: int) -> Killed:
    """`vlmsft train` in runs/demo/`name`; one of the ranks that it starts gets SIGKILL."""
    killed, mark = folder / "killed", f"VLMSFT_TEST_{time.monotonic_ns()}"
    killer = (
        f"+trainer.callbacks.watch={{_target_:train_cases.KillRank,rank:{rank},after_step:{after_step},path:{killed}}}"
    )
    arguments = [*overrides, f"id={name}", killer]
    launcher = Forked(run_module, "vlmsft.train", *arguments, folder=folder, environment=environment(**{mark: ""}))
    try:
        exit_code = launcher.wait(600)
    finally:
        launcher.kill()
    assert killed.exists(), launcher.output()[-6000:]
    seconds = time.time() - killed.stat().st_mtime
    return Killed(exit_code, launcher.output(), seconds, _processes_with(mark), metrics(folder / RUNS / name))


def _processes_with(variable: str) -> list[int]:
    """Processes that have it in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if variable in process.environ():
                found.append(process.pid)
    return found


def _environment(rank: int, num_processes: int) -> dict[str, str]:
    return environment(MASTER_ADDR="127.0.0.1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_processes))


def write_sample_shards(folder: Path) -> None:
    """The packaged sample set as shards, as `vlmsft.prepare dataset=sample` writes them."""
    from vlmsft.data.prepare import energon, shards
    from vlmsft.data.records import RecordFile

    sample, counts = Path(sample_set()), {}
    folder.mkdir()
    for prefix, name in (("train", "train.jsonl"), ("val", "validation.jsonl")):
        limits = {"max_mb": 0.5, "max_records": 1000, "shuffle_seed": None}
        for shard in shards.plan(folder, prefix, RecordFile(sample / name), sample / "images", **limits):
            written = shards.write(shard)
            counts[written.name] = written.num_records
    energon.write_metadata(folder, counts, num_workers=1)


def free_ports(count: int) -> list[int]:
    """Below those that the kernel hands out: the trainings need them minutes from now, one after the other."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(15000, 32000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.append(port)
    return ports


def metrics(run_dir: Path) -> dict[str, list[float]]:
    """metrics.csv by column; empty cells left out."""
    with open(run_dir / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def largest_difference(a: list[float], b: list[float]) -> float:
    """The largest relative difference of two series of the same length."""
    assert len(a) == len(b) > 0, (a, b)
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def last_checkpoint(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("*-last"), key=lambda path: path.stat().st_mtime)


# --- in a worker ------------------------------------------------------------------------------------------------------


def work(jobs_file: str) -> None:
    from vlmsft.config_files import register_resolvers

    register_resolvers()
    queue_of_a_fork()
    for job in (Job(**fields) for fields in json.loads(Path(jobs_file).read_text())):
        os.environ["MASTER_PORT"] = str(job.port)
        overrides = [*job.overrides, f"id={job.name}"]
        if job.weights_from is not None:
            overrides.append(f"restore_from='{last_checkpoint(RUNS / job.weights_from).absolute()}'")
        if job.cut_from is not None:
            cut(RUNS / job.cut_from, RUNS / job.name, job.cut_after)
        started = time.monotonic()
        train(overrides)
        print(f"{TRAINED}{job.name}: {time.monotonic() - started:.1f} s", flush=True)
        forget_megatron()


def queue_of_a_fork() -> None:
    """Megatron's queue of a checkpoint's writers, in a process that needn't import torch once more."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(initializer=end_with_parent)
    filesystem_async._results_queue = manager.Queue()


def end_with_parent() -> None:
    """Also where that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def cut(source: Path, target: Path, num_saved: int) -> None:
    """A run folder as the source's was when KILLED_AFTER steps were done, and `num_saved` steps saved."""
    if os.environ.get("RANK", "0") != "0":
        while not target.exists():
            time.sleep(0.1)
        return
    (saved,) = (
        path
        for path in (source / "checkpoints").iterdir()
        if f"-step={num_saved - 1}-" in path.name and not path.name.endswith("-last")
    )
    partial = target.with_name(f"{target.name}.partial")
    for name in (saved.name, f"{saved.name}-last"):
        shutil.copytree(saved, partial / "checkpoints" / name)
    rows = (source / "metrics.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (partial / "metrics.csv").write_text("".join(rows[: 1 + KILLED_AFTER]), encoding="utf-8")
    partial.rename(target)


def train(overrides: list[str]) -> None:
    import hydra
    import nemo_run as run

    from vlmsft.config_files import root
    from vlmsft.recipe import finetune_recipe
    from vlmsft.runtime.logging import quiet

    with hydra.initialize_config_dir(str(root() / "conf"), version_base="1.3"):
        cfg = hydra.compose("train", overrides)
    with quiet(cfg.run_dir):
        run.run(finetune_recipe(cfg), direct=True)


def forget_megatron() -> None:
    """What would make the next training of this process go on with the groups and sizes of the last one."""
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from nemo.utils import AppState

    parallel_state.destroy_model_parallel()
    destroy_num_microbatches_calculator()
    torch.distributed.destroy_process_group()
    AppState.__init__(AppState())


class KillRank(pl.Callback):
    """SIGKILL to a rank as it begins the step after `after_step`; `path` is touched before."""

    def __init__(self, rank: int, after_step: int, path: str):
        self.rank, self.after_step, self.path = rank, after_step, path

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.after_step:
            Path(self.path).touch()
            os.kill(os.getpid(), signal.SIGKILL)


class ChangedParameters(pl.Callback):
    """Writes {name: whether its values changed in training} of all parameters to `path`."""

    def __init__(self, path: str):
        self.path = path
        self.before: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if not self.before:
            self.before = {name: p.detach().clone() for name, p in self._parameters(pl_module)}

    def on_train_end(self, trainer, pl_module) -> None:
        changed = {name: not torch.equal(p, self.before[name]) for name, p in self._parameters(pl_module)}
        Path(self.path).write_text(json.dumps(changed))

    def _parameters(self, pl_module):
        """Without the prefixes of wrappers, of which Megatron's comes later where there is LoRA."""
        return ((re.sub(r"^(module\.)+", "", name), p) for name, p in pl_module.named_parameters())


class ExactValidationLoss(pl.Callback):
    """Writes the mean loss over all answer tokens of validation to `path`, from one sample at a time: a mapping of
    "val_loss", and of "val_loss_<name>" where the sets have names."""

    def __init__(self, path: str):
        self.path = path

    @torch.no_grad()
    def on_validation_end(self, trainer, pl_module) -> None:
        from vlmsft.data.collate import collate

        data = trainer.datamodule._validation
        names = [f"val_loss_{name}" for name in getattr(data, "names", None) or []]
        sums = {name: [0.0, 0.0] for name in ("val_loss", *names)}
        pl_module.eval()
        for number, dataset in enumerate(getattr(data, "datasets", [data])):
            for index in range(len(dataset)):
                batch = pl_module.data_step(iter([collate([dataset.sample(index)], dataset.encoder.pad_token_id)]))
                losses = pl_module.forward_step(batch)
                for name in ("val_loss", *names[number : number + 1]):
                    sums[name][0] += float((losses * batch["loss_mask"]).double().sum())
                    sums[name][1] += float(batch["loss_mask"].sum())
        pl_module.train()
        Path(self.path).write_text(json.dumps({name: loss / tokens for name, (loss, tokens) in sums.items()}))
