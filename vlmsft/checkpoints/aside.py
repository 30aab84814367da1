"""A folder that appears whole or not at all: written under another name beside its place, renamed when it is done."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmsft.errors import Problem, UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
SPARE_BYTES = 16 * 1024**2
"""Asked for on top of what is needed: the file system's own bookkeeping, small files beside the weights."""


@contextmanager
def written_aside(target: str | Path, needed_bytes: int = 0, key: str = "output") -> Iterator[Path]:
    """A new, empty folder beside `target`, which gets target's name when the block ends without an exception.

    needed_bytes: what the block is going to write, compared with the free space beforehand
    key: the config key that gave `target`, for messages

    The folder's name is this process's own, so that two writers don't meet; it is removed when the block fails or is
    interrupted. Raises UserError for a target that exists (whatever it is, also when it came into being meanwhile), a
    parent that can't be written to and a file system that is or gets full.
    """
    target = Path(os.path.abspath(target))
    refuse_existing(target, key)
    parent = _make_parent(target, key)
    check_space(parent, needed_bytes, key)
    folder = parent / f".{target.name}.{os.getpid()}-{secrets.token_hex(3)}.unfinished"
    try:
        folder.mkdir()
        yield folder
        _sync(folder)
        _rename(folder, target, key)
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise UserError(_full(parent, needed_bytes, key), "nothing was left behind") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # it is gone from this name where all went well


def refuse_existing(target: str | Path, key: str = "output") -> None:
    """Raises UserError if there is anything at `target`: nothing is ever overwritten."""
    if os.path.lexists(target):
        kind = "a folder" if os.path.isdir(target) else "a file"
        remedy = "Choose another name, or remove it yourself"
        raise UserError(Problem(key, f"{kind} at {target}", "a path where nothing is yet", remedy))


def check_space(folder: Path, needed_bytes: int, key: str = "output") -> None:
    """Raises UserError if the file system of the existing `folder` has less room than needed_bytes."""
    if needed_bytes and shutil.disk_usage(folder).free < needed_bytes + SPARE_BYTES:
        raise UserError(_full(folder, needed_bytes, key))


def is_disk_full(error: BaseException | None) -> bool:
    """Whether `error`, or what caused it, says that a file system is full, a quota used up or a file too large for it.

    Libraries written in Rust and C++ hand on the system's message, not its number.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        number = re.search(r"os error (\d+)", str(error))
        if "No space left on device" in str(error) or (number and int(number[1]) in _FULL):
            return True
        error = error.__cause__
    return False


def mount_point(path: Path) -> Path:
    """The root of the file system that the existing `path` lies on."""
    path = path.resolve()
    while not os.path.ismount(path):
        path = path.parent
    return path


def readable_bytes(number: float) -> str:
    """'21.3 GB'; powers of 1000, as disks are sold and shards are counted."""
    for unit in ("bytes", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def _full(folder: Path, needed_bytes: int, key: str) -> Problem:
    free = readable_bytes(shutil.disk_usage(folder).free)
    needed = f"{readable_bytes(needed_bytes)} ({needed_bytes} bytes)" if needed_bytes else "more room"
    remedy = "Make room there, or write to another file system"
    return Problem(key, f"{free} free on the file system at {mount_point(folder)}", needed, remedy)


def _make_parent(target: Path, key: str) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(Problem(key, f"{target.parent}: {error.strerror}", "a folder to write into")) from None
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise UserError(Problem(key, f"{target.parent}, which is not yours to write to", "a folder to write into"))
    return target.parent


def _sync(folder: Path) -> None:
    """Hand all of it to the disk: a rename may be on the disk before the data of what it renames."""
    for root, _, files in os.walk(folder):
        for path in (*(os.path.join(root, file) for file in files), root):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _rename(folder: Path, target: Path, key: str) -> None:
    refuse_existing(target, key)
    try:
        os.rename(folder, target)
    except (FileExistsError, NotADirectoryError):
        refuse_existing(target, key)
        raise
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            refuse_existing(target, key)
        raise
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
