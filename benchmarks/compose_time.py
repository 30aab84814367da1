"""How long `python -m vlmsft.train --cfg job` takes beside a bare Hydra app that composes the same tree.

    python benchmarks/compose_time.py [--runs 15]

Each run is a fresh process; the two take turns, so that both see the same machine. Prints the medians and their ratio,
which must stay under 1.5: whatever makes composing import torch or NeMo shows here at once. The bare app finds the same
Hydra plugins (ours, and the one of multi-storage-client, a dependency): Hydra imports every plugin of the environment.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

from vlmsft.config_files import root

LIMIT = 1.5
BARE = f"""
import hydra
@hydra.main(config_path={str(root() / "conf")!r}, config_name="train", version_base="1.3")
def main(cfg): pass
main()
"""
PROGRAMS = {
    "bare Hydra app": ["-c", BARE],
    "vlmsft.train": ["-m", "vlmsft.train"],
}
ARGUMENTS = ["experiment=demo", "--cfg", "job"]


def seconds(program: list[str]) -> float:
    """Wall time of one process, start to end."""
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root()), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, *program, *ARGUMENTS], check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="of each program")
    runs = parser.parse_args().runs
    for program in PROGRAMS.values():
        seconds(program)  # the first run fills the file cache and __pycache__
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(runs):
        for name, program in PROGRAMS.items():
            times[name].append(seconds(program))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{' '.join(ARGUMENTS)}, {runs} runs each, seconds")
    print(f"{'':16} {'median':>7} {'fastest':>8} {'slowest':>8}")
    for name, values in times.items():
        print(f"{name:16} {medians[name]:7.2f} {min(values):8.2f} {max(values):8.2f}")
    ratio = medians["vlmsft.train"] / medians["bare Hydra app"]
    print(f"ratio of the medians: {ratio:.2f} (limit {LIMIT})")
    sys.exit(ratio >= LIMIT)


if __name__ == "__main__":
    main()
