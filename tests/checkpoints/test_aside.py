"""A folder appears whole or not at all, and nothing that exists is touched."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal

import pytest
from safetensors import SafetensorError

from vlmsft.checkpoints.aside import check_space, is_disk_full, readable_bytes, written_aside
from vlmsft.errors import UserError


def test_the_folder_gets_its_name_at_the_end(tmp_path):
    target = tmp_path / "deep" / "target"
    with written_aside(target) as folder:
        assert folder.parent == target.parent and not target.exists()
        (folder / "file").write_text("content")
    assert (target / "file").read_text() == "content"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path, failure):
    with pytest.raises(failure), written_aside(tmp_path / "target") as folder:
        (folder / "file").write_text("half")
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), written_aside(tmp_path / "target") as folder:
        (folder / "file").write_text("half")
        os.kill(os.getpid(), signal.SIGINT)
        (folder / "file").write_text("whole")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link"])
def test_what_exists_is_refused_and_stays(tmp_path, kind):
    target = tmp_path / "target"
    make = {
        "folder": lambda: (target.mkdir(), (target / "mine").touch()),
        "empty folder": target.mkdir,
        "file": target.touch,
        "dangling link": lambda: target.symlink_to("nowhere"),
    }
    make[kind]()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match="expected a path where nothing is yet"), written_aside(target):
        pytest.fail("the block was entered")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_target_that_comes_meanwhile_stays(tmp_path):
    target = tmp_path / "target"
    with pytest.raises(UserError, match="a folder at"), written_aside(target):
        target.mkdir()
        (target / "other's").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "other's"]


def test_too_little_space_is_said_beforehand_with_numbers(tmp_path):
    with pytest.raises(UserError) as error, written_aside(tmp_path / "target", needed_bytes=10**18):
        pytest.fail("the block was entered")
    assert re.search(r"free on the file system at /\S*, expected 1000000000.0 GB \(10{18} bytes\)", str(error.value))
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_gets_full(tmp_path):
    """A real refusal of the kernel: no file of this process may grow beyond 100 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="free on the file system"), written_aside(tmp_path / "target", 1) as folder:
            (folder / "file").write_bytes(bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_dev_full_is_full():
    with pytest.raises(OSError) as error, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    assert is_disk_full(error.value)


def test_messages_of_libraries_without_an_error_number():
    assert is_disk_full(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert is_disk_full(_caused_by(OSError(errno.EDQUOT, "Quota exceeded")))
    assert not is_disk_full(RuntimeError("no such file (os error 2)"))


def _caused_by(cause: Exception) -> Exception:
    error = RuntimeError("writing failed")
    error.__cause__ = cause
    return error


def test_enough_space_passes(tmp_path):
    check_space(tmp_path, 1)


def test_bytes_for_people():
    assert [readable_bytes(n) for n in (12, 3400, 21_300_000_000)] == ["12 bytes", "3.4 kB", "21.3 GB"]
