"""Helpers of the configuration's tests: composing, and the commands that YAML headers and README show."""

from __future__ import annotations

import functools
import re
import shlex
from pathlib import Path

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from vlmsft import feasibility
from vlmsft.checks import CHECKS, CHECKS_OF_FILES, Facts
from vlmsft.config_files import root
from vlmsft.errors import Problem
from vlmsft.generate import quote_texts
from vlmsft.sweep import with_keys

DATA = [
    "data.train_path=t.jsonl",
    "data.validation_path=v.jsonl",
    "data.image_folder=images",
    "restore_from=models/11b",
]


ROOT_OF = {"plan": "train"}
"""Commands that read another command's root YAML."""


@functools.cache
def compose(*overrides: str, config_name: str = "train", with_hydra: bool = False) -> DictConfig:
    """conf/<config_name>.yaml with overrides as on the command line. Shared between tests: don't change it."""
    with hydra.initialize_config_dir(str(root() / "conf"), version_base="1.3"):
        return hydra.compose(config_name, list(overrides), return_hydra_config=with_hydra)


def problems_of_values(cfg: DictConfig) -> list[Problem]:
    """What is wrong with the values themselves, wherever the files that they name may be."""
    facts = Facts(cfg)
    checks = [check for check in (*CHECKS, *feasibility.CHECKS) if check not in CHECKS_OF_FILES]
    return [problem for check in checks for problem in check(facts)]


def yaml_files() -> list[Path]:
    """Every YAML under conf/, launch/ and sweeps/."""
    return sorted(path for group in ("conf", "launch", "sweeps") for path in (root() / group).rglob("*.yaml"))


def commands_in(text: str) -> list[tuple[str, list[str]]]:
    """(command, overrides) of each line of `text` that runs a vlmsft command, in a comment or a code block.

    `python -m vlmsft.train a=1` and `vlmsft train a=1` are both ("train", ["a=1"]). A backslash continues a line.
    """
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        match = re.match(r"^\s*(?:#|\$|\.venv/bin/)?\s*(?:python -m vlmsft\.|vlmsft )(\w+)((?:\s+\S.*)?)$", line)
        if match:
            found.append((match.group(1), shlex.split(match.group(2), comments=True)))
    return found


def compose_command(name: str, arguments: list[str], with_hydra: bool = False) -> DictConfig:
    """Composes what the command would: flags are dropped, of a sweep the first job is composed."""
    overrides = []
    words = [
        a for before, a in zip(["", *arguments], arguments, strict=False) if not a.startswith("-") and before != "--cfg"
    ]
    if name == "generate":  # the command does so itself: a question is any text
        words = quote_texts(words)
    if name == "sweep":
        words = with_keys(words)
    for override in OverridesParser.create().parse_overrides(words):
        if override.is_sweep_override():
            first = next(iter(override.sweep_string_iterator()))
            overrides.append(f"{override.get_key_element()}={first}")
        else:
            overrides.append(override.input_line)
    return compose(*overrides, config_name=ROOT_OF.get(name, name), with_hydra=with_hydra)
