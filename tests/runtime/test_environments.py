"""An environment of another program is made once, anew when its packages change or its making failed."""

from __future__ import annotations

import subprocess

import pytest

from vlmsft.errors import UserError
from vlmsft.runtime import environments
from vlmsft.runtime.environments import Environment, find_uv, variables_for_another_python


@pytest.fixture
def uv(tmp_path, monkeypatch):
    """A uv that notes what it is asked; it fails where the file `fail` says so."""
    program = tmp_path / "uv"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n[ -e {tmp_path}/fail ] && [ "$3" = pip ] && exit 2\nexit 0\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(environments, "find_uv", lambda: str(program))
    return lambda: (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []


def test_made_once_and_anew_when_packages_change(tmp_path, uv):
    first = Environment(tmp_path / "e", "3.12", ("vllm==0.10.2",), "engine.environment")
    assert not first.is_complete
    first.make()
    assert first.is_complete and len(uv()) == 2
    assert uv()[1].endswith(f"pip install --python {tmp_path}/e/venv/bin/python vllm==0.10.2")
    first.make()
    assert len(uv()) == 2
    other = Environment(tmp_path / "e", "3.12", ("vllm==0.10.1",), "engine.environment")
    assert not other.is_complete and other.problems() == []
    other.make()
    assert other.is_complete and not first.is_complete and len(uv()) == 4


def test_one_that_failed_is_made_anew(tmp_path, uv):
    environment = Environment(tmp_path / "e", "3.12", ("vllm==0.10.2",), "engine.environment")
    (tmp_path / "fail").touch()
    with pytest.raises(UserError, match="ended with 2"):
        environment.make()
    assert not environment.is_complete and environment.problems() == []
    (tmp_path / "fail").unlink()
    environment.make()
    assert environment.is_complete and len(uv()) == 4


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    environment = Environment(folder, "3.12", (), "engine.environment")
    assert environment.problems() == [], "an empty folder will do"
    (folder / "pyvenv.cfg").touch()
    assert "vlmsft didn't make" in str(environment.problems()[0])


def test_constraints_of_the_working_directory_do_not_count(tmp_path, monkeypatch):
    """vlmsft's own pyproject.toml asks for another torch, and uv reads it where it is started."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text('[tool.uv]\nconstraint-dependencies = ["filelock==99"]\n')
    monkeypatch.chdir(project)
    environment = Environment(tmp_path / "e", "3.12", ("filelock>=3",), "engine.environment")
    environment.folder.mkdir()
    *_, install = environment.steps(find_uv())
    compile_ = [*install[:3], "pip", "compile", "--quiet", "-"]
    done = subprocess.run(compile_, input="filelock>=3", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_variables_of_our_python_stay_here(monkeypatch):
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "ANOTHER"):
        monkeypatch.setenv(name, "x")
    variables = variables_for_another_python()
    assert "ANOTHER" in variables and not {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"} & set(variables)
