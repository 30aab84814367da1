"""The jobs of `vlmsft.train -m` before they are jobs of a sweep: each its own run folder, and keys that are proper."""

from types import SimpleNamespace

import pytest

from vlmsft.errors import UserError
from vlmsft.sweeping.launch import Composed, first_of_each, raise_shared_run_folders, raise_wrong_keys

KEYS = {
    "max_parallel": None,
    "gpus_per_job": None,
    "on_failure": "continue",
    "detach": False,
    "dryrun": False,
    "objective": "val_loss",
    "objective_mode": "min",
}


def test_jobs_that_share_a_run_folder_are_refused():
    starts = {num: SimpleNamespace(job=SimpleNamespace(run_dir=folder)) for num, folder in enumerate("aba")}
    with pytest.raises(UserError, match=r"run_dir: found a in jobs 0, 2, expected .*id=a-\$\{hydra:job\.num\}"):
        raise_shared_run_folders(starts)
    raise_shared_run_folders({0: starts[0], 1: starts[1]})


def test_wrong_keys_of_the_launcher_come_in_one_message():
    raise_wrong_keys(KEYS)
    wrong = {"max_parallel": 0, "gpus_per_job": 1.5, "on_failure": "halt", "objective_mode": "best", "detach": "yes"}
    with pytest.raises(UserError) as error:
        raise_wrong_keys(KEYS | wrong)
    assert [problem.where for problem in error.value.problems] == [f"hydra.launcher.{name}" for name in wrong]


def test_a_job_that_trains_what_another_does_is_named_and_run_once(capfd):
    jobs = [Composed(index, [], None, None, "", num) for index, num in enumerate((0, 1, 0))]  # type: ignore[arg-type]
    varying = [["log=default"], ["seed=2"], ["log=wandb"]]
    assert first_of_each(jobs, varying) == [(jobs[0], varying[0]), (jobs[1], varying[1])]
    said = " ".join(capfd.readouterr().out.split())
    assert "log=wandb trains what log=default does" in said and "seed=2" not in said
