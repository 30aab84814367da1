"""What the engines of vlmsft.serve have in common. Imports neither torch nor a web framework."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmsft.errors import Problem


@dataclass(frozen=True)
class Endpoint:
    """What is served where; conf/serve.yaml has the meanings.

    model: `checkpoint` as typed
    api_key: what clients must send; None = nothing
    """

    model: str
    served_model_name: str
    host: str
    port: int
    max_num_seqs: int
    max_model_len: int | None
    max_images: int
    image_root: Path | None
    api_key: str | None
    dryrun: bool


@dataclass(frozen=True)
class Rule:
    """A number's least and largest value; is_whole: no fractions; or_null: null means something too."""

    least: float
    most: float | None = None
    is_whole: bool = True
    or_null: bool = False

    def __str__(self) -> str:
        kind = "a whole number" if self.is_whole else "a number"
        limits = f"from {self.least} to {self.most}" if self.most is not None else f"of at least {self.least}"
        return f"{kind} {limits}{' or null' if self.or_null else ''}"

    def holds(self, value: Any) -> bool:
        if value is None:
            return self.or_null
        if isinstance(value, bool) or not isinstance(value, int if self.is_whole else (int, float)):
            return False
        return value >= self.least and (self.most is None or value <= self.most)


COMMON_RULES = {
    "port": Rule(0, 65535),
    "max_num_seqs": Rule(1),
    "max_model_len": Rule(1, or_null=True),
    "max_images": Rule(0),
}


def number_problems(values: Mapping[str, Any], rules: Mapping[str, Rule], prefix: str = "") -> list[Problem]:
    """The values that break their rule. prefix: of their keys in messages."""
    return [
        Problem(prefix + name, repr(values[name]), str(rule))
        for name, rule in rules.items()
        if not rule.holds(values[name])
    ]


def endpoint_problems(values: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with the keys of conf/serve.yaml beside `engine`."""
    problems = number_problems(values, COMMON_RULES)
    root, variable = values["image_root"], values["api_key_variable"]
    if root is not None and not Path(root).expanduser().is_dir():
        problems.append(Problem("image_root", str(root), "a folder that exists, or null"))
    if variable is not None and not os.environ.get(variable):
        remedy = f"export {variable}=..., or api_key_variable=null to serve without a key"
        problems.append(Problem("api_key_variable", f"{variable}, which is not set", "an environment variable", remedy))
    return problems


def endpoint_from(values: Mapping[str, Any]) -> Endpoint:
    """Of values without problems."""
    root, variable = values["image_root"], values["api_key_variable"]
    return Endpoint(
        model=str(values["checkpoint"]),
        served_model_name=values["served_model_name"] or os.path.basename(str(values["checkpoint"]).rstrip("/")),
        host=values["host"],
        port=values["port"],
        max_num_seqs=values["max_num_seqs"],
        max_model_len=values["max_model_len"],
        max_images=values["max_images"],
        image_root=None if root is None else Path(root).expanduser().resolve(),
        api_key=None if variable is None else os.environ[variable],
        dryrun=values["dryrun"],
    )
