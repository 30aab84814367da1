"""Where llm-jp-eval-mm lives: a folder for each state of requirements.lock and each Python, made on first use."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from vlmsft.evaluation.runner import EvalMM
from vlmsft.runtime.environments import Environment

LOCK = Path(__file__).with_name("requirements.lock")


def environment_of(settings: EvalMM) -> Environment:
    """640 MB, without torch; 1 minute to download and install, half of it unidic-lite. It may not be there yet."""
    folder = Path(settings.folder).expanduser().absolute() / f"0.4.1-{lock_digest()[:8]}"
    packages = ("--no-deps", "--require-hashes", "--requirement", str(LOCK))
    return Environment(folder, settings.python, packages, "eval_mm.folder")


@functools.cache
def lock_digest() -> str:
    """SHA-256 of what is installed."""
    return hashlib.sha256(LOCK.read_bytes()).hexdigest()
