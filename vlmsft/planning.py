"""A sweep before it is started: which of its jobs can run, what memory each takes and about how long.

Arithmetic on the configs: neither torch nor NeMo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmsft import estimates
from vlmsft.errors import Problem, UserError
from vlmsft.facts import Facts
from vlmsft.feasibility import infeasible, sizes_are_known
from vlmsft.mllama.flops import count_batch, step_costs
from vlmsft.mllama.sizes import GIB
from vlmsft.runtime.metrics_rows import read_metrics


@dataclass(frozen=True)
class Speed:
    """What hours are computed from.

    flops_per_second: model FLOPs of a GPU
    text_tokens: of a sample, on average; None = data.decoder_seq_length, the most that it can have
    source: where the numbers come from, in words
    """

    flops_per_second: float
    text_tokens: float | None
    source: str


@dataclass(frozen=True)
class JobPlan:
    """A job of a sweep.

    varies: its overrides that not all jobs have
    problems: why it can't run
    memory_gib: of each GPU; None on the CPU, or where the config leaves it open
    seconds: of all its steps, without validation, checkpoints and start; None where speed or sizes are not known
    num_gpus: 0 on the CPU
    """

    varies: str
    problems: Sequence[Problem]
    memory_gib: float | None
    seconds: float | None
    num_gpus: int
    source: str

    @property
    def gpu_hours(self) -> float | None:
        return None if self.seconds is None else self.seconds / 3600 * self.num_gpus


def plan_job(cfg: DictConfig, varies: str) -> JobPlan:
    """Raises UserError where `plan` of the config can't be understood."""
    facts = Facts(cfg)
    known, on_cpu = sizes_are_known(facts), facts["trainer.accelerator"] == "cpu"
    speed = speed_of(cfg)
    return JobPlan(
        varies=varies,
        problems=infeasible(cfg),
        memory_gib=estimates.memory(facts).device / GIB if known and not on_cpu else None,
        seconds=seconds_of(facts, speed) if known and speed is not None else None,
        num_gpus=0 if on_cpu else facts.world_size or 0,
        source="" if speed is None else speed.source,
    )


def speed_of(cfg: DictConfig) -> Speed | None:
    """The speed that conf/train.yaml's `plan` assumes or names a run for; None where it is not known (on the CPU)."""
    raise_wrong_values(cfg)
    tokens = cfg.plan.text_tokens_per_sample
    if cfg.plan.like_run is not None:
        return measured_speed(cfg.plan.like_run, tokens)
    if cfg.trainer.accelerator == "cpu":
        return None
    peak, mfu = cfg.plan.peak_tflops_per_second, cfg.plan.mfu
    source = f"assumed: {100 * mfu:g} % of {peak:g} TFLOP/s a GPU (plan.mfu, plan.peak_tflops_per_second)"
    return Speed(mfu * peak * 1e12, tokens, source)


def raise_wrong_values(cfg: DictConfig) -> None:
    """Raises UserError where a number of `plan` is none, or not above 0."""
    may_be_null = ("text_tokens_per_sample", "tiles_per_image")
    problems = [
        Problem(f"plan.{name}", repr(cfg.plan[name]), "a number above 0" + " or null" * (name in may_be_null))
        for name in ("mfu", "peak_tflops_per_second", *may_be_null)
        if not (name in may_be_null and cfg.plan[name] is None)
        and not (type(cfg.plan[name]) in (int, float) and cfg.plan[name] > 0)
    ]
    if problems:
        raise UserError(problems)


def measured_speed(run_dir: str, text_tokens: float | None) -> Speed:
    """Medians of an earlier run's metrics.csv, its first step aside: model FLOPs of a GPU, text tokens of a sample.

    Raises UserError where the run has logged none.
    """
    rows, _ = read_metrics(Path(run_dir).expanduser() / "metrics.csv")
    columns = ("tflops_per_second_per_gpu", "tokens_per_second", "samples_per_second")
    whole = [row for row in rows if all(row.get(name, 0.0) > 0.0 for name in columns)][1:]
    if not whole:
        expected = f"the folder of a run of an MLlama whose metrics.csv has two rows or more of {', '.join(columns)}"
        raise UserError(Problem("plan.like_run", repr(run_dir), expected))
    tflops = median(row["tflops_per_second_per_gpu"] for row in whole)
    if text_tokens is None:
        text_tokens = median(row["tokens_per_second"] / row["samples_per_second"] for row in whole)
    source = f"measured: {tflops:.3g} TFLOP/s a GPU at {text_tokens:.0f} text tokens a sample ({run_dir})"
    return Speed(tflops * 1e12, text_tokens, source)


def seconds_of(facts: Facts, speed: Speed) -> float:
    """Of all steps of a config whose sizes are known."""
    assert facts.world_size is not None
    num_samples = facts["trainer.max_steps"] * facts["data.global_batch_size"]
    return num_samples * flops_per_sample(facts, speed.text_tokens) / (speed.flops_per_second * facts.world_size)


def flops_per_sample(facts: Facts, text_tokens: float | None) -> float:
    """Model FLOPs of a sample with one image that all its text sees; text_tokens: None = the most, all with a label."""
    text, vision = estimates.shapes_of(facts)
    longest, tiles = facts["data.decoder_seq_length"], facts["plan.tiles_per_image"]
    length = min(text_tokens or longest, longest)
    tiles = vision.max_num_tiles if tiles is None else tiles
    counts = count_batch(vision, text_tokens=[length], num_answers=length, num_tiles=[tiles], visible_rows=[length])
    return step_costs(text, vision, estimates.training(facts)).of(counts)


# --- shown ------------------------------------------------------------------------------------------------------------


def show(jobs: Sequence[JobPlan], console: Console) -> None:
    """A table of the jobs, and what it adds up to."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("job", justify="right")
    table.add_column("varies", overflow="fold")
    table.add_column("runs?", overflow="fold")
    for heading in ("GiB/GPU", "time", "GPU hours"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, job in enumerate(jobs):
        reason = Text("\n".join(map(str, job.problems)), "yellow") if job.problems else Text("yes", "green")
        runs = job.seconds is not None and not job.problems
        hours = f"{job.gpu_hours:.3g}" if runs and job.num_gpus else ""
        memory = "" if job.memory_gib is None else f"{job.memory_gib:.1f}"
        varies, time = Text(job.varies.replace(" ", "\n")), format_hours(job.seconds) if runs else ""
        table.add_row(str(number), varies, reason, memory, time, hours)
    console.print(table, soft_wrap=not console.is_terminal)
    for line in footer(jobs):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def footer(jobs: Sequence[JobPlan]) -> list[str]:
    """What the table adds up to, and what its numbers are."""
    can_run = [job for job in jobs if not job.problems]
    timed = [job for job in can_run if job.seconds is not None]
    lines = [f"{len(can_run)} of {len(jobs)} jobs can run"]
    hours = [job.gpu_hours for job in timed if job.gpu_hours is not None and job.num_gpus]
    if hours:
        lines[0] += f": about {sum(hours):.3g} GPU hours in all"
    if timed and len(timed) < len(can_run):
        lines[0] += f", {len(can_run) - len(timed)} of unknown length left out"
    if any(job.memory_gib is not None for job in jobs):
        lines.append("memory: estimated, for micro batches of the longest texts and full images")
    if timed:
        sources = dict.fromkeys(job.source for job in timed)
        lines += [f"time: training steps only, from their FLOPs and a speed that is {source}" for source in sources]
    return lines


def format_hours(seconds: float | None) -> str:
    """As "12 s", "34 min" or "5.6 h"; "" for None."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
