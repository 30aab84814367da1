"""python -m vlmsft.prepare dataset=NAME key=value ...: make a data set for training."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from vlmsft.cli import command, quoted
from vlmsft.config_files import absolute_path
from vlmsft.errors import Problem, UserError

if TYPE_CHECKING:
    from vlmsft.data.prepare.settings import Settings


@command("prepare")
def main(cfg: DictConfig) -> None:
    from vlmsft.data.prepare.progress import say
    from vlmsft.data.prepare.run import prepare

    settings = settings_of(cfg)
    manifest = prepare(settings)
    for line in [*summary(settings, manifest), "", *train_commands(cfg, settings, manifest)]:
        say(line)


def settings_of(cfg: DictConfig) -> Settings:
    """Raises UserError for what only the user knows and hasn't said."""
    from vlmsft.data.prepare.settings import Settings

    try:
        plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # pyright: ignore
    except MissingMandatoryValue as error:
        key = str(error.full_key)
        raise UserError(Problem(key, "no value", "what only you know", f"Write {key}=... (conf/dataset/)")) from None
    dataset = plain.pop("dataset")
    dataset.pop("train")
    dataset.pop("name")
    for key in ("conversations", "validation", "images"):
        dataset[key] = _absolute_if_local(dataset[key])
    for key in ("output", "download_folder"):
        plain[key] = Path(absolute_path(plain[key]))
    return Settings(**dataset, **{**plain, "formats": tuple(plain["formats"])})


def _absolute_if_local(name: str | None) -> str | None:
    """URLs and hub ids stay as they are."""
    if name is None or "://" in name:
        return name
    path = absolute_path(name)
    return path if os.path.exists(path) else name


def summary(settings: Settings, manifest: dict[str, Any]) -> list[str]:
    """What the folder holds, a line for each fact."""
    counts = manifest["counts"]
    splits = ", ".join(f"{counts[name]} {name}" for name in ("training", "validation") if name in counts)
    lines = [
        f"{settings.output}: {splits} records, {counts['images']} images, "
        f"{counts['text_only']} records without and {counts['multi_image']} with several"
    ]
    if counts["dropped"]:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in counts["dropped"].items())
        lines.append(f"left out ({settings.output}/dropped.jsonl): {reasons}")
    outputs = manifest["outputs"]
    tars = [facts["bytes"] for name, facts in outputs.items() if name.endswith(".tar")]
    if tars:
        lines.append(f"{len(tars)} shards, {sum(tars) / 2**20:.1f} MiB")
    return lines


def train_commands(cfg: DictConfig, settings: Settings, manifest: dict[str, Any]) -> list[str]:
    """The command that trains on the folder, for each format."""
    start, lines = "python -m vlmsft.train", []
    if "jsonl" in settings.formats:
        validation = settings.output / "validation.jsonl" if "validation" in manifest["counts"] else "null"
        paths = {"train_path": settings.output / "training.jsonl", "validation_path": validation}
        paths["image_folder"] = settings.image_folder
        keys = " ".join(typed(f"data.{key}", str(value)) for key, value in paths.items())
        lines.append(f"{start} {cfg.dataset.train.preloaded} {keys}")
    if "energon" in settings.formats:
        lines.append(f"{start} {cfg.dataset.train.energon} {typed('data.path', str(settings.shard_folder))}")
    return lines


def typed(key: str, value: str) -> str:
    """An override as a shell takes it, in Hydra's quotes where its grammar needs them."""
    if re.fullmatch(r"[\w./-]+", value, re.ASCII):
        return f"{key}={value}"
    return shlex.quote(f"{key}={quoted(value)}")


if __name__ == "__main__":
    main()
