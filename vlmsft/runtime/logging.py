"""The console belongs to the user: NeMo's, Megatron's and their libraries' messages go to a file per rank.

`quiet(run_dir)` turns file descriptors 1 and 2 to the run folder's nemo.log (nemo-rank1.log for rank 1, ...). That is
below Python, so it catches all of them at once, whenever their handlers were made: NeMo's logger singleton, Lightning's
and Transformers' handlers, warnings, `print`, and what C++ libraries (NCCL, TransformerEngine) and child processes
write. What still reaches the console: our own output (`console()`), log records of level ERROR and above from any
library, records of `vlmsft.*` loggers, tracebacks, and the stack of a crash (segmentation fault, abort).
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import logging
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from rich.console import Console

# A rank that Lightning starts as a child inherits descriptors 1 and 2, which are the parent's log by then.
CONSOLE_PATH = "VLMSFT_CONSOLE"

_real_stdout: TextIO | None = None
_console: Console | None = None


def is_quiet() -> bool:
    """Whether `quiet` is active: sys.stdout is then the log file."""
    return _real_stdout is not None


def console() -> Console:
    """The user's console, also while `quiet` is active; wraps no lines where stdout is no terminal.

    One object per stream: rich can print above a live progress bar only through the bar's own console.
    """
    global _console
    file = _real_stdout or sys.stdout
    if _console is None or _console.file is not file:
        if _is_terminal(file):
            _console = Console(file=file)
        else:
            _console = Console(file=file, width=160, soft_wrap=True, force_terminal=False)
    return _console


def _is_terminal(file: TextIO) -> bool:
    # with this variable, which NeMo-Run's batch scripts set, srun gives its tasks a pseudo terminal that ends in a file
    return file.isatty() and "SLURM_UNBUFFEREDIO" not in os.environ


def rank_from_environment() -> int:
    """The global rank before torch.distributed starts; 0 for a lone process. The same variables as Lightning's."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def log_path(run_dir: str | os.PathLike[str], rank: int) -> Path:
    return Path(run_dir) / ("nemo.log" if rank == 0 else f"nemo-rank{rank}.log")


@contextlib.contextmanager
def quiet(run_dir: str | os.PathLike[str], rank: int | None = None) -> Iterator[Path]:
    """Send all output but our own, errors and tracebacks to the run folder's log; yields the log's path.

    rank: the global rank; from the environment where None. The log is appended to, so a resumed run keeps both parts.
    """
    global _real_stdout
    if _real_stdout is not None:
        raise RuntimeError("quiet() is already active")
    rank = rank_from_environment() if rank is None else rank
    path = log_path(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as undo:
        log = undo.enter_context(open(path, "a", encoding="utf-8", buffering=1))
        _real_stdout = _console_stream(undo)
        undo.callback(_forget_console)
        _redirect_descriptors(log, undo)
        _redirect_python_streams(log, undo)
        _show_errors(_real_stdout, rank, undo)
        try:
            yield path
        except BaseException:
            log.write(traceback.format_exc())  # the interpreter prints it to the console too, once this is undone
            raise


def _forget_console() -> None:
    global _real_stdout, _console
    _real_stdout = _console = None


class _Terminal(io.TextIOWrapper):
    """The console as a stream whose reader may go away: a closed terminal must not end a run."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
            super().flush()
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def _console_stream(undo: contextlib.ExitStack) -> TextIO:
    inherited = os.environ.get(CONSOLE_PATH)
    if inherited is not None:
        with contextlib.suppress(OSError):
            return undo.enter_context(_Terminal(open(inherited, "ab", buffering=0), encoding="utf-8"))
    if not _is_descriptor(sys.stdout, 1):
        return sys.stdout  # a notebook, or a test that captures
    stream = undo.enter_context(_Terminal(os.fdopen(os.dup(1), "wb", buffering=0), encoding="utf-8"))
    os.environ[CONSOLE_PATH] = f"/proc/{os.getpid()}/fd/{stream.fileno()}"
    undo.callback(os.environ.pop, CONSOLE_PATH, None)
    return stream


def _is_descriptor(stream: TextIO, descriptor: int) -> bool:
    try:
        return stream.fileno() == descriptor
    except (OSError, ValueError, AttributeError):
        return False


def _redirect_descriptors(log: TextIO, undo: contextlib.ExitStack) -> None:
    for descriptor in (1, 2):
        _flush()
        saved = os.dup(descriptor)
        os.dup2(log.fileno(), descriptor)
        undo.callback(os.close, saved)
        undo.callback(os.dup2, saved, descriptor)
    undo.callback(_flush)


def _redirect_python_streams(log: TextIO, undo: contextlib.ExitStack) -> None:
    """Python's own buffers: line by line, so that the log is in order; streams that aren't descriptors are replaced."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if _is_descriptor(stream, descriptor):
            undo.callback(stream.reconfigure, line_buffering=stream.line_buffering)
            stream.reconfigure(line_buffering=True)
        else:
            undo.callback(setattr, sys, name, stream)
            setattr(sys, name, log)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _show_errors(stream: TextIO, rank: int, undo: contextlib.ExitStack) -> None:
    prefix = f"[rank {rank}] " if rank else ""

    # Through the record factory, since NeMo's, Megatron's, Lightning's and Transformers' loggers don't propagate
    # and new ones may come at any time.
    make_record = logging.getLogRecordFactory()

    def make_and_show(*args, **kwargs) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        if record.levelno >= _console_level(record.name, rank):
            label = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
            _print(stream, f"{prefix}{label}{_message(record)}")
        return record

    ours = logging.getLogger("vlmsft")
    if ours.level == logging.NOTSET:
        ours.setLevel(logging.INFO)  # else the root's WARNING would hold
        undo.callback(ours.setLevel, logging.NOTSET)
    logging.setLogRecordFactory(make_and_show)
    undo.callback(logging.setLogRecordFactory, make_record)

    thread_hook = threading.excepthook

    def show_thread_error(error: threading.ExceptHookArgs) -> None:
        thread_hook(error)
        lines = traceback.format_exception(error.exc_type, error.exc_value, error.exc_traceback)
        name = error.thread.name if error.thread else "unknown"
        _print(stream, f"{prefix}error in thread {name}:\n{''.join(lines)}")

    threading.excepthook = show_thread_error
    undo.callback(setattr, threading, "excepthook", thread_hook)

    if not faulthandler.is_enabled() and _has_descriptor(stream):
        faulthandler.enable(file=stream)
        undo.callback(faulthandler.disable)


def _console_level(name: str, rank: int) -> int:
    if name.partition(".")[0] != "vlmsft":
        return logging.ERROR
    return logging.INFO if rank == 0 else logging.WARNING


def _message(record: logging.LogRecord) -> str:
    text = record.getMessage()
    if record.exc_info and record.exc_info[0] is not None:
        text = f"{text}\n{''.join(traceback.format_exception(*record.exc_info))}"
    return text


def _has_descriptor(stream: TextIO) -> bool:
    try:
        return stream.fileno() >= 0
    except (OSError, ValueError, AttributeError):
        return False


def _print(stream: TextIO, text: str) -> None:
    stream.write(text.rstrip("\n") + "\n")
    stream.flush()
