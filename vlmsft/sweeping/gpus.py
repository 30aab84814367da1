"""Which job has which GPUs of this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vlmsft.errors import Problem, UserError
from vlmsft.sweeping.ledger import JobRow

VISIBLE = "CUDA_VISIBLE_DEVICES"


class Gpus:
    """This machine's GPUs, each with at most one job of the sweep.

    rows: the jobs to come; the machine is asked for its GPUs only where one of them needs any

    Raises UserError where a job needs more than there are.
    """

    def __init__(self, rows: Sequence[JobRow]):
        most = max((row.num_gpus for row in rows if row.is_local), default=0)
        self._free = visible_gpus() if most else []
        self._taken: dict[int, list[str]] = {}
        if most > len(self._free):
            raise UserError(Problem("gpus_per_job", str(most), f"at most the {len(self._free)} GPUs of this machine"))

    def take(self, row: JobRow) -> bool:
        """Whether the job has its GPUs now."""
        if row.num_gpus > len(self._free):
            return False
        self._taken[row.num] = [self._free.pop(0) for _ in range(row.num_gpus)]
        return True

    def give_back(self, num: int) -> None:
        self._free += self._taken.pop(num, [])

    def environment(self, num: int) -> dict[str, str]:
        """What makes the job see its GPUs only; nothing for one that needs none."""
        gpus = self._taken.get(num, [])
        return {VISIBLE: ",".join(gpus)} if gpus else {}


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get(VISIBLE)
    if named is not None:
        return [gpu.strip() for gpu in named.split(",") if gpu.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
