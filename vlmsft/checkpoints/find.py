"""Which folder a user means by `checkpoint=`: a checkpoint, a run, or a run's name. Imports neither torch nor NeMo."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omegaconf import OmegaConf

from vlmsft.errors import Problem, UserError, nearest

RUNS = "runs"
"""Folder of all runs below the working directory; conf/train.yaml: run_dir."""
UNFINISHED_SUFFIX = "-unfinished"
"""NeMo's marker beside a checkpoint that is being written, or whose writer was killed."""
LAST_SUFFIX = "-last"
Which = Literal["best", "last"]


@dataclass(frozen=True)
class Saved:
    """A checkpoint of a run.

    value: the monitored one (val_loss), None where the name has none
    step: of the last step done, counted from 0; -1 where the name has none
    """

    path: Path
    value: float | None
    step: int

    @property
    def is_last(self) -> bool:
        return self.path.name.endswith(LAST_SUFFIX)


def resolve_checkpoint(text: str, which: Which = "best", key: str = "checkpoint") -> Path:
    """The checkpoint folder that `text` stands for.

    text: a checkpoint folder, a run folder (runs/demo/20261124-061530-3f2a), a run's name (demo: the newest run so
        named that has a checkpoint) or name/id
    which: of a run's checkpoints the best by the monitored value (the last, where none was monitored), or the last
    key: the config key that gave `text`, for messages
    Raises UserError with what was found instead.
    """
    for place in (Path(text), Path(RUNS, text)):
        if is_checkpoint(place):
            return place
        if is_checkpoint(place.parent) and place.name == "weights":
            return place.parent
        runs = _runs_at(place)
        if runs:
            saved = [saved for run in runs if (saved := _choose(run, which)) is not None]
            if saved:
                return max(saved, key=lambda path: path.stat().st_mtime)
            raise UserError(_nothing_saved(key, text, runs))
    raise UserError(_not_found(key, text))


def is_checkpoint(path: Path) -> bool:
    """Whether a folder looks like a NeMo 2.0 checkpoint."""
    return (path / "weights").is_dir() and (path / "context").is_dir()


def checkpoints_of(run: Path) -> list[Saved]:
    """The complete checkpoints of a run folder."""
    folders = [path for path in Path(run, "checkpoints").glob("*") if is_checkpoint(path)]
    return [_saved(path) for path in sorted(folders) if not _is_unfinished(path)]


def _is_unfinished(path: Path) -> bool:
    return path.with_name(f"{path.name}{UNFINISHED_SUFFIX}").exists()


def _saved(path: Path) -> Saved:
    value = re.match(r"[^=]+=(-?\d+(?:\.\d+)?(?:e-?\d+)?)-", path.name)
    step = re.search(r"step=(\d+)", path.name)
    is_monitored = value is not None and not path.name.startswith(("step=", "epoch=", "consumed_samples="))
    return Saved(path, float(value[1]) if value and is_monitored else None, int(step[1]) if step else -1)


def _runs_at(place: Path) -> list[Path]:
    """The run folder at `place`, or the runs of the name whose folder it is."""
    if place.name == "checkpoints" and place.is_dir():
        return [place.parent]
    if (place / "checkpoints").is_dir() or (place / "config.yaml").is_file():
        return [place]
    return sorted(path.parent for path in place.glob("*/checkpoints") if path.is_dir())


def _choose(run: Path, which: Which) -> Path | None:
    saved = checkpoints_of(run)
    monitored = [one for one in saved if one.value is not None]
    if not saved:
        return None
    if which == "last" or not monitored:
        return max(saved, key=lambda one: (one.step, one.is_last)).path
    sign = -1 if _mode(run) == "max" else 1
    # the copy named *-last goes away when the run is continued
    return min(monitored, key=lambda one: (sign * (one.value or 0.0), one.is_last, -one.step)).path


def _mode(run: Path) -> str:
    """min or max: what the run's log.ckpt said of its monitored value."""
    config = run / "config.yaml"
    if not config.is_file():
        return "min"
    return str(OmegaConf.select(OmegaConf.load(config), "log.ckpt.mode") or "min")


def _nothing_saved(key: str, text: str, runs: list[Path]) -> Problem:
    unfinished = [str(path) for run in runs for path in Path(run, "checkpoints").glob("*") if _is_unfinished(path)]
    found = f"{text}: {_count(len(runs), 'run')} without a complete checkpoint"
    if unfinished:
        found += f" ({', '.join(unfinished)}: the run was killed while it saved, or is saving now)"
    return Problem(key, found, "a run that has saved", "It saves after each validation: trainer.val_check_interval")


def _not_found(key: str, text: str) -> Problem:
    expected = "a checkpoint folder, a run folder or the name of a run"
    place = Path(text)
    if place.is_dir():
        inside = ", ".join(sorted(path.name for path in place.iterdir())[:8]) or "nothing"
        hint = "; a Hugging Face folder: vlmsft import_ckpt" if (place / "config.json").is_file() else ""
        return Problem(key, f"{text}, a folder with {inside}", expected + hint)
    names = sorted({run.parent.name for run in Path(RUNS).glob("*/*") if (run / "checkpoints").is_dir()})
    there = f"{RUNS}/ has {', '.join(names)}" if names else f"no run below {Path(RUNS).absolute()}"
    return Problem(key, f"no folder and no run {text!r}", expected, f"{there}. {nearest(text, names)}".strip())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"
