"""What launching costs beside NeMo-Run's own cost: a sweep's start, and each job of it.

    python benchmarks/launch_overhead.py [--jobs 100] [--slurm 16]

Sweep: `vlmsft.train -m` of the demo with --jobs learning rates, up to the point where the first job would start: all
composed, checked, translated, written into ledger and run folders, packaged by NeMo-Run. NeMo's import, once a sweep,
is told apart. It must stay under 20 s beside it.

Job: commands that do nothing (`true`), with the record in their run folders (config, state of the code, fingerprint of
the data), against the same commands in NeMo-Run's Experiment alone, in the same process: 64 of them, all at once, up to
the last one's start. Beyond NeMo-Run's cost it may be 100 ms. Then --jobs of them, 8 at a time, to the last one's end.

Slurm: --slurm of these commands through a real Slurm on loopback (tests/slurm/cluster.py; as root, 0 = left out), up to
the end of the last one's submission, against the Experiment's. Beyond NeMo-Run's cost it may be 150 ms a job.

Prints Markdown, wall time and this process's CPU time: on a machine that others use too, the latter tells more.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

from vlmsft.runtime.logging import console

SWEEP_SECONDS, JOB_SECONDS, SLURM_JOB_SECONDS = 20.0, 0.1, 0.15
Spent = tuple[float, float]
"""Seconds: wall, CPU."""


@contextlib.contextmanager
def measured(into: dict[str, Spent], name: str) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    into[name] = (time.perf_counter() - wall, time.process_time() - cpu)
    console().print(f"{name}: {into[name][0]:.1f} s, {into[name][1]:.1f} s of the CPU")


def launch_sweep(num_jobs: int) -> None:
    from vlmsft import train

    rates = ",".join(f"{1e-3 + number * 1e-6:.6f}" for number in range(num_jobs))
    words = ["experiment=demo", f"optim.max_lr={rates}", "hydra.launcher.dryrun=true"]
    command = mock.patch.object(sys, "argv", ["train", "-m", *words, "sweep.id=bench"])
    with command, contextlib.redirect_stdout(io.StringIO()):
        try:
            train.main()
        except SystemExit as end:
            if end.code:
                raise


def noop_rows(num_jobs: int) -> list:
    """The sweep's jobs, each with `true` for its command."""
    from vlmsft.sweeping.ledger import Ledger

    rows = Ledger("runs/sweeps/bench").jobs()[:num_jobs]
    return [replace(row, command=["true", "-"]) for row in rows]


def nemo_run_alone(rows: list) -> None:
    """The same tasks in an Experiment of its own, up to their submission; as many at once as its scheduler keeps."""
    import nemo_run as run
    from nemo_run.config import set_nemorun_home

    from vlmsft.sweeping.experiment import executor_of, script_of

    home = os.path.abspath("alone")
    set_nemorun_home(home)  # where Slurm's tunnel looks for the scripts
    experiment = run.Experiment("alone", base_dir=home, clean_mode=True, enable_goodbye_message=False)
    with experiment:
        for row in rows:
            experiment.add(script_of(row), executor=executor_of(row), name=f"job_{row.num}")
        experiment.run(detach=True)
        experiment._launched = False  # leave without waiting for its two-second polls


def ours(rows: list, folder: str, max_parallel: int) -> dict[str, int]:
    """Their run by vlmsft's scheduler, to the last one's end; gives the number of jobs by state."""
    from vlmsft.sweeping.ledger import Ledger
    from vlmsft.sweeping.schedule import Options, run_jobs, write_options

    ledger = Ledger(folder, create=True)
    ledger.add([replace(row, run_dir=f"{row.run_dir}-{max_parallel}") for row in rows])
    options = Options(max_parallel=max_parallel)
    write_options(ledger, options)
    run_jobs(ledger, [row.num for row in rows], options)
    states = [row.state for row in ledger.jobs()]
    return {state: states.count(state) for state in set(states)}


@contextlib.contextmanager
def on_slurm(rows: list) -> Iterator[list]:
    """The same jobs for a cluster that lives inside the `with`."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "slurm"))
    import nemo_run as run
    from cluster import ACCOUNT, Cluster

    from vlmsft.sweeping.experiment import frozen

    executor = run.Config(
        run.SlurmExecutor,
        account=ACCOUNT,
        partition="debug",
        packager=run.Config(run.Packager),
        poll_estimated_start_time=False,
    )
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as folder,
        Cluster(Path(folder, "c")) as cluster,
        mock.patch.dict(os.environ, cluster.environment),
    ):
        yield [replace(row, executor=frozen(executor), is_local=False) for row in rows]


def until_started(rows: list, start: str, folder: str) -> tuple[Spent, dict[str, int]]:
    """What vlmsft's scheduler takes until all are started or submitted, all at once, and how the jobs ended.

    start: the method of Loop that does it
    """
    from vlmsft.sweeping.schedule import Loop

    wall, cpu = time.perf_counter(), time.process_time()
    original, last = getattr(Loop, start), [0.0, 0.0]

    def start_and_look(self, what):
        original(self, what)
        last[:] = time.perf_counter() - wall, time.process_time() - cpu

    with mock.patch.object(Loop, start, start_and_look):
        states = ours(rows, os.path.abspath(f"runs/sweeps/{folder}"), len(rows))
    return (last[0], last[1]), states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--slurm", type=int, default=16)
    num_jobs, num_slurm = parser.parse_args().jobs, parser.parse_args().slurm
    spent: dict[str, Spent] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["NEMORUN_HOME"] = str(Path(folder, "nemo_run"))
        from vlmsft.runtime.logging import quiet

        with quiet(folder), measured(spent, "NeMo's import"):
            import nemo.collections.llm  # noqa: F401
        with measured(spent, "sweep"):
            launch_sweep(num_jobs)
        rows = noop_rows(num_jobs)
        alone = rows[:64]
        with quiet(folder):
            with measured(spent, "alone"):
                nemo_run_alone(alone)
            spent["ours"], _ = until_started(alone, "_start_here", "starts")
            with measured(spent, "to the end"):
                states = ours(rows, "runs/sweeps/noop", 8)
            if num_slurm:
                with on_slurm(rows[:num_slurm]) as submitted:
                    with measured(spent, "Slurm alone"):
                        nemo_run_alone(submitted)
                    spent["Slurm ours"], states_on_slurm = until_started(submitted, "_submit", "slurm")
    print(f"\n{num_jobs} jobs; seconds\n\n| | wall | CPU | limit |\n|---|---|---|---|")
    line("NeMo's import, once", spent["NeMo's import"])
    line(f"a sweep of {num_jobs} composed, checked, in its ledger, packaged", spent["sweep"], f"{SWEEP_SECONDS:.0f}")
    of_alone, of_ours = ([each / len(alone) for each in spent[name]] for name in ("alone", "ours"))
    line(f"a local job, NeMo-Run alone, {len(alone)} at once, to its start", of_alone)
    line(f"a local job, vlmsft, {len(alone)} at once, to its start", of_ours)
    line("difference", [ours - alone for ours, alone in zip(of_ours, of_alone, strict=True)], f"{JOB_SECONDS}")
    line("a local job, vlmsft, 8 at a time, to its end", [each / num_jobs for each in spent["to the end"]])
    if num_slurm:
        of_alone, of_ours = ([each / num_slurm for each in spent[name]] for name in ("Slurm alone", "Slurm ours"))
        line("a Slurm job, NeMo-Run alone", of_alone)
        line("a Slurm job, vlmsft, to its submission", of_ours)
        difference = [ours - alone for ours, alone in zip(of_ours, of_alone, strict=True)]
        line("difference", difference, f"{SLURM_JOB_SECONDS}")
    print(f"\njobs by state: {states}")
    if num_slurm:
        print(f"on Slurm: {states_on_slurm}")


def line(name: str, spent: Spent | list[float], limit: str = "") -> None:
    print(f"| {name} | {spent[0]:.3f} | {spent[1]:.3f} | {limit} |")


if __name__ == "__main__":
    main()
