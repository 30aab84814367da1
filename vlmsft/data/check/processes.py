"""Readers in processes of their own, a few tasks ahead of what is asked for."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice

from vlmsft.data.check.parts import Part, Reader, Settings, Task

PRELOAD = ["vlmsft.data.check.parts", "transformers.models.mllama.processing_mllama"]
"""Takes seconds to import: done once, in the process that the workers are forked from."""

_reader: Reader | None = None
"""Of a worker process."""


class Readers:
    """num_workers: 1 reads in this process"""

    def __init__(self, settings: Settings, num_workers: int):
        self.settings, self.num_workers = settings, num_workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Readers:
        if self.num_workers > 1:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(PRELOAD)
            self._pool = ProcessPoolExecutor(self.num_workers, context, _start, (self.settings,))
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def read(self, tasks: Iterator[tuple[int, Task]]) -> Iterator[tuple[int, Part]]:
        """Each task's Part as it gets done, with the number that came with the task."""
        if self._pool is None:
            reader = Reader(self.settings)
            yield from ((number, reader.read(task)) for number, task in tasks)
            return
        running: dict[Future[Part], int] = {}
        while True:
            for number, task in islice(tasks, 3 * self.num_workers - len(running)):
                running[self._pool.submit(_work, task)] = number
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


def _start(settings: Settings) -> None:
    """Ctrl-C reaches the whole process group: the main process alone answers it. When that is killed, so are these."""
    global _reader
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _reader = Reader(settings)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _work(task: Task) -> Part:
    assert _reader is not None
    return _reader.read(task)
