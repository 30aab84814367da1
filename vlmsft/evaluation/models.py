"""The models of an evaluation: what `models=` names, whether it is whole, what it is, and serving it.

A model is an OpenAI-compatible URL, a Hugging Face folder, a vlmsft checkpoint, a run folder or a run's name. Local
ones are served by vlmsft.serve's builtin engine in a process of its own, so that a model's memory is free when the
next one starts. torch is imported for local models only, and NeMo never.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmsft.checkpoints.find import resolve_checkpoint
from vlmsft.errors import Problem, UserError
from vlmsft.evaluation.engines import BUILTIN, probe
from vlmsft.evaluation.runner import Endpoint
from vlmsft.generation.version import engine_version
from vlmsft.runtime.logging import console

URL = re.compile(r"https?://", re.IGNORECASE)
SPEC_KEYS = ("source", "model", "api_key_variable", "engine")
WHOLE_FILE_BYTES = 1 << 24
SAMPLE_BYTES = 1 << 16
NUM_SAMPLES = 64
STOP_SECONDS = 30.0


@dataclass(frozen=True)
class Serve:
    """How local models are served; conf/evaluate.yaml: serve."""

    device: str
    dtype: str
    processor: str | None
    max_num_seqs: int
    max_images: int


@dataclass(frozen=True)
class Model:
    """A model of the command line.

    name: in tables and files
    source: as typed; place: its folder, None for a URL
    served_model: what requests to a URL call it, None = the only one there
    engine: of a URL, as the user names it
    run_dir: of the run that a checkpoint belongs to
    """

    name: str
    source: str
    place: Path | None = None
    served_model: str | None = None
    api_key_variable: str | None = None
    engine: str | None = None
    run_dir: Path | None = None

    @property
    def url(self) -> str:
        return self.source.rstrip("/")

    @property
    def api_key(self) -> str:
        return os.environ[self.api_key_variable] if self.api_key_variable else "-"


# --- what is meant ----------------------------------------------------------------------------------------------------


def read_models(spec: Any) -> tuple[list[Model], list[Problem]]:
    """The models of `models=`, a list of sources or {name: source or {source, model, api_key_variable, engine}}."""
    if isinstance(spec, str):
        spec = [spec]
    if not isinstance(spec, (list, dict)) or not spec:
        remedy = "models=[base,sft] or models={base: exports/11b, sft: demo}"
        return [], [Problem("models", repr(spec), "at least one model", remedy)]
    named = spec.items() if isinstance(spec, dict) else [(None, source) for source in spec]
    models: list[Model] = []
    problems: list[Problem] = []
    for name, value in named:
        try:
            models.append(_model(name, value))
        except UserError as error:
            problems += error.problems
    names = [model.name for model in models]
    for name in sorted({name for name in names if names.count(name) > 1}):
        sources = ", ".join(model.source for model in models if model.name == name)
        remedy = "models={one: ..., other: ...} gives them names"
        problems.append(Problem("models", f"{name} for {sources}", "a name for each", remedy))
    return models, problems


def _model(name: str | None, value: Any) -> Model:
    fields = value if isinstance(value, Mapping) else {"source": value}
    where = f"models.{name}" if name else "models"
    unknown = [key for key in fields if key not in SPEC_KEYS]
    if unknown or not isinstance(fields.get("source"), str):
        expected = f"a source, or a mapping of {', '.join(SPEC_KEYS)}"
        raise UserError(Problem(where, f"{', '.join(map(str, unknown)) or value!r}", expected))
    given: dict[str, Any] = {**dict.fromkeys(SPEC_KEYS), **fields}
    for key, text in given.items():
        if not isinstance(text, (str, type(None))):
            raise UserError(Problem(f"{where}.{key}", repr(text), "a text", f"""Quote it: '"{text}"'"""))
    source, variable = given["source"], given["api_key_variable"]
    if variable is not None and not os.environ.get(variable):
        raise UserError(Problem(where, f"{variable}, which is not set", "an environment variable that holds the key"))
    if URL.match(source):
        label = name or given["model"] or re.sub(r"^https?://|/v1/?$", "", source)
        return Model(safe_name(label), source, None, given["model"], variable, given["engine"])
    place = _place(source, where)
    run_dir = place.resolve().parent.parent if place.resolve().parent.name == "checkpoints" else None
    return Model(safe_name(name or Path(source).name or source), source, place, run_dir=run_dir)


def safe_name(text: str) -> str:
    """As a file's name."""
    return re.sub(r"[^\w.=+-]+", "_", text).strip("_.") or "model"


def _place(source: str, where: str) -> Path:
    folder = Path(source).expanduser()
    if (folder / "config.json").is_file():
        return folder
    try:
        return resolve_checkpoint(str(folder), key=where)
    except UserError as error:
        remedy = "A URL begins with http:// or https://"
        problems = error.problems
        raise UserError(
            [replace(problem, remedy=f"{problem.remedy} {remedy}".strip()) for problem in problems]
        ) from None


# --- whether it is whole, and what it is ------------------------------------------------------------------------------


def describe(model: Model, serve: Serve) -> dict[str, Any]:
    """What the model's answers depend on, for the manifest. Raises UserError with all that is wrong with the model.

    engine, engine_version, transformers, dtype: of what computes; None where a server doesn't say. A URL counts as the
        same model as long as it serves the same name: what its weights are it doesn't say.
    """
    if model.place is None:
        served = probe(model.url, model.served_model, model.api_key, model.engine)
        return {
            "url": model.url,
            "served_model": served.model,
            "root": served.root,
            "engine": served.engine,
            "engine_version": served.version,
            "transformers": served.transformers,
            "dtype": served.dtype,
        }
    from vlmsft.evaluation.local_model import check

    found = check(model.place, serve.dtype, serve.processor)
    return {
        "source": model.source,
        "folder": str(model.place.resolve()),
        "content": [content_fingerprint(folder) for folder in found.folders],
        "processor": serve.processor,
        "engine": BUILTIN,
        "engine_version": engine_version(),
        "transformers": importlib.metadata.version("transformers"),
        "dtype": found.dtype,
    }


def content_fingerprint(folder: Path) -> str:
    """Of a folder's files: names, sizes, small files whole and 64 samples of 64 KiB of each larger one (weights).

    A copy elsewhere has the same; a training step changes all weights, so that the samples show it.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\t{size}\n".encode())
        with open(path, "rb") as file:
            if size <= WHOLE_FILE_BYTES:
                digest.update(file.read())
                continue
            for number in range(NUM_SAMPLES):
                file.seek((size - SAMPLE_BYTES) * number // (NUM_SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


# --- serving ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(model: Model, facts: Mapping[str, Any], serve: Serve, concurrency: int, log: Path) -> Iterator[Endpoint]:
    """The model's endpoint; a local model's server runs until the end of the block.

    facts: what `describe` gave; log: file for a local server's output
    Raises UserError with the end of the log where the server doesn't start.
    """
    if model.place is None:
        yield Endpoint(model.url, facts["served_model"], model.api_key, concurrency)
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            serve_command(model, serve, concurrency),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is ours: the server ends after the requests that wait for it
            preexec_fn=_end_with_parent,
        )
    try:
        with console().status(f"loading {model.name} ..."):
            url = _wait_for_url(process, model, log, start)
        yield Endpoint(url, model.name, concurrency=concurrency)
    finally:
        _stop(process)


def serve_command(model: Model, serve: Serve, concurrency: int) -> list[str]:
    values = {
        "checkpoint": str(model.place),
        "served_model_name": model.name,
        "port": 0,
        "max_num_seqs": serve.max_num_seqs,
        "max_images": serve.max_images,
        "engine.device": serve.device,
        "engine.dtype": serve.dtype,
        "engine.processor": serve.processor,
        "engine.max_waiting": concurrency,
    }
    return [sys.executable, "-u", "-m", "vlmsft.serve", *(f"{key}={_hydra(value)}" for key, value in values.items())]


def _hydra(value: Any) -> str:
    """As Hydra's command line takes it."""
    if not isinstance(value, str):
        return json.dumps(value)
    text = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + match[2].replace("'", "\\'"), value)
    return f"'{text}'"


def _end_with_parent() -> None:
    """Linux: SIGTERM when evaluate is killed, so that no server stays on a GPU."""
    pr_set_pdeathsig = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _wait_for_url(process: subprocess.Popen, model: Model, log: Path, start: int) -> str:
    while True:
        has_ended = process.poll() is not None
        text = log.read_bytes()[start:].decode(errors="replace")
        match = re.search(r" at (http://\S+/v1)$", text, re.MULTILINE)
        if match:
            return match[1]
        if has_ended:
            last = " | ".join(line.strip() for line in text.strip().splitlines()[-6:])
            state = "answers that were there are kept"
            raise UserError(Problem(f"models: {model.name}", f"a server that ended: {last}", f"see {log}"), state)
        time.sleep(0.1)


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
