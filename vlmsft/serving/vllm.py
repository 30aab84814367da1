"""engine=vllm: vLLM's own server, started in an environment of its own. vlmsft's environment and vLLM's can't be one:
vLLM 0.10.2, the last release with this model, asks for torch 2.8 and another numpy."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from vlmsft.errors import Problem, UserError
from vlmsft.runtime.logging import console
from vlmsft.serving.endpoint import Endpoint, Rule, number_problems

RULES = {"tensor_parallel_size": Rule(1)}
NEEDED_FILES = ("config.json", "preprocessor_config.json", "tokenizer_config.json")


def serve(problems: list[Problem], make_endpoint: Callable[[], Endpoint], **engine: Any) -> None:
    """Makes the environment if need be and becomes vLLM's server (exec): signals go to it.

    problems: of the endpoint's keys; make_endpoint: to be called where there are none
    engine: the keys of conf/engine/vllm.yaml
    """
    problems = problems + number_problems(engine, RULES, "engine.")
    if problems:
        raise UserError(problems)
    endpoint = make_endpoint()
    environment = Environment(
        Path(engine["environment"]).expanduser().absolute(), engine["python"], tuple(engine["packages"])
    )
    problems = model_problems(endpoint.model) + environment.problems()
    if problems:
        raise UserError(problems)
    arguments = serve_command(endpoint, environment.program, engine)
    if endpoint.dryrun:
        show(environment, arguments)
        return
    if not environment.is_complete:
        environment.make()
    console().print(shlex.join(arguments), markup=False, highlight=False, soft_wrap=True)
    os.execve(environment.program, arguments, server_environment(endpoint))


def show(environment: Environment, arguments: Sequence[str]) -> None:
    """What would be done, as one could type it."""
    state = "is there" if environment.is_complete else "would be made by"
    lines = [f"environment {environment.folder} {state}"]
    if not environment.is_complete:
        lines += [f"  {shlex.join(step)}" for step in environment.steps("uv")]
    lines += ["command", f"  {shlex.join(arguments)}"]
    for line in lines:
        console().print(line, markup=False, highlight=False, soft_wrap=True)


def serve_command(endpoint: Endpoint, program: Path, engine: dict[str, Any]) -> list[str]:
    """vllm serve with the tutorial's flags (--tensor-parallel-size, --max-num-seqs) and what this model needs.

    The API key is not among them: everybody on the machine can read a command.
    """
    options: dict[str, Any] = {
        "--host": endpoint.host,
        "--port": endpoint.port,
        "--served-model-name": endpoint.served_model_name,
        "--tensor-parallel-size": engine["tensor_parallel_size"],
        "--max-num-seqs": endpoint.max_num_seqs,
        "--max-model-len": endpoint.max_model_len,
        "--dtype": engine["dtype"],
        "--limit-mm-per-prompt": json.dumps({"image": endpoint.max_images}),
        "--generation-config": engine["generation_config"],
        "--allowed-local-media-path": endpoint.image_root,
    }
    words = [str(word) for pair in options.items() if pair[1] is not None for word in pair]
    eager = ["--enforce-eager"] if engine["enforce_eager"] else []
    extra = [str(argument) for argument in engine["extra_arguments"]]
    return [str(program), "serve", str(Path(endpoint.model).expanduser()), *words, *eager, *extra]


def server_environment(endpoint: Endpoint) -> dict[str, str]:
    """This process's variables, less those that lead into its Python, and the API key under vLLM's name."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    variables = {name: value for name, value in os.environ.items() if name not in ours}
    return variables if endpoint.api_key is None else {**variables, "VLLM_API_KEY": endpoint.api_key}


def model_problems(model: str) -> list[Problem]:
    """vLLM reads Hugging Face folders only."""
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        output = f"exports/{folder.name}"
        export = f"python -m vlmsft.export_ckpt checkpoint={model} output={output}"
        remedy = f"Of a vlmsft checkpoint or run make one: {export}, then checkpoint={output}"
        found = f"{model}, which is no Hugging Face folder"
        expected = "a folder with config.json, as export_ckpt writes it, for engine=vllm"
        return [Problem("checkpoint", found, expected, remedy)]
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind != "mllama":
        return [Problem("checkpoint", f"{model} with model_type {kind!r} in its config.json", "'mllama'")]
    missing = [name for name in NEEDED_FILES if not (folder / name).is_file()]
    if missing:
        remedy = "export_ckpt writes all of them; for another folder copy them from the base model's"
        return [Problem("checkpoint", f"{model} without {', '.join(missing)}", "the processor's files too", remedy)]
    return []


@dataclass(frozen=True)
class Environment:
    """A virtual environment that vlmsft makes and owns.

    folder: holds venv/, packages.json (what is or was to be installed, written first) and `complete` (written last)
    python: version; packages: requirements as pip has them
    """

    folder: Path
    python: str
    packages: tuple[str, ...]

    @property
    def program(self) -> Path:
        return self.folder / "venv" / "bin" / "vllm"

    @property
    def is_complete(self) -> bool:
        return (self.folder / "complete").is_file() and self._recorded() == self._wanted()

    def problems(self) -> list[Problem]:
        """A folder that is not ours is left alone."""
        is_ours = not self.folder.exists() or (self.folder / "packages.json").is_file()
        if is_ours or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return []
        found = f"{self.folder}, which vlmsft didn't make"
        return [Problem("engine.environment", found, "a folder that doesn't exist yet, or an environment of vlmsft's")]

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
                    found, remedy = f"{shlex.join(step[:3])} ended with {code}", "uv's message stands above"
                    raise UserError(Problem("engine.environment", found, "a network and room on the disk", remedy))
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
        raise UserError(Problem("engine=vllm", "no uv on this machine", "uv to make its environment", "pip install uv"))
    return found
