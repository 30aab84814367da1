"""manifest.json: what an output folder was made from, how, and what it holds.

finished    false until all outputs are there
parameters  what the outputs depend on, as the command's keys
inputs      origin of conversations and images: path or hub id, revision, sha256
counts      records, images, and what was dropped by reason
outputs     sha256 and bytes of each file, records of each record file and shard
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmsft.data.prepare.files import written_aside
from vlmsft.errors import Problem, UserError

NAME = "manifest.json"


def read(output: Path) -> dict[str, Any] | None:
    """The manifest; None where the folder is new. Raises UserError for a folder that holds something else."""
    path = output / NAME
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    entries = list(output.iterdir()) if output.is_dir() else [output] if output.exists() else []
    if any(not entry.name.startswith((".", NAME)) for entry in entries):  # a lock, a manifest's first beginning
        raise UserError(Problem("output", f"{output}, which vlmsft.prepare didn't make", "a new or empty folder"))
    return None


def write(output: Path, manifest: Mapping[str, Any]) -> None:
    """Nothing is touched where the file says the same already."""
    text = (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()
    path = output / NAME
    if path.is_file() and path.read_bytes() == text:
        return
    with written_aside(path) as file:
        file.write(text)


def raise_other_parameters(output: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError that names each parameter in which the folder differs from the command."""
    names = [*before, *(name for name in now if name not in before)]
    remedy = f"Take the old value, name another folder with output=, or delete {output}"
    problems = [
        Problem(name, repr(now.get(name)), f"{before.get(name)!r}, what {output} was prepared with", remedy)
        for name in names
        if before.get(name) != now.get(name)
    ]
    if problems:
        raise UserError(problems, "nothing was changed")


def raise_changed_inputs(output: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError that names each input that is no longer what the folder was made from."""
    remedy = f"Name another folder with output=, or delete {output}"
    problems = [
        Problem(f"{name}.{key}", str(value), f"{before[name].get(key)}, as when {output} was prepared", remedy)
        for name, facts in now.items()
        for key, value in facts.items()
        if name in before and before[name].get(key) != value
    ]
    if problems:
        raise UserError(problems, "nothing was changed")
