"""A process that has imported NeMo when its work comes: python benchmarks/waiting.py FILE

Importing takes 40 s, in which the GPUs of a benchmark would be idle: this does it while an earlier case has them. FILE
is a JSON list, once it is there: what stands behind `python` on the command line that is to be run here.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path

POLL_SECONDS = 0.05


def main(file: Path) -> None:
    parent = os.getppid()
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
    main(Path(sys.argv[1]))
