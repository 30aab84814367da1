"""A real Slurm of two nodes on loopback: munge, MariaDB, slurmdbd, slurmctld and two slurmd, all in one folder.

    with Cluster(folder) as cluster:
        subprocess.run(["sbatch", ...], env={**os.environ, **cluster.environment})

Debian 12's PACKAGES. No systemd, no cgroups, no container plugin; every port is picked free, and every
file and socket lies in the folder, so that a second cluster, or a system's own Slurm, isn't touched. Root is needed:
slurmd starts tasks as the user who submitted.

Nothing outlives the cluster, also when its process is killed: a guard in a process of its own then ends all processes
that have the cluster's SLURM_CONF in their environment (daemons, tasks, launchers), and removes the folder.

Partitions: `debug` (default), and `urgent`, whose jobs preempt those of `debug`: SIGTERM, GRACE_SECONDS later SIGKILL,
then they are requeued.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch", "sacctmgr")
OTHER_PROGRAMS = ("sshd", "ssh", "ssh-keygen", "rsync")  # of tests/slurm/sshd.py
PACKAGES = "slurmctld slurmd slurm-client slurmdbd munge mariadb-server openssh-server openssh-client rsync"
NODES = ("n1", "n2")
ACCOUNT = "test"
CPUS_PER_NODE = 4  # as Slurm is told; the tests' jobs are tiny
GRACE_SECONDS = 120
REQUEUE_SECONDS = 5  # Slurm's own 120 would be most of the tests' time
START_SECONDS = 60
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


def missing() -> str | None:
    """Why there can't be a cluster here; None = there can."""
    absent = [name for name in PROGRAMS + OTHER_PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install -y --no-install-recommends {PACKAGES}"
    return None if os.geteuid() == 0 else "Slurm's daemons need root"


class Cluster:
    """Brings the daemons up on entering, in START_SECONDS at most each; on leaving ends them, and what knows them.

    folder: removed on leaving. Short, since sockets' paths are limited to 107 characters
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._started: list[tuple[str, subprocess.Popen]] = []
        self._guard: subprocess.Popen | None = None

    def __enter__(self) -> Cluster:
        self.folder.mkdir(parents=True)
        command = [sys.executable, __file__, str(self.folder)]
        self._guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        try:
            self._munge()
            database_port = self._mariadb()
            self._write_configuration(database_port)
            self._slurm()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(RuntimeError):  # a cluster that never came up
            self._kill_jobs()
        for _, process in reversed(self._started):
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._started.clear()
        assert self._guard is not None
        self._guard.communicate()

    def _kill_jobs(self) -> None:
        """Else the tasks of jobs that still run would outlive the daemons."""
        self.run("scancel", "--full", "--signal=KILL", "--user=root")
        self.run("scancel", "--user=root")
        deadline = time.monotonic() + START_SECONDS
        while self.run("squeue", "-h") and time.monotonic() < deadline:
            time.sleep(0.5)

    def run(self, *command: str) -> str:
        """stdout of a Slurm command; raises with its stderr when it fails."""
        done = subprocess.run(command, env=self._environment(), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
        return done.stdout

    def jobs(self) -> dict[str, tuple[str, str]]:
        """State and exit code ("rc:signal") by job id, as accounting has them."""
        lines = self.run("sacct", "-a", "-X", "-n", "-P", "-o", "JobID,State,ExitCode").splitlines()
        return {number: (state.split()[0], code) for number, state, code in (line.split("|") for line in lines)}

    def wait_for(self, job: str, *states: str, seconds: float = 600) -> tuple[str, str]:
        """Waits until accounting has the job in one of these states; gives state and exit code."""
        deadline = time.monotonic() + seconds
        while (found := self.jobs().get(job, ("unknown", "")))[0] not in states:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {found} after {seconds} s, waited for {states}")
            time.sleep(0.5)
        return found

    # --- the daemons, in the order in which they need each other ------------------------------------------------------

    def _munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        files = [f"--{name}-file={self.folder / f'munge.{name}'}" for name in ("key", "log", "pid", "seed")]
        self._start("munged", "--foreground", "--force", f"--socket={self._munge_socket}", *files)
        self._wait("munge", ["munge", "-n", "-S", self._munge_socket])

    def _mariadb(self) -> int:
        """The port that it listens on."""
        data, port = self.folder / "mariadb", free_port()
        as_root = ["--no-defaults", "--user=root", f"--datadir={data}"]
        self.run("mariadb-install-db", *as_root, "--auth-root-authentication-method=normal", "--skip-test-db")
        address = [f"--socket={self._database_socket}", "--bind-address=127.0.0.1", f"--port={port}"]
        self._start("mariadbd", *as_root, *address, "--innodb-buffer-pool-size=64M")
        client = ["mariadb", "--no-defaults", "--user=root", f"--socket={self._database_socket}", "-e"]
        self._wait("mariadbd", [*client, "select 1"])
        grant = "create database slurm; grant all on slurm.* to 'slurm'@'%' identified by 'slurm';"
        self.run(*client, grant)
        return port

    def _slurm(self) -> None:
        self._start("slurmdbd", "-D")
        self._wait("slurmdbd", ["sacctmgr", "-n", "show", "cluster"])
        self.run("sacctmgr", "-i", "add", "cluster", "loop")
        self.run("sacctmgr", "-i", "add", "account", ACCOUNT)
        self.run("sacctmgr", "-i", "add", "user", "root", f"Account={ACCOUNT}")
        self._start("slurmctld", "-D", "-i")
        for node in NODES:
            self._start("slurmd", "-D", "-N", node, log=node)
        self._wait("the nodes", ["sinfo", "-h", "-p", "debug", "-t", "idle", "-o", "%D"], output=str(len(NODES)))

    # --- configuration ------------------------------------------------------------------------------------------------

    def _write_configuration(self, database_port: int) -> None:
        host, folder, accounting_port = socket.gethostname().split(".")[0], self.folder, free_port()
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        accounting = folder / "slurmdbd.conf"
        accounting.write_text(
            f"""\
AuthType=auth/munge
AuthInfo=socket={self._munge_socket}
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={accounting_port}
SlurmUser=root
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
"""
        )
        accounting.chmod(0o600)
        size = f"CPUs={CPUS_PER_NODE} RealMemory=4000"
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} {size}" for name in NODES
        )
        (folder / "slurm.conf").write_text(
            f"""\
ClusterName=loop
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={self._munge_socket},cred_expire={REQUEUE_SECONDS}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=2
KillWait=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting_port}
AccountingStoragePass={self._munge_socket}
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime={GRACE_SECONDS}
PartitionName=urgent Nodes=ALL MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""
        )
        (folder / "state").mkdir()

    @property
    def _munge_socket(self) -> str:
        return str(self.folder / "munge.socket")

    @property
    def _database_socket(self) -> str:
        return str(self.folder / "mariadb.socket")

    # --- processes ----------------------------------------------------------------------------------------------------

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self.environment, "PATH": f"{SYSTEM_PATH}:{os.environ['PATH']}"}

    def _start(self, *command: str, log: str | None = None) -> None:
        name = log or command[0]
        with open(self.folder / f"{name}.out", "wb") as output:
            process = subprocess.Popen(
                command, env=self._environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        self._started.append((name, process))

    def _wait(self, what: str, command: Sequence[str], output: str | None = None) -> None:
        """Waits until the command succeeds, and prints `output` where that is given."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                said = self.run(*command).strip()
                if output in (None, said):
                    return
            except RuntimeError as error:
                said = str(error)
            dead = [name for name, process in self._started if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = "\n".join(f"{name}: {self._last_lines(name)}" for name, _ in self._started)
                raise RuntimeError(f"{what} did not come up ({', '.join(dead) or 'none'} ended): {said}\n{logs}")
            time.sleep(0.2)

    def _last_lines(self, name: str) -> str:
        text = (self.folder / f"{name}.out").read_text(errors="replace")
        return "\n".join(text.splitlines()[-5:])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def kill_all_of(folder: str) -> None:
    """Ends all processes that know the cluster in `folder`."""
    known = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SLURM_CONF") == f"{folder}/slurm.conf":
                process.kill()
                known.append(process)
    psutil.wait_procs(known, timeout=10)


if __name__ == "__main__":  # the guard: its stdin ends with the cluster, or with the process that had it
    sys.stdin.read()
    kill_all_of(sys.argv[1])
    shutil.rmtree(sys.argv[1], ignore_errors=True)
