"""Runs a recipe: in this process, or through NeMo-Run's executors.

A job is frozen when it is made: what travels to another process is the translated recipe, never the YAML.

Signals. Ctrl-C and SIGTERM end a training after its step, with a checkpoint (vlmsft.runtime.preemption); a second
Ctrl-C ends it at once. Either way the exit code is 128 + signal, and the last line says how to go on, and from which
step.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import fiddle as fdl
import nemo_run as run
import yaml
from nemo_run.config import set_nemorun_home
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer
from torchx.specs.api import AppState, is_terminal

from vlmsft.errors import USER_ERROR_EXIT_CODE, Problem, UserError, format_problems
from vlmsft.runtime.logging import CONSOLE_PATH, console, log_path, quiet, rank_from_environment
from vlmsft.runtime.metrics_rows import FAILURE_FILE
from vlmsft.runtime.processes import kill_all, processes_with, stop_all

FAILED_EXIT_CODE = 1
CANCELLED_EXIT_CODE = 128 + signal.SIGTERM
HOME = "nemo-run"
"""NeMo-Run's files, in a run folder. Not nemo_run: in scripts for Slurm without a container it takes any /nemo_run for
its own mount, and writes another path there."""
RECIPE_FILE = "recipe.json"
"""The frozen recipe in a run folder, as NeMo-Run's ZlibJSONSerializer writes it."""
STOP_SECONDS = 120.0
"""Time for workers to end their step and to save a checkpoint."""
UNFINISHED_SUFFIX = "-unfinished"
"""NeMo's ModelCheckpoint.UNFINISHED_CHECKPOINT_SUFFIX."""
POLL_SECONDS = 1.0
LOCAL_RUN = "VLMSFT_LOCAL_RUN"
"""The run folder, in the environment of each process of a local job (vlmsft.runtime.processes)."""
DGXCLOUD_SECRET = "DGXCLOUD_CLIENT_SECRET"
"""The environment variable."""
TASK = "train"


@dataclass(frozen=True)
class Job:
    """A recipe and where its run lives.

    run_dir: runs/<name>/<id>, absolute
    """

    recipe: run.Partial
    run_dir: str
    name: str
    id: str


# --- in this process --------------------------------------------------------------------------------------------------


def run_here(job: Job) -> None:
    """Train in this process; NeMo's own output goes to the run folder. Ends the process when it was interrupted."""
    with _end_on_signal(lambda number: _say(f"{_name(number)}: {how_to_go_on(job)}")), quiet(job.run_dir):
        run.run(job.recipe, direct=True)


@contextlib.contextmanager
def _end_on_signal(explain: Callable[[int], None]) -> Iterator[None]:
    """Turns what Lightning makes of Ctrl-C and SIGTERM (exit code 1, exit code 0) into 128 + signal.

    explain: called with the signal's number before that
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        between_steps: Any = signal.getsignal(signal.SIGTERM)
        trains = between_steps is not handle and callable(between_steps)  # Lightning's, which then calls this one too
        if number == signal.SIGTERM and trains:
            return
        if number == signal.SIGINT and trains and received.count(signal.SIGINT) == 1:
            _say("stopping after this step (Ctrl-C again: at once) ...")
            between_steps(signal.SIGTERM, frame)
            return
        raise KeyboardInterrupt

    with _handlers(handle, signal.SIGINT, signal.SIGTERM):
        try:
            yield
        except BaseException:
            if not received:
                raise
            explain(received[0])
            sys.exit(128 + received[0])


@contextlib.contextmanager
def _handlers(handle: Callable[[int, FrameType | None], None], *signals: int) -> Iterator[None]:
    before = {number: signal.signal(number, handle) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _name(number: int) -> str:
    return "Interrupted" if number == signal.SIGINT else f"Ended by {_signal_name(number)}"


def how_to_go_on(job: Job) -> str:
    """What to type after an interrupt, and from where it would go on."""
    checkpoint = newest_checkpoint(job.run_dir)
    if checkpoint is None:
        return f"the training has stopped, no checkpoint yet: the same command with id={job.id} would start over"
    step = re.search(r"step=(\d+)", checkpoint.name)  # of the last step done, counted from 0
    place = f"step {int(step.group(1)) + 1}" if step else checkpoint.name
    return f"the training has stopped. To go on from {place}: the same command with id={job.id}"


def newest_checkpoint(run_dir: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint that NeMo's AutoResume takes: the *last folder of the latest time, without a marker that
    it is being written (nemo/lightning/resume.py, _find_trainer_ckpt_path)."""
    folders = [path for path in Path(run_dir, "checkpoints").glob("*last") if path.is_dir()]
    complete = [path for path in folders if not path.with_name(f"{path.name}{UNFINISHED_SUFFIX}").exists()]
    return max(complete, key=lambda path: path.lstat().st_mtime, default=None)


def _say(text: str) -> None:
    """On the user's console, once for all ranks."""
    if rank_from_environment() == 0:
        console().print(text, markup=False, highlight=False)


# --- frozen in a run folder -------------------------------------------------------------------------------------------


def read_job(run_dir: str | os.PathLike[str]) -> Job:
    """The job whose recipe a sweep's launcher froze in a run folder."""
    folder = Path(run_dir)
    recipe = ZlibJSONSerializer().deserialize((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    return Job(recipe, str(folder), folder.parent.name, folder.name)  # type: ignore[arg-type]


# --- through NeMo-Run's executors -------------------------------------------------------------------------------------


def work(finetune: Callable[[], Any], run_dir: str) -> None:
    """What a worker started by an executor runs. The first that fails or is ended by a signal leaves its reason in the
    run folder; launch/slurm.yaml's script looks there whether to requeue the job."""
    if rank_from_environment() == 0 and "SLURM_RESTART_COUNT" in os.environ:
        # of the attempt before Slurm requeued the job; other starts have none left, and a faster rank's must stay
        Path(run_dir, FAILURE_FILE).unlink(missing_ok=True)
    try:
        with _end_on_signal(lambda number: _keep_failure(run_dir, 128 + number, f"{_name(number)}.")), quiet(run_dir):
            finetune()
    except UserError as error:
        _keep_failure(run_dir, USER_ERROR_EXIT_CODE, format_problems(error))
        raise
    except Exception as error:
        _keep_failure(run_dir, FAILED_EXIT_CODE, "".join(traceback.format_exception(error)))
        raise


def _keep_failure(run_dir: str, exit_code: int, message: str) -> None:
    failure = {"exit_code": exit_code, "rank": rank_from_environment(), "message": message}
    with contextlib.suppress(FileExistsError), open(Path(run_dir, FAILURE_FILE), "x", encoding="utf-8") as file:
        json.dump(failure, file, ensure_ascii=False)


def is_local(executor: run.Config) -> bool:
    """Whether it runs jobs on this machine, where they are followed to their end."""
    target = fdl.get_callable(executor)
    return isinstance(target, type) and issubclass(target, (run.LocalExecutor, run.DockerExecutor))


def torchrun_executor(num_processes: int) -> run.Config:
    """launch=torchrun's executor, for launch=local with several devices."""
    return run.Config(run.LocalExecutor, launcher="torchrun", ntasks_per_node=num_processes)


def launch(job: Job, config: run.Config, *, dry_run: bool = False, follow: bool = False) -> int:
    """Start the job through an executor; gives the exit code.

    On this machine the job is followed to its end; elsewhere it is submitted. NeMo-Run reports a failed job as if all
    were well (its issue 289) and leaves local workers running when it is interrupted itself: both are done here.

    config: of the executor
    dry_run: write what would be submitted, and submit nothing
    follow: wait for the end of a submitted job too; its exit code is given then. Ctrl-C leaves it running
    """
    home = Path(job.run_dir, HOME)
    set_nemorun_home(str(home))
    executor = build_executor(config)
    Path(job.run_dir, FAILURE_FILE).unlink(missing_ok=True)
    _append_to_stdout()
    with quiet(job.run_dir):  # workers on this machine find the user's console through it
        experiment = run.Experiment(
            job.name, base_dir=str(home), clean_mode=True, enable_goodbye_message=False, skip_status_at_exit=True
        )
        with experiment:
            experiment.add(run.Partial(work, finetune=job.recipe, run_dir=job.run_dir), executor=executor, name=TASK)
            if dry_run:
                return _dry_run(experiment)
            if is_local(config):
                return _follow_here(job, experiment)
            os.environ.pop(CONSOLE_PATH, None)  # a submitted job inherits the environment, but not this process's files
            _submit(job, experiment)
            return _follow_there(job, experiment) if follow else 0


def build_executor(config: run.Config) -> Any:
    """The executor, with what its workers need to be found. Raises UserError where it can't be made: a package or a
    cluster's credentials are missing.
    """
    with as_user_errors():
        executor: Any = fdl.build(config)
    if isinstance(executor, run.LocalExecutor):
        executor.env_vars = {**_local_environment(), **executor.env_vars}
    elif isinstance(executor, run.SlurmExecutor):
        executor.env_vars = {**_slurm_environment(executor), **executor.env_vars}
    elif isinstance(executor, run.DGXCloudExecutor) and not executor.client_secret:
        _take_secret_from_environment()
    return executor


def _slurm_environment(executor: run.SlurmExecutor) -> dict[str, str]:
    """Where there is no container, the job runs in the environment that it is submitted from, also where that isn't
    first on PATH. The batch script writes values as they are, so its own PATH follows."""
    if executor.container_image is not None or not isinstance(executor.tunnel, run.LocalTunnel):
        return {}
    return {"PATH": f"{shlex.quote(os.path.dirname(sys.executable))}:$PATH"}


@functools.cache
def _take_secret_from_environment() -> None:
    """NeMo-Run writes an executor's settings to several files, so the secret is no part of them."""
    original = run.DGXCloudExecutor.get_auth_token

    def get_auth_token(self: run.DGXCloudExecutor) -> str | None:
        with_secret = copy.copy(self)
        with_secret.client_secret = os.environ.get(DGXCLOUD_SECRET, "")
        if not with_secret.client_secret:
            raise UserError(Problem(DGXCLOUD_SECRET, "nothing", "the application's secret in the environment"))
        return original(with_secret)

    run.DGXCloudExecutor.get_auth_token = get_auth_token


@contextlib.contextmanager
def as_user_errors() -> Iterator[None]:
    """What executors and packagers say of a package, a repository or a cluster that isn't there."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each cloud's client has errors of its own
        if not isinstance(error, _EXECUTORS_ERRORS) and type(error).__module__.split(".")[0] not in _CLIENTS:
            raise
        found = str(error).split("\n\nFiddle context")[0] or repr(error)
        raise UserError(Problem("launch.executor", found, "a job that NeMo-Run can prepare")) from error


_EXECUTORS_ERRORS = (AssertionError, ImportError, OSError, RuntimeError, ValueError, subprocess.CalledProcessError)
_CLIENTS = ("docker", "invoke", "kubernetes", "leptonai", "paramiko", "requests", "sky", "urllib3")
"""Packages whose errors are about the user's machine, account or cluster."""


def _dry_run(experiment: run.Experiment) -> int:
    with as_user_errors():
        experiment.dryrun(log=False, delete_exp_dir=False)
    folder = Path(experiment._exp_dir)
    for submitted in experiment.jobs:
        Path(folder, f"{submitted.id}_request.txt").write_text(request_text(submitted), encoding="utf-8")
    written = sorted(str(path) for path in (*folder.glob("*_sbatch.sh"), *folder.glob("*_request.txt")))
    _say(f"dry run, nothing was started: {', '.join(written)}")
    return 0


def request_text(prepared: Any) -> str:
    """What NeMo-Run would send, of a job after its dry run, as far as NeMo-Run shows it.

    prepared: nemo_run's Job
    """
    information = prepared._dryrun_info
    if isinstance(prepared.executor, run.LocalExecutor):
        (replicas,) = information.request.role_params.values()
        environment = [f"{name}={value}" for name, value in sorted(replicas[0].env.items())]
        return "\n".join([*environment, shlex.join(replicas[0].args), ""])
    if hasattr(prepared.executor, "get_job_body"):  # Kubeflow's: its own text names the command only
        request = information.request
        return yaml.safe_dump(prepared.executor.get_job_body(request.name, request.cmd), sort_keys=False)
    return str(information)


def _submit(job: Job, experiment: run.Experiment) -> None:
    with as_user_errors():
        experiment.run(detach=True)
    status = experiment.status(return_dict=True) or {}
    submitted = ", ".join(str(task["job_id"]) for task in status.values())
    _say(f"submitted {submitted}; run folder {job.run_dir}, output below {experiment._exp_dir}")
    experiment.clean_mode = False  # `nemorun experiment status` would print as little as this process
    experiment._save_config()
    manage = f"NEMORUN_HOME={Path(job.run_dir, HOME)} nemorun experiment"
    _say(f"how it is: {manage} status {experiment._id}; logs and cancel likewise")


def _follow_here(job: Job, experiment: run.Experiment) -> int:
    with _interrupts() as received, _none_left(job.run_dir):
        try:
            with as_user_errors():
                experiment.run()
            state = _end_state(experiment)
        except KeyboardInterrupt:
            _say("stopping after this step (Ctrl-C again: at once) ...")
            with contextlib.suppress(KeyboardInterrupt):  # a second one: at once
                _stop_here(job.run_dir, experiment)
            kill_all(LOCAL_RUN, [job.run_dir])
            _say(f"{_name(received[0])}: {how_to_go_on(job)}")
            return 128 + received[0]
    if state == AppState.SUCCEEDED:
        return 0
    killed = killed_rank(experiment._exp_dir)
    if killed is None:
        return explain_failure(job.run_dir, experiment._exp_dir)
    return explain_kill(job, experiment._exp_dir, *killed)


@contextlib.contextmanager
def _none_left(run_dir: str) -> Iterator[None]:
    """Kills what processes that are started inside leave behind."""
    os.environ[LOCAL_RUN] = run_dir
    try:
        yield
    finally:
        del os.environ[LOCAL_RUN]
        kill_all(LOCAL_RUN, [run_dir])


def _follow_there(job: Job, experiment: run.Experiment) -> int:
    _say("waiting for its end (Ctrl-C leaves it running) ...")
    state = _end_state(experiment)
    if state == AppState.CANCELLED:
        _say(f"cancelled: {how_to_go_on(job)}")
        return CANCELLED_EXIT_CODE
    return 0 if state == AppState.SUCCEEDED else explain_failure(job.run_dir, experiment._exp_dir)


def _end_state(experiment: run.Experiment) -> AppState:
    """Waits for it. A state that is unknown for now (accounting lags behind, or is away) isn't an end."""
    while not is_terminal(state := _state(experiment)):
        time.sleep(POLL_SECONDS)
    return state


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C, SIGTERM and a closed terminal raise KeyboardInterrupt; which it was stands in the list."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    with _handlers(handle, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield received


def _state(experiment: run.Experiment) -> AppState:
    status = experiment.status(return_dict=True) or {}
    return status[TASK]["status"]  # type: ignore[return-value]


def _stop_here(run_dir: str, experiment: run.Experiment) -> None:
    if processes_with(LOCAL_RUN, [run_dir]):
        stop_all(LOCAL_RUN, [run_dir], STOP_SECONDS)
    else:  # a container, which is Docker's child
        experiment.cancel(TASK)


_RANK_IN_REPORT = re.compile(
    r"^  time      : (?P<time>\S+)\n.*\n  rank      : (?P<rank>\d+) .*\n  exitcode  : (?P<code>-?\d+) ", re.MULTILINE
)
"""A failed worker in what torchrun prints at its end (torch.distributed.elastic.multiprocessing.errors)."""


def killed_rank(experiment_dir: str) -> tuple[int, str] | None:
    """The worker whose end by a signal made a local torchrun end the others, and the signal's name; None where a worker
    failed by itself. Only torchrun has seen it: what the others left is about the connection that they lost."""
    reports = [path.read_text(encoding="utf-8", errors="replace") for path in Path(experiment_dir).rglob("stderr.log")]
    failures = [
        (found["time"], int(found["code"]), int(found["rank"]))
        for report in reports
        for found in _RANK_IN_REPORT.finditer(report)
    ]
    if not failures:
        return None
    # times are of whole seconds: in the same one, torchrun's SIGTERM came last, and errors of others before it
    _, code, rank = min(failures, key=lambda failure: (failure[0], failure[1] == -signal.SIGTERM, failure[1] > 0))
    return (rank, _signal_name(-code)) if code < 0 else None


def _signal_name(number: int) -> str:
    """SIGKILL, ...; real-time signals have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def explain_kill(job: Job, experiment_dir: str, rank: int, signal_name: str) -> int:
    """Says on the console and in the run folder that a signal ended a worker; gives the job's exit code."""
    message = f"rank {rank} was ended by {signal_name}"
    if signal_name == "SIGKILL":
        message += " (the machine's memory was full, or somebody killed it)"
    message += ", and the other ranks with it."
    failure = Path(job.run_dir, FAILURE_FILE)
    failure.write_text(  # over that of a rank that lost its connection
        json.dumps({"exit_code": FAILED_EXIT_CODE, "rank": rank, "message": message}), encoding="utf-8"
    )
    _say(f"{message} {_logs(job.run_dir, experiment_dir)}")
    _say(how_to_go_on(job))
    return FAILED_EXIT_CODE


def _logs(run_dir: str, experiment_dir: str) -> str:
    logs = f"Logs: {log_path(run_dir, 0)} (nemo-rank1.log, ... of other ranks); "
    return logs + f"what came before them: below {experiment_dir}"


def explain_failure(run_dir: str, experiment_dir: str) -> int:
    """Says on the console why a job failed, and gives its exit code, by what its first failed worker left."""
    logs = _logs(run_dir, experiment_dir)
    try:
        failure = json.loads(Path(run_dir, FAILURE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        _say(f"a worker has died without a word (out of memory, or killed). {logs}")
        return FAILED_EXIT_CODE
    if failure["exit_code"] != FAILED_EXIT_CODE:
        _say(failure["message"])
    else:
        _say(f"{failure['message']}rank {failure['rank']} failed. {logs}")
    return failure["exit_code"]


def _local_environment() -> dict[str, str]:
    """torchx starts plain `python` and `torchrun`: those of this environment, wherever it is; and they find vlmsft."""
    return {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "PYTHONPATH": _python_path()}


def _python_path() -> str:
    """PYTHONPATH with the folder that vlmsft was imported from in front."""
    here = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])


def _append_to_stdout() -> None:
    """Workers open the console a second time: where it is a file, each writer must write at its end."""
    flags = fcntl.fcntl(1, fcntl.F_GETFL)
    fcntl.fcntl(1, fcntl.F_SETFL, flags | os.O_APPEND)
