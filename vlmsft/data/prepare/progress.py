"""How far a step is: a bar in a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlmsft.runtime.logging import console

LINE_SECONDS = 30.0


@contextmanager
def step(text: str, total: int | None, *, is_bytes: bool = False) -> Iterator[Callable[..., None]]:
    """Yields `advance(amount, total=None)`. total: in pieces or bytes; None where it isn't known (yet)"""
    if not console().is_terminal:
        yield _Lines(text, total, is_bytes)
        return
    count = DownloadColumn() if is_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), count, TimeRemainingColumn())
    with Progress(*columns, console=console()) as bar:
        task = bar.add_task(text, total=total)
        yield lambda amount, total=total: bar.update(task, advance=amount, total=total)


class _Lines:
    def __init__(self, text: str, total: int | None, is_bytes: bool):
        self.text, self.total, self.is_bytes = text, total, is_bytes
        self.done = 0
        self._last = time.monotonic()
        say(text if total is None else f"{text}: {self._amount(total)}")

    def __call__(self, amount: int, total: int | None = None) -> None:
        self.done += amount
        self.total = total or self.total
        if time.monotonic() - self._last >= LINE_SECONDS:
            self._last = time.monotonic()
            of = "" if self.total is None else f" of {self._amount(self.total)}"
            say(f"  {self._amount(self.done)}{of}")

    def _amount(self, number: int) -> str:
        return f"{number / 2**20:.1f} MiB" if self.is_bytes else str(number)


def say(text: str) -> None:
    console().print(text, markup=False, highlight=False)
