"""python -m vlmsft.sweeping.worker RUN_FOLDER: a training of a sweep, as its launcher froze it. Reads no YAML.

Every rank runs this: below torchrun, below srun, or alone. Rank 0 holds the job's lock and reports its start and end.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from vlmsft.errors import USER_ERROR_EXIT_CODE, UserError, format_problems
from vlmsft.sweeping.report import LOCK_IS_HELD, RUNS_ALREADY_EXIT_CODE, reporting, take_lock


def main(run_dir: str) -> None:
    try:
        with reported(run_dir):
            train(run_dir)
    except UserError as error:
        print(format_problems(error), file=sys.stderr)
        sys.exit(USER_ERROR_EXIT_CODE)


@contextlib.contextmanager
def reported(run_dir: str) -> Iterator[None]:
    """On rank 0: what runs inside is reported, and nothing runs where another worker has the job."""
    if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) != 0:
        yield
        return
    if os.environ.pop(LOCK_IS_HELD, None) is None and take_lock(run_dir) is None:
        print(f"{run_dir}: another worker runs this job", file=sys.stderr)
        sys.exit(RUNS_ALREADY_EXIT_CODE)
    with reporting(run_dir):
        yield


def train(run_dir: str) -> None:
    from vlmsft.runtime import job  # imports nemo_run, which takes a second or more: after the start is reported

    job.work(lambda: run_recipe(run_dir), run_dir)


def run_recipe(run_dir: str) -> None:
    import nemo_run as run

    from vlmsft.runtime.job import read_job

    run.run(read_job(run_dir).recipe, direct=True)


if __name__ == "__main__":
    main(sys.argv[1])
