"""How long composing takes beside a bare Hydra app that composes the same tree: --cfg job, --help, a -m expansion.

    python benchmarks/compose_time.py [--runs 9]

Each run is a fresh process; the two take turns, so that both see the same machine. Prints the medians and their ratio,
which must stay under 1.5: whatever makes composing import torch or NeMo shows here at once. The bare app finds the same
Hydra plugins (ours, and the one of multi-storage-client, a dependency): Hydra imports every plugin of the environment.
For -m both run a task that does nothing, ours behind vlmsft.cli.command: vlmsft.train's own would start the jobs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from vlmsft.config_files import root

LIMIT = 1.5
BARE = f"""
import hydra
@hydra.main(config_path={str(root() / "conf")!r}, config_name="train", version_base="1.3")
def main(cfg): pass
main()
"""
DOOR = """
from vlmsft.cli import command
@command("train")
def main(cfg): pass
main()
"""
TRAIN = ["-m", "vlmsft.train"]
CASES = {
    "--cfg job": (TRAIN, ["experiment=demo", "--cfg", "job"]),
    "--help": (TRAIN, ["experiment=demo", "--help"]),
    "-m, 4 jobs": (["-c", DOOR], ["-m", "experiment=demo", "hydra/launcher=basic", "seed=1,2", "optim.max_lr=1,2"]),
}


def seconds(program: list[str], arguments: list[str]) -> float:
    """Wall time of one process, start to end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root()), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryDirectory() as folder:  # Hydra writes multirun.yaml
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, *program, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment, cwd=folder
        )
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="of each program")
    runs = parser.parse_args().runs
    print(f"medians of {runs} runs each, seconds")
    print(f"{'':12} {'bare Hydra':>10} {'vlmsft':>8} {'ratio':>6}")
    ratios = []
    for name, (program, arguments) in CASES.items():
        times: dict[str, list[float]] = {"bare": [], "ours": []}
        for number in range(runs + 1):
            for whose, command in (("bare", ["-c", BARE]), ("ours", program)):
                took = seconds(command, arguments)
                if number:  # the first run fills the file cache and __pycache__
                    times[whose].append(took)
        bare, ours = statistics.median(times["bare"]), statistics.median(times["ours"])
        ratios.append(ours / bare)
        print(f"{name:12} {bare:10.2f} {ours:8.2f} {ours / bare:6.2f}")
    sys.exit(max(ratios) >= LIMIT)


if __name__ == "__main__":
    main()
