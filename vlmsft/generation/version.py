"""Which code computes the builtin engine's answers, as a hash.

Two servers with the same hash and the same packages agree. Imports nothing heavy.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
ENGINE = (
    "generation/generate.py",
    "generation/model.py",
    "serving",
    "mllama/hf_reference.py",
    "mllama/hf_mapping.py",
    "data/encode.py",
    "data/records.py",
    "checkpoints/hf_config.py",
    "checkpoints/hf_folder.py",
    "checkpoints/lora.py",
    "checkpoints/nemo.py",
)
"""Files and folders below the package that an answer depends on."""


@functools.cache
def engine_version() -> str:
    """12 hex digits."""
    return code_hash(ENGINE)


def code_hash(names: Iterable[str]) -> str:
    """Over the Python files of these files and folders below the package: 12 hex digits."""
    digest = hashlib.sha256()
    for name in names:
        place = PACKAGE / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\n" + path.read_bytes())
    return digest.hexdigest()[:12]
