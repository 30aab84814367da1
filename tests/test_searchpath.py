"""launch/ and sweeps/ are groups from anywhere, runs get one id, and nothing is left in the working directory."""

import os
import re
import subprocess
import sys

import pytest
from config_cases import DATA, compose

from vlmsft import config_files
from vlmsft.config_files import root

PROGRAM = """
import sys
from vlmsft.cli import command
@command("train")
def main(cfg):
    print("JOB", cfg.id, cfg.run_dir, cfg.optim.max_lr, cfg.launch.executor and cfg.launch.executor._target_)
main()
"""


def run(*arguments, cwd, **environment):
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "VLMSFT_"))}
    env |= {"PYTHONPATH": str(root()), **environment}
    return subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, cwd=cwd, env=env)


def jobs(done):
    assert done.returncode == 0, done.stderr
    return [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("JOB ")]


def test_groups_from_another_directory(tmp_path):
    ((_, run_dir, _, executor),) = jobs(run("launch=torchrun", "experiment=demo", cwd=tmp_path))
    assert executor == "nemo_run.LocalExecutor"
    assert run_dir.startswith(str(tmp_path / "runs" / "demo"))
    assert list(tmp_path.iterdir()) == [], "composing and starting a job leaves nothing behind"


def test_sweep_file_expands_and_its_jobs_have_their_own_ids(tmp_path):
    found = jobs(run("sweeps=lr_tp", "experiment=lora", *DATA, cwd=tmp_path))
    assert len(found) == 6
    assert len({job[0] for job in found}) == 6
    assert len({job[0].rsplit("-", 1)[0] for job in found}) == 1
    assert {float(job[2]) for job in found} == {5e-5, 1e-4, 2e-4}


def test_only_launch_and_sweeps_are_shown(tmp_path):
    done = run("--help", cwd=tmp_path)
    groups = done.stdout.split("== Config ==")[0]
    for group in ("launch", "sweeps"):
        assert f"{group}: {', '.join(sorted(path.stem for path in (root() / group).glob('*.yaml')))}" in groups
    assert "tests" not in groups and "vlmsft" not in groups


@pytest.fixture
def fresh_ids(monkeypatch):
    for name in [n for n in os.environ if n.startswith(("SLURM_", "VLMSFT_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    config_files._run_id.cache_clear()
    config_files._process_id.cache_clear()
    yield monkeypatch
    config_files._run_id.cache_clear()
    config_files._process_id.cache_clear()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"VLMSFT_RUN_ID": "given", "SLURM_JOB_ID": "12", "SLURM_PROCID": "0"}, "given"),
        ({"SLURM_JOB_ID": "12", "SLURM_PROCID": "3"}, "12"),
        ({"SLURM_JOB_ID": "12", "SLURM_PROCID": "0", "SLURM_STEP_ID": "2"}, "12-2"),
        ({"SLURM_JOB_ID": "12", "SLURM_PROCID": "0", "SLURM_STEP_ID": str(0xFFFFFFFB)}, "12"),
    ],
)
def test_run_id_of_a_launch(fresh_ids, environment, expected):
    for name, value in environment.items():
        fresh_ids.setenv(name, value)
    assert config_files.run_id() == expected


@pytest.mark.parametrize("interactive", [{}, {"SLURM_PROCID": "0", "SLURM_STEP_ID": str(0xFFFFFFFA)}])
def test_commands_in_an_allocation_are_separate_runs(fresh_ids, interactive):
    for name, value in {"SLURM_JOB_ID": "12", **interactive}.items():
        fresh_ids.setenv(name, value)
    assert re.fullmatch(r"20\d{6}-\d{6}-[0-9a-f]{4}", config_files.run_id())


def test_commands_of_the_same_second_are_separate_runs(fresh_ids):
    fresh_ids.setattr(config_files.time, "strftime", lambda form: "20261124-061530")
    ids = set()
    for _ in range(5):
        config_files._run_id.cache_clear()
        config_files._process_id.cache_clear()
        ids.add(config_files.run_id())
    assert len(ids) > 1, "five times the same four digits: once in 10^19"


def test_run_id_stays_in_a_process(fresh_ids):
    first = config_files.run_id()
    assert compose("experiment=demo").id == first == config_files.run_id()


RANKS = """
import os, sys, time
if os.environ["RANK"] == "0" and not os.path.exists("restarted"): time.sleep(1.5)  # the others ask first
from vlmsft.config_files import run_id
own = run_id()
open(f"rank{os.environ['RANK']}-{os.environ['TORCHELASTIC_RESTART_COUNT']}", "w").write(own)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    open("restarted", "w").close()
    time.sleep(2)
    sys.exit(1)
"""


@pytest.mark.nemo  # starts torchrun, which imports torch in three processes
def test_ranks_of_torchrun_agree_also_after_a_restart(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "ranks.py"]
    env = {**os.environ, "PYTHONPATH": str(root()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ids = {path.name: path.read_text() for path in tmp_path.glob("rank?-?")}
    assert len(ids) == 4 and len(set(ids.values())) == 1, ids
