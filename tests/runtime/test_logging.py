"""Who reaches the console while NeMo's output goes to its log; each case is a process of its own, since descriptors 1
and 2 are turned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vlmsft.runtime.logging import console, is_quiet, log_path, quiet, rank_from_environment

ROOT = Path(__file__).parents[2]


def run(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code with `quiet` imported and `folder` bound; stdout is a pipe."""
    program = f"import os, sys, logging, warnings\nfrom vlmsft.runtime.logging import *\nfolder = {str(folder)!r}\n"
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "VLMSFT_CONSOLE")}
    return subprocess.run(
        [sys.executable, "-c", program + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env={**clean, **environment},
    )


def test_noise_goes_to_the_log_in_order(tmp_path):
    result = run(
        """
        early = logging.getLogger("nemo_logger")           # as NeMo's singleton: own handlers, no propagation
        early.propagate = False
        early.addHandler(logging.StreamHandler(sys.stdout))
        early.setLevel("INFO")
        with quiet(folder):
            print("1 print")
            early.info("2 handler made before")
            os.write(1, b"3 from C on stdout\\n")
            os.write(2, b"4 from C on stderr\\n")
            warnings.warn("5 warning")
            logging.getLogger("lightning").warning("6 no handler at all")
            os.system("echo 7 child process")
            console().print("our line")
        print("after")
        """,
        tmp_path,
    )
    assert (result.stdout, result.stderr, result.returncode) == ("our line\nafter\n", "", 0)
    log = (tmp_path / "nemo.log").read_text()
    positions = [log.index(f"{number} ") for number in "1234567"]
    assert positions == sorted(positions), log
    assert "our line" not in log


def test_errors_and_our_own_records_reach_the_console(tmp_path):
    result = run(
        """
        with quiet(folder):
            silent = logging.getLogger("megatron.core")
            silent.propagate = False
            silent.error("a %s error", "library")
            silent.warning("a library warning")
            logging.getLogger("vlmsft.data").warning("ours")
            logging.getLogger("vlmsft.data").info("ours too")
            try:
                1 / 0
            except ZeroDivisionError:
                logging.getLogger("nemo_logger").exception("failed")
        """,
        tmp_path,
    )
    lines = result.stdout.splitlines()
    assert lines[:4] == ["error: a library error", "warning: ours", "ours too", "error: failed"]
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert "a library warning" not in result.stdout


def test_traceback_is_on_the_console_and_in_the_log(tmp_path):
    result = run("with quiet(folder):\n    raise ValueError('broken')", tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "ValueError: broken"
    assert (tmp_path / "nemo.log").read_text().splitlines()[-1] == "ValueError: broken"


def test_error_in_a_thread(tmp_path):
    code = """
        import threading
        with quiet(folder):
            thread = threading.Thread(target=lambda: 1 / 0, name="writer")
            thread.start(); thread.join()
    """
    result = run(code, tmp_path)
    assert "error in thread writer:" in result.stdout and "ZeroDivisionError" in result.stdout


def test_a_crash_shows_its_stack(tmp_path):
    result = run("import ctypes\nwith quiet(folder):\n    ctypes.string_at(0)", tmp_path)
    assert result.returncode == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in result.stdout
    assert "string_at" in result.stdout


def test_a_file_for_each_rank_and_the_rank_before_its_errors(tmp_path):
    code = """
        with quiet(folder):
            print("noise")
            logging.error("lost")
            logging.getLogger("vlmsft").info("rank 0 says this once for all")
    """
    result = run(code, tmp_path, RANK="1")
    assert result.stdout == "[rank 1] error: lost\n"
    assert [path.name for path in tmp_path.iterdir()] == ["nemo-rank1.log"]


def test_a_rank_started_by_another_finds_the_console(tmp_path):
    """Lightning starts ranks as children, which inherit the log as their stdout."""
    child = "import logging; from vlmsft.runtime.logging import *\nwith quiet({!r}, rank=1): logging.error('lost')"
    code = f"""
        import subprocess
        with quiet(folder):
            subprocess.run([sys.executable, "-c", {child.format(str(tmp_path))!r}], check=True)
        assert "VLMSFT_CONSOLE" not in os.environ
    """
    result = run(code, tmp_path)
    assert (result.stdout, result.returncode) == ("[rank 1] error: lost\n", 0)
    assert (tmp_path / "nemo.log").read_text() == ""


def test_a_resumed_run_appends(tmp_path):
    for word in ("first", "second"):
        run(f"with quiet(folder):\n    print({word!r})", tmp_path)
    assert (tmp_path / "nemo.log").read_text() == "first\nsecond\n"


def test_a_closed_terminal_does_not_end_the_run(tmp_path):
    code = (
        "import sys, time\nfrom vlmsft.runtime.logging import *\n"
        f"with quiet({str(tmp_path)!r}):\n"
        "    console().print('ready')\n    time.sleep(1)\n"
        "    for i in range(3): console().print(i)\n    print('finished')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.stdout.close()
    assert process.wait(60) == 0
    assert (tmp_path / "nemo.log").read_text() == "finished\n"


def test_in_a_notebook_or_a_capture(tmp_path, capsys):
    """sys.stdout is then no descriptor."""
    with quiet(tmp_path, rank=0):
        assert is_quiet()
        print("noise")
        console().print("ours")
        with pytest.raises(RuntimeError, match="already active"), quiet(tmp_path):
            pass
    print("after")
    assert capsys.readouterr().out == "ours\nafter\n"
    assert (tmp_path / "nemo.log").read_text() == "noise\n"
    assert not is_quiet()


@pytest.mark.parametrize("by_srun", [False, True])
def test_the_pseudo_terminal_of_srun_is_none(monkeypatch, by_srun):
    """It ends in a log file, where a progress bar's control characters make no sense."""
    from vlmsft.runtime import logging as run_logging

    monkeypatch.setattr(run_logging, "_console", None)
    if by_srun:
        monkeypatch.setenv("SLURM_UNBUFFEREDIO", "1")
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert console().is_terminal is not by_srun
    os.close(ours)


@pytest.mark.parametrize(
    ("environment", "rank"),
    [({}, 0), ({"RANK": "3", "LOCAL_RANK": "1"}, 3), ({"LOCAL_RANK": "1"}, 1), ({"SLURM_PROCID": "5"}, 5)],
)
def test_rank_from_environment(monkeypatch, environment, rank):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert rank_from_environment() == rank
    assert log_path("x", rank).name == ("nemo.log" if rank == 0 else f"nemo-rank{rank}.log")


@pytest.mark.nemo
def test_real_nemo_is_quiet(tmp_path):
    """Its logger is a singleton with handlers of its own, made on import."""
    code = """
        with quiet(folder):
            import nemo.lightning
            from nemo.utils import logging as nemo_logging
            nemo_logging.info("an info of NeMo")
            nemo_logging.warning("a warning of NeMo")
            nemo_logging.error("an error of NeMo")
            import lightning.pytorch as pl
            pl.Trainer(accelerator="cpu", logger=False, max_steps=1, enable_progress_bar=False)
        """
    result = run(code, tmp_path)
    assert (result.stdout, result.stderr) == ("error: an error of NeMo\n", "")
    log = (tmp_path / "nemo.log").read_text()
    for text in ("an info of NeMo", "a warning of NeMo", "an error of NeMo", "GPU available: False"):
        assert text in log
