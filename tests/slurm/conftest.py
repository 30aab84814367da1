"""One Slurm cluster for all tests of this folder, and how they launch into it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import ACCOUNT, Cluster, missing
from launch_cases import SENTINELS, make_repository

from vlmsft.config_files import root

ON_THIS_CLUSTER = [
    f"launch.executor.account={ACCOUNT}",
    "launch.executor.partition=debug",
    "launch.executor.gpus_per_node=null",
    "launch.executor.container_image=null",
    "launch.executor.time='20'",
    "launch.executor.signal=TERM@60",
    "+launch.executor.env_vars.MASTER_ADDR=127.0.0.1",  # the nodes' names are Slurm's only
]
PATIENCE_SECONDS = 1500  # with what takes a minute where nothing else runs
TINY = [
    "experiment=demo",
    "trainer.callbacks.overfit=null",
    "trainer.callbacks.answers=null",
    "optim.warmup_steps=1",
    "data.micro_batch_size=4",
]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = missing()
    if reason is not None:
        pytest.fail(reason)  # who asks for these tests has to have it: a skipped suite would pass
    short = tempfile.TemporaryDirectory(prefix="slurm-")  # not tmp_path: sockets' paths are limited
    with short as folder, Cluster(Path(folder, "c")) as running:
        yield running


class Launchpad:
    """A repository whose commands reach the cluster, with tokens in the environment."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder = cluster, make_repository(folder)
        (self.folder / ".git" / "info" / "exclude").write_text("*\n")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
            **cluster.environment,
            **SENTINELS,
            "PYTHONPATH": os.pathsep.join([str(root()), str(root() / "tests")]),
            "WANDB_MODE": "offline",
        }

    def start(self, command: str, *arguments: str) -> subprocess.Popen:
        """`python -m vlmsft.<command>` in the background; both its streams go to stdout."""
        return subprocess.Popen(
            [sys.executable, "-m", f"vlmsft.{command}", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, command: str, *arguments: str) -> tuple[int, str]:
        """Exit code and output."""
        started = self.start(command, *arguments)
        output, _ = started.communicate(timeout=PATIENCE_SECONDS)
        return started.returncode, output


@pytest.fixture
def launchpad(cluster, tmp_path) -> Launchpad:
    return Launchpad(cluster, tmp_path / "pad")
