"""python -m vlmsft.check_data key=value ...: read all data once and report what training would refuse or lose.

Exit code 0: nothing; 1: something; 2: a key or a file is wrong; 130: interrupted, with a report of what was read.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from vlmsft.cli import INTERRUPTED_EXIT_CODE, command
from vlmsft.errors import Problem, UserError

if TYPE_CHECKING:
    from vlmsft.data.check.scan import Progress
    from vlmsft.data.check.sources import Records, Shards

FOUND_EXIT_CODE = 1
IMAGES = ("full", "headers", "none")


@command("check_data")
def main(cfg: DictConfig) -> None:
    from vlmsft.paths import with_absolute_paths

    check(with_absolute_paths(cfg))


def check(cfg: DictConfig) -> None:
    """Reads, reports, and ends the process with the exit code."""
    raise_wrong_values(cfg)
    _silence_torch()
    from vlmsft.data.check import report
    from vlmsft.data.check.parts import Settings
    from vlmsft.data.check.scan import Scan
    from vlmsft.data.encode import SampleEncoder
    from vlmsft.runtime.logging import console

    settings = Settings(cfg.data.processor, cfg.data.decoder_seq_length, cfg.images)
    scan = Scan(data_sets(cfg), cfg.num_examples)
    _ = SampleEncoder(settings.processor, 1).image_token_id  # one that fails says so before anything is read
    folder = Path(cfg.output_dir)
    make_folder(folder)
    num_workers = cfg.num_workers or len(os.sched_getaffinity(0))
    started = time.monotonic()
    with _bar() as progress:
        scan.run(settings, num_workers, folder / "findings.jsonl", progress)
    seconds = time.monotonic() - started
    page = report.text(scan, settings)
    subtitle = f"{time.strftime('%Y-%m-%d %H:%M')}, read in {seconds:,.0f} s by {num_workers} processes"
    (folder / "report.txt").write_text(f"{subtitle}\n{page}\n", encoding="utf-8")
    (folder / "report.html").write_text(report.html(scan, settings, subtitle, "findings.jsonl"), encoding="utf-8")
    console().print(page, markup=False, highlight=False, soft_wrap=True)
    console().print(f"report: {folder / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    if not scan.is_complete:
        sys.exit(INTERRUPTED_EXIT_CODE)
    sys.exit(0 if scan.is_clean else FOUND_EXIT_CODE)


def raise_wrong_values(cfg: DictConfig) -> None:
    """Raises UserError with each value that the check can't work with."""
    problems = [
        Problem(key, "nothing", "a value", f"Write {key}=...") for key in sorted(OmegaConf.missing_keys(cfg)) if key
    ]
    if cfg.images not in IMAGES:
        problems.append(Problem("images", repr(cfg.images), f"one of {', '.join(IMAGES)}"))
    for key, least in {"num_workers": 1, "num_examples": 0, "data.decoder_seq_length": 1}.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and (type(value) is not int or value < least):
            problems.append(Problem(key, repr(value), f"a whole number from {least} on"))
    if problems:
        raise UserError(problems)


def data_sets(cfg: DictConfig) -> list[Records | Shards]:
    """What the data group names, opened. Raises UserError with every file and folder that can't be."""
    from vlmsft.data.check.sources import Records, shards_of
    from vlmsft.data.sources import sources

    data: Any = OmegaConf.to_container(cfg.data, resolve=True)
    found: list[Records | Shards] = []
    problems: list[Problem] = []
    named = {"training": "path" if "path" in data else "train_path", "validation": "validation_path"}
    for split, key in named.items():
        folder = data.get("image_folder")
        for source in sources(data[key], f"data.{key}", folder, has_image_folders="path" not in data):
            try:
                if "path" in data:
                    found += [shards for shards in shards_of(source.path) if shards.split == split]
                else:
                    found.append(Records(split, source.path, source.image_folder))
            except UserError as error:
                problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise UserError(problems)
    return found


def make_folder(folder: Path) -> None:
    """Raises UserError where an earlier report stands."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        remedy = "Name another folder or leave output_dir out"
        raise UserError(Problem("output_dir", f"{folder}, which exists", "a new folder", remedy)) from None


def _silence_torch() -> None:
    """Its import complains of a package that others depend on, here and in each worker."""
    warnings.filterwarnings("ignore", "The pynvml package", FutureWarning)
    os.environ.setdefault("PYTHONWARNINGS", "ignore:The pynvml package:FutureWarning")


@contextmanager
def _bar() -> Iterator[Progress]:
    """Gives a function that shows how far the reading is; where stdout is no terminal, a line for each stage."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    from vlmsft.runtime.logging import console

    out, tasks = console(), {}
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bar:

        def show(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
                if not out.is_terminal:
                    out.print(f"reading {total:,} {name} ...", highlight=False)
            bar.update(tasks[name], completed=done)

        yield show


if __name__ == "__main__":
    main()
