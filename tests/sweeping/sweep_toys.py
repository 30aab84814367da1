"""A sweep of jobs that cost nothing: what test_schedule.py runs in other processes. Imports no NeMo.

python sweep_toys.py launch FOLDER [max_parallel]      runs the pending jobs of the ledger in FOLDER
python sweep_toys.py job RUN_DIR                       a job; what it does stands in RUN_DIR/task.json
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from vlmsft.sweeping.report import reporting


def make_sweep(folder: Path, tasks: list[dict], **options) -> None:
    """A ledger with a job for each task: {"seconds": how long, "code": how it ends, "leaves": a process behind}."""
    from vlmsft.sweeping.ledger import JobRow, Ledger
    from vlmsft.sweeping.schedule import Options, write_options

    ledger = Ledger(folder, create=True)
    rows = []
    for num, task in enumerate(tasks):
        run_dir = folder.parent.parent / "runs" / str(num)
        run_dir.mkdir(parents=True)
        (run_dir / "task.json").write_text(json.dumps(task))
        command = ["python", str(Path(__file__).resolve()), "job", str(run_dir)]
        rows.append(JobRow(num, f"identity {num}", [f"x={num}"], str(run_dir), command=command))
    ledger.add(rows)
    write_options(ledger, Options(**options))


def starts(run_dir: str | Path) -> list[str]:
    """A line for each time that the job was started: its process id."""
    path = Path(run_dir, "starts")
    return path.read_text().splitlines() if path.exists() else []


def job(run_dir: str) -> None:
    """Fails where two of it run at once."""
    with open(Path(run_dir, "starts"), "a") as file:
        file.write(f"{os.getpid()}\n")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    task = json.loads(Path(run_dir, "task.json").read_text())
    with reporting(run_dir):
        alone = Path(run_dir, "runs-now")
        os.close(os.open(alone, os.O_CREAT | os.O_EXCL))
        if task.get("leaves"):
            subprocess.Popen(["sleep", "300"], start_new_session=True)
        try:
            time.sleep(task.get("seconds", 0))
        finally:
            alone.unlink()
        sys.exit(task.get("code", 0))


def launch(folder: str, max_parallel: str = "8") -> None:
    from vlmsft.sweeping.ledger import Ledger
    from vlmsft.sweeping.schedule import Interrupted, Watcher, read_options, run_jobs

    class Says(Watcher):
        def job(self, row):
            print(f"{row.num} {row.state}", flush=True)

    ledger = Ledger(folder)
    try:
        options = replace(read_options(ledger), max_parallel=int(max_parallel))
        run_jobs(ledger, [row.num for row in ledger.jobs()], options, Says())
    except Interrupted as interrupted:
        sys.exit(128 + interrupted.number)


if __name__ == "__main__":
    {"job": job, "launch": launch}[sys.argv[1]](*sys.argv[2:])
