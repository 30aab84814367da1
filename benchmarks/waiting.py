"""Processes that have imported NeMo when their work comes: python benchmarks/waiting.py FILE [--without-nemo]

Importing takes 40 s, in which the GPUs of a benchmark would be idle: this does it while an earlier case has them. FILE
is a JSON list, once it is there: what stands behind `python` on the command line that is to be run here.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.05
WITHOUT_NEMO = "--without-nemo"


class Waiting:
    """A process, or torchrun with its own, that is told later what to run.

    start: starts `python WORDS`, or torchrun with them, in a session of its own
    with_nemo: False: it imports nothing; what is measured beside NeMo runs as its users run it
    As a context: what still runs at its end is killed.
    """

    def __init__(self, start: Callable[[list[str]], subprocess.Popen[Any]], folder: Path, with_nemo: bool = True):
        self._file = Path(tempfile.mkdtemp(dir=folder), "words.json")
        self.process = start([__file__, str(self._file), *(() if with_nemo else (WITHOUT_NEMO,))])

    def run(self, words: list[str]) -> subprocess.Popen[Any]:
        """What stands behind `python` on a command line."""
        whole = self._file.with_name("whole.json")
        whole.write_text(json.dumps(words), encoding="utf-8")
        whole.rename(self._file)
        return self.process

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def kill(self) -> None:
        """If it hasn't ended by itself."""
        if self.process.poll() is None:
            os.killpg(
                self.process.pid, signal.SIGKILL
            )  # torchrun's processes, of other sessions, see that it has ended
            self.process.wait()


def main(file: Path, with_nemo: bool) -> None:
    parent = os.getppid()
    if with_nemo:
        import_all()
    while not file.exists():
        if os.getppid() != parent:
            sys.exit("whoever started this has ended")
        time.sleep(POLL_SECONDS)
    first, *rest = json.loads(file.read_text(encoding="utf-8"))
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path[0] = str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


def import_all() -> None:
    """What a training imports, and NeMo's recipe."""
    import vlmsft  # noqa: I001 # sets what NeMo's import needs

    import lightning.pytorch  # noqa: F401
    import nemo_run  # noqa: F401
    from hydra.core.plugins import Plugins
    from hydra.core.singleton import Singleton
    from nemo.collections import llm  # noqa: F401
    from nemo.collections.vlm.recipes import mllama_11b  # noqa: F401

    import vlmsft.mllama.model
    import vlmsft.recipe
    import vlmsft.train  # noqa: F401

    Singleton._instances.pop(Plugins, None)  # NeMo had them searched, before Hydra's main adds ours


if __name__ == "__main__":
    main(Path(sys.argv[1]), WITHOUT_NEMO not in sys.argv)
