"""What is wrong with where a run is to go: secrets that would be written down, a signal that comes at once.

For vlmsft.checks; imports neither torch nor NeMo.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmsft.errors import Problem
from vlmsft.facts import Facts
from vlmsft.runtime.provenance import Scrubber

EXECUTOR = "launch.executor"
SLURM_EXECUTOR = "nemo_run.SlurmExecutor"
REFERENCES = ("secret_vars",)
"""Keys of executors whose values are names of secrets, which somebody else keeps."""
REMEDY = {
    "launch.executor.client_secret": "Leave it empty and set DGXCLOUD_CLIENT_SECRET",
    "kubernetes": "Use launch.executor.env_list with a secretKeyRef",
    "lepton": "Use launch.executor.secret_vars with a secret's name",
    "other": "Let the workers have it from their own environment, ~/.netrc (W&B) or ~/.cache/huggingface",
}


def secrets_stay_out(facts: Facts) -> Iterator[Problem]:
    """Executors' settings are written to scripts, to NeMo-Run's files and to the run folder."""
    executor = _resolved(facts.cfg)
    scrubber = Scrubber.from_environment()
    for key, value in _leaves(executor, EXECUTOR):
        if Scrubber.is_secret_key(key) or scrubber.text(value) != value:
            expected = "no secret: what an executor gets is written to scripts and files"
            yield Problem(key, "a secret", expected, REMEDY.get(key) or REMEDY[_kind(executor)])


def _resolved(cfg: DictConfig) -> dict[str, Any]:
    """The executor with interpolations resolved, but for those that can't be: recipe.py names them."""
    node = OmegaConf.select(cfg, EXECUTOR, throw_on_missing=False)
    if not isinstance(node, DictConfig):
        return {}
    resolved = {}
    for key in node:
        try:
            value = node[key]
            resolved[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException:
            continue
    return resolved


def _leaves(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text that isn't a reference to a secret."""
    if isinstance(node, dict) and {"name", "value"} <= node.keys():  # Kubernetes' way to write a variable
        yield f"{key}.{node['name']}", str(node["value"])
    elif isinstance(node, dict):
        for name, value in node.items():
            if name not in REFERENCES:
                yield from _leaves(value, f"{key}.{name}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{key}[{index}]")
    elif isinstance(node, str) and node:
        yield key, node


def _kind(executor: dict[str, Any]) -> str:
    if "env_list" in executor:
        return "kubernetes"
    return "lepton" if "secret_vars" in executor else "other"


def paths_survive_nemo_run(facts: Facts) -> Iterator[Problem]:
    """Without a container, NeMo-Run replaces each /nemo_run in the batch script with its own folder."""
    if facts[f"{EXECUTOR}._target_"] != SLURM_EXECUTOR or facts[f"{EXECUTOR}.container_image"] is not None:
        return
    for key in ("run_dir", f"{EXECUTOR}.tunnel.job_dir"):
        path = facts[key]
        if isinstance(path, str) and "/nemo_run" in path:
            remedy = "NeMo-Run writes another path for it in scripts without a container"
            yield Problem(key, path, "a path without /nemo_run", remedy)


def time_is_left_before_the_signal(facts: Facts) -> Iterator[Problem]:
    """A job that is told to end as soon as it starts would be requeued for ever."""
    time, sent = facts[f"{EXECUTOR}.time"], facts[f"{EXECUTOR}.signal"]
    match = re.search(r"@(\d+)$", str(sent))
    seconds = _seconds(str(time)) if time is not None else None
    if match is None or seconds is None:
        return
    if int(match.group(1)) >= seconds:
        remedy = "More time, or a smaller number behind the @"
        yield Problem(f"{EXECUTOR}.signal", str(sent), f"fewer seconds than {EXECUTOR}.time {time}", remedy)


def _seconds(time: str) -> int | None:
    """Slurm's notations: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        return None
    days, *parts = (int(part) if part is not None else None for part in match.groups())
    first, second, third = parts
    assert first is not None
    if days is not None or third is not None:
        return (days or 0) * 86400 + first * 3600 + (second or 0) * 60 + (third or 0)
    return first * 60 + (second or 0)
