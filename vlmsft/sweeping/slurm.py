"""What Slurm says of jobs: squeue for those it has in mind, sacct for those that are over."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence

IN_MIND = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED",
           "RESIZING", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED")  # fmt: skip
AGAIN = ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL")
"""Ended by no fault of the job: it is submitted again."""
INTERRUPTED = ("CANCELLED", "REVOKED")
"""By scancel: it goes on when the sweep is resumed."""


def states(job_ids: Sequence[str], ask: Callable[[str], str]) -> dict[str, tuple[str, int | None]]:
    """{job id: (state in Slurm's words, exit code)}; a job that Slurm can't tell of (yet) is left out.

    ask: runs a command where Slurm is, and gives its output; '' where it failed
    exit code: None while the job isn't over; 128 + signal where one ended it
    """
    if not job_ids:
        return {}
    ids = ",".join(job_ids)
    found = _table(ask(f"squeue --noheader --states=all --format='%i|%T' --jobs={shlex.quote(ids)}"))
    known: dict[str, tuple[str, int | None]] = {}
    known |= {job: (state, None) for job, state, *_ in found if state in IN_MIND and job in job_ids}
    over = [job for job in job_ids if job not in known]
    if over:
        accounts = _table(ask(f"sacct -X --noheader --parsable2 --format=JobID,State,ExitCode --jobs={','.join(over)}"))
        for job, state, code in (row for row in accounts if len(row) == 3):
            word = state.split()[0]  # "CANCELLED by 0"
            known[job] = (word, None if word in IN_MIND else _exit_code(code, word))
    return known


def _table(text: str) -> list[list[str]]:
    return [line.strip().split("|") for line in text.splitlines() if "|" in line]


def _exit_code(text: str, state: str) -> int:
    """'7:0' is code 7, '0:15' signal 15. TIMEOUT and others come with 0:0."""
    code, _, number = text.partition(":")
    found = 128 + int(number) if number.isdigit() and int(number) else int(code or 0)
    return found if found or state == "COMPLETED" else 1
