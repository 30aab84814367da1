"""How far the copying of a model is: a bar in a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from vlmsft.checkpoints.aside import readable_bytes
from vlmsft.runtime.logging import console, is_quiet

LINE_SECONDS = 30.0


@contextmanager
def byte_progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows bytes done of `total`; what it yields is called with the bytes of each part."""
    out = console()
    if not out.is_terminal:
        yield _lines(description, total)
        return
    catch = not is_quiet()  # while NeMo's output goes to its log, rich must not bring it back
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=40), DownloadColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=out, redirect_stdout=catch, redirect_stderr=catch
    ) as progress:
        task = progress.add_task(description, total=total)
        yield lambda num_bytes: progress.advance(task, num_bytes)


def _lines(description: str, total: int) -> Callable[[int], None]:
    done, said = 0, time.monotonic()

    def advance(num_bytes: int) -> None:
        nonlocal done, said
        done += num_bytes
        if time.monotonic() - said >= LINE_SECONDS:
            said = time.monotonic()
            console().print(f"{description}: {readable_bytes(done)} of {readable_bytes(total)}", highlight=False)

    return advance
