"""How far a number of answers or calls is: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from vlmsft.runtime.logging import console

LINE_SECONDS = 30.0
"""Between lines where stdout is no terminal."""


class Bar:
    """label: what is counted; counts given to `advance` are shown where they are not zero"""

    def __init__(self, label: str, total: int):
        self._label, self._total, self._done = label, total, 0
        self._last_line = time.monotonic()
        self._progress: Progress | None = None
        if console().is_terminal and total:
            columns = (
                SpinnerColumn(),
                TextColumn(label),
                BarColumn(bar_width=40),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[details]}"),
            )
            self._progress = Progress(*columns, console=console())
            self._task = self._progress.add_task("", total=total, details="")

    def __enter__(self) -> Bar:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress:
            self._progress.stop()

    def advance(self, num: int = 1, **counts: int) -> None:
        """`num` more are done."""
        self._done += num
        details = "  ".join(f"{number} {what}" for what, number in counts.items() if number)
        now = time.monotonic()
        if self._progress:
            self._progress.update(self._task, advance=num, details=details)
        elif now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            text = f"{self._label}: {self._done}/{self._total}  {details}".rstrip()
            console().print(text, markup=False, highlight=False)
