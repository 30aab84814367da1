"""Virtual environments for programs that can't share vlmsft's: vLLM, llm-jp-eval-mm."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from vlmsft.errors import Problem, UserError
from vlmsft.runtime.logging import console


@dataclass(frozen=True)
class Environment:
    """A virtual environment that vlmsft makes and owns.

    folder: holds venv/, packages.json (what is or was to be installed, written first) and `complete` (written last)
    python: a version, or the path of an interpreter
    packages: requirements and options as `pip install` takes them
    key: the config key that names the folder, for messages
    """

    folder: Path
    python: str
    packages: tuple[str, ...]
    key: str

    def program(self, name: str) -> Path:
        return self.folder / "venv" / "bin" / name

    @property
    def is_complete(self) -> bool:
        return (self.folder / "complete").is_file() and self._recorded() == self._wanted()

    def problems(self) -> list[Problem]:
        """A folder that is not ours is left alone."""
        is_ours = not self.folder.exists() or (self.folder / "packages.json").is_file()
        if is_ours or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return []
        found = f"{self.folder}, which vlmsft didn't make"
        return [Problem(self.key, found, "a folder that doesn't exist yet, or an environment of vlmsft's")]

    def steps(self, uv: str) -> list[list[str]]:
        """The commands that make it.

        uv takes constraints from a pyproject.toml of the working directory and above, and vlmsft's own asks for another
        torch: hence --directory.
        """
        venv, start = str(self.folder / "venv"), [uv, "--directory", str(self.folder)]
        install = [*start, "pip", "install", "--python", f"{venv}/bin/python", *self.packages]
        return [[*start, "venv", "--clear", "--python", self.python, venv], install]

    def make(self) -> None:
        """Makes it anew; a second process waits for the first. Raises UserError where uv is missing or fails."""
        uv = find_uv()
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "lock"):
            if self.is_complete:
                return
            (self.folder / "complete").unlink(missing_ok=True)
            (self.folder / "packages.json").write_text(self._wanted())
            for step in self.steps(uv):
                console().print(shlex.join(step), style="dim", markup=False, highlight=False, soft_wrap=True)
                code = subprocess.run(step, check=False).returncode
                if code:
                    found = f"{shlex.join(step[:4])} ended with {code}"
                    expected = "a network, room on the disk, and a Python that uv finds or downloads"
                    remedy = f"uv's message stands above; `python` beside {self.key} may be an interpreter's path"
                    raise UserError(Problem(self.key, found, expected, remedy))
            (self.folder / "complete").touch()

    def _wanted(self) -> str:
        return json.dumps({"python": self.python, "packages": self.packages}, indent=1)

    def _recorded(self) -> str:
        try:
            return (self.folder / "packages.json").read_text()
        except OSError:
            return ""


def find_uv() -> str:
    """uv beside this Python, or on the path. Raises UserError where it is missing."""
    beside = Path(sys.executable).parent / "uv"
    found = str(beside) if beside.is_file() else shutil.which("uv")
    if found is None:
        expected = "uv to make the environment of another program"
        raise UserError(Problem("uv", "none on this machine", expected, "pip install uv"))
    return found


def variables_for_another_python() -> dict[str, str]:
    """This process's variables, less those that lead into its own Python."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in ours}
