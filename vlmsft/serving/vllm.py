"""engine=vllm: vLLM's own server, started in an environment of its own. vlmsft's environment and vLLM's can't be one:
vLLM 0.10.2, the last release with this model, asks for torch 2.8 and another numpy."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlmsft.errors import Problem, UserError
from vlmsft.runtime.environments import Environment, variables_for_another_python
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
        Path(engine["environment"]).expanduser().absolute(),
        engine["python"],
        tuple(engine["packages"]),
        "engine.environment",
    )
    problems = model_problems(endpoint.model) + environment.problems()
    if problems:
        raise UserError(problems)
    arguments = serve_command(endpoint, environment.program("vllm"), engine)
    if endpoint.dryrun:
        show(environment, arguments)
        return
    if not environment.is_complete:
        environment.make()
    console().print(shlex.join(arguments), markup=False, highlight=False, soft_wrap=True)
    os.execve(environment.program("vllm"), arguments, server_environment(endpoint))


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
    """What any other Python gets, and the API key under vLLM's name."""
    variables = variables_for_another_python()
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
