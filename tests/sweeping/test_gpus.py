"""Which job has which GPUs."""

import pytest

from vlmsft.errors import UserError
from vlmsft.sweeping.gpus import Gpus
from vlmsft.sweeping.ledger import JobRow


def row(num: int, num_gpus: int, is_local: bool = True) -> JobRow:
    return JobRow(num, str(num), [], "/r", num_gpus=num_gpus, is_local=is_local)


def test_a_gpu_has_one_job_at_a_time(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5,6")
    rows = [row(0, 2), row(1, 1), row(2, 1), row(3, 0)]
    gpus = Gpus(rows)
    assert [gpus.take(each) for each in rows] == [True, True, False, True]
    shown = [gpus.environment(num).get("CUDA_VISIBLE_DEVICES") for num in range(4)]
    assert shown == ["4,GPU-5", "6", None, None]
    gpus.give_back(0)
    gpus.give_back(0)
    assert gpus.take(rows[2]) and gpus.environment(2) == {"CUDA_VISIBLE_DEVICES": "4"} and not gpus.take(rows[0])


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match="gpus_per_job: found 2, expected at most the 1 GPUs"):
        Gpus([row(0, 1), row(1, 2)])
    Gpus([row(0, 1), row(1, 8, is_local=False)])  # those of the cluster
