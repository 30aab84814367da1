"""The images that records name, out of a zip or tar archive.

Members are only ever read: a file's name is the record's, never the archive's, so that no member can be written outside
the image folder, however it is called.
"""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from vlmsft.data.prepare.files import written_aside
from vlmsft.errors import Problem, UserError

BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError, RuntimeError)
"""What the standard library raises for a member that is damaged, encrypted, or packed in a way it can't read."""


class Member(NamedTuple):
    """name: in the archive; size: bytes of its content; read: its content, checked where the archive has a checksum"""

    name: str
    size: int
    read: Callable[[], bytes]


def unpack(
    archive: Path, names: Iterable[str], folder: Path, progress: Callable[[int], None]
) -> tuple[dict[str, Problem], Problem | None]:
    """Writes the images called `names` into `folder`, each under its record's name and whole or not at all.

    A member and a name match where one is the end of the other, folder by folder: coco/train2017/1.jpg takes
    train2017/1.jpg, and 1.jpg takes train2017/1.jpg, if no other member matches too.
    progress: called with 1 for each image
    Returns what is wrong with single images, by name, and with the archive as a whole (cut off). Raises UserError where
    the archive can't be opened at all.
    """
    problems: dict[str, Problem] = {}
    with ExitStack() as stack:
        members, cut = _open(archive, stack)
        matches = match([member.name for member in members], names)
        for name, found in matches.items():
            if len(found) != 1:
                problems[name] = _no_member(archive, name, [members[number].name for number in found], cut)
        for name, number in sorted(((n, f[0]) for n, f in matches.items() if len(f) == 1), key=lambda pair: pair[1]):
            if problem := _write(archive, members[number], folder / name):
                problems[name] = problem
            progress(1)
    return problems, cut


def _write(archive: Path, member: Member, target: Path) -> Problem | None:
    try:
        data = member.read()
    except BROKEN as error:
        data, reason = b"", f"{type(error).__name__}: {error}"
    else:
        reason = f"{len(data)} of {member.size} bytes"
        if len(data) == member.size:
            with written_aside(target) as file:
                file.write(data)
            return None
    remedy = "Get the archive again; what is unpacked stays"
    return Problem(f"{archive}: {member.name}", f"a damaged member ({reason})", "a whole image", remedy)


def _no_member(archive: Path, name: str, found: list[str], cut: Problem | None) -> Problem:
    if found:
        return Problem(str(archive), f"{len(found)} members for image {name}: {', '.join(found[:3])}", "one")
    return Problem(str(archive), f"no member for image {name}", "one", "The archive is cut off" if cut else "")


def match(members: list[str], names: Iterable[str]) -> dict[str, list[int]]:
    """For each name the numbers of the members that may be it: the one of the same full name, or else all of which one
    is the end of the other."""
    by_file: dict[str, list[int]] = {}
    parts = [PurePosixPath(member).parts for member in members]
    for number, path in enumerate(parts):
        if path and ".." not in path:
            by_file.setdefault(path[-1], []).append(number)
    matches = {}
    for name in names:
        wanted = PurePosixPath(name).parts
        candidates = by_file.get(wanted[-1], [])
        same = [number for number in candidates if parts[number] == wanted]
        ends = [number for number in candidates if _is_end(parts[number], wanted)]
        matches[name] = same[-1:] or ends  # of two members of one name the later one counts, as when unpacking
    return matches


def _is_end(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    length = min(len(one), len(other))
    return one[-length:] == other[-length:]


def _open(archive: Path, stack: ExitStack) -> tuple[list[Member], Problem | None]:
    with open(archive, "rb") as file:
        is_zip = file.read(2) == b"PK"
    try:
        if is_zip:
            return _zip_members(stack.enter_context(zipfile.ZipFile(archive))), None
        tar = stack.enter_context(tarfile.TarFile.open(archive, "r:*"))
    except (*BROKEN, OSError) as error:
        found = f"what can't be opened as {'zip' if is_zip else 'tar'} ({type(error).__name__}: {error})"
        remedy = "A zip that is cut off lacks its table of contents, which stands at the end: get it again"
        raise UserError(
            Problem(str(archive), found, "a whole zip, tar or compressed tar", remedy if is_zip else "")
        ) from None
    return _tar_members(archive, tar)


def _zip_members(file: zipfile.ZipFile) -> list[Member]:
    def reader(info: zipfile.ZipInfo) -> Callable[[], bytes]:
        return lambda: file.read(info)

    return [Member(info.filename, info.file_size, reader(info)) for info in file.infolist() if not info.is_dir()]


def _tar_members(archive: Path, tar: tarfile.TarFile) -> tuple[list[Member], Problem | None]:
    def reader(info: tarfile.TarInfo) -> Callable[[], bytes]:
        def read() -> bytes:
            content = tar.extractfile(info)
            assert content is not None  # files only
            return content.read()

        return read

    members: list[Member] = []
    reason = None
    try:
        for info in tar:
            if info.isreg():
                members.append(Member(info.name, info.size, reader(info)))
        reason = None if _has_end_mark(tar) else "no end mark"
    except (*BROKEN, OSError) as error:
        reason = f"{type(error).__name__}: {error}"
    if reason is None:
        return members, None
    last = members[-1].name if members else "nothing"
    remedy = "Get it again; what comes before is unpacked and stays"
    return members, Problem(str(archive), f"a tar that is cut off after {last} ({reason})", "a whole one", remedy)


def _has_end_mark(tar: tarfile.TarFile) -> bool:
    """Whether a zero block follows the last member: tarfile takes any end for one."""
    file = tar.fileobj
    assert file is not None
    file.seek(tar.offset)
    return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
