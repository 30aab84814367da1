"""Files that are whole or not there: written aside and renamed, and what a full disk says."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from vlmsft.errors import Problem, UserError

PARTIAL_SUFFIX = ".partial"


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears under `path` once it is whole; an error leaves nothing behind."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def full_disk_named(path: Path, finished: Callable[[], str]) -> Iterator[None]:
    """Turns "no space left" into a UserError.

    finished: says, when it happens, what was finished before and stays
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        remedy = (
            "Make room, or name another folder with output=, and start the same command again: it goes on from there"
        )
        raise UserError(
            Problem(str(path), "no space left on the disk", "room for what is to be written", remedy), finished()
        ) from None


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Hash of a file's bytes; progress is called with the bytes read since the last call."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            if progress:
                progress(len(block))
    return digest.hexdigest()
