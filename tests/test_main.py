"""`vlmsft COMMAND` and `python -m vlmsft COMMAND`."""

import functools
import os
import subprocess
import sys

import pytest

from vlmsft.__main__ import COMMANDS, main
from vlmsft.config_files import root


@pytest.fixture
def call(run_main):
    return functools.partial(run_main, main)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(call, flag):
    code, out, _ = call(flag)
    assert code == 0
    for name, purpose in COMMANDS.items():
        assert name in out and purpose in out


def test_without_a_command(call):
    code, out, error = call()
    assert code == 2 and "usage" in out + error


def test_unknown_command_names_the_nearest(call):
    code, _, message = call("trian", "experiment=demo")
    assert code == 2 and "'trian'. Did you mean 'train'?" in message and "usage" in message


@pytest.mark.parametrize("command", COMMANDS)
def test_same_as_the_module(command, tmp_path):
    """--cfg job composes and prints, and is what shows that the arguments arrive."""
    environment = {**os.environ, "PYTHONPATH": str(root())}

    def output(*start):
        needed = ["dataset=sample"] if command == "prepare" else []
        arguments = [*start, *needed, "+arrived=7", "--cfg", "job", "--package", "arrived"]
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
        ).stdout

    assert output("-m", "vlmsft", command) == output("-m", f"vlmsft.{command}") == "7\n"
