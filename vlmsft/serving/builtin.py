"""engine=builtin: the repaired Hugging Face model behind FastAPI and uvicorn."""

from __future__ import annotations

import copy
import errno
import json
import logging
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vlmsft.errors import Problem, UserError
from vlmsft.runtime.logging import console
from vlmsft.serving.endpoint import Endpoint, Rule, number_problems

if TYPE_CHECKING:
    from vlmsft.generation.model import LoadedModel
    from vlmsft.serving.app import Settings

MIB = 2**20

RULES = {
    "temperature": Rule(0, 2, is_whole=False),
    "top_p": Rule(0.01, 1, is_whole=False),
    "max_waiting": Rule(0),
    "gather_seconds": Rule(0, is_whole=False),
    "max_body_mib": Rule(0.001, is_whole=False),
    "max_image_mib": Rule(0.001, is_whole=False),
    "max_image_pixels": Rule(1),
    "fetch_timeout_seconds": Rule(0, is_whole=False),
    "body_timeout_seconds": Rule(0.1, is_whole=False),
    "shutdown_seconds": Rule(0),
}


def serve(problems: list[Problem], make_endpoint: Callable[[], Endpoint], **engine: Any) -> None:
    """Serves until Ctrl-C or SIGTERM, which running answers get engine["shutdown_seconds"] to end after.

    problems: of the endpoint's keys; make_endpoint: to be called where there are none
    engine: the keys of conf/engine/builtin.yaml
    Raises UserError before the model is loaded where a value or the port can't be had.
    """
    problems = problems + number_problems(engine, RULES, "engine.")
    if problems:
        raise UserError(problems)
    endpoint = make_endpoint()
    listener = bind(endpoint.host, endpoint.port)
    try:
        if endpoint.dryrun:
            url = url_of(endpoint.host, listener)
            text = f"would serve {endpoint.model} as {endpoint.served_model_name!r} at {url}"
            console().print(text, markup=False, highlight=False)
            return
        _load_and_run(endpoint, engine, listener)
    finally:
        listener.close()


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds the port while the model is being loaded, which takes minutes; nobody can connect yet.

    Raises UserError for a port in use, one below 1024 without the right to it, and an unknown host.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(Problem("host", repr(host), f"a name or address of this machine ({error.strerror})")) from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UserError(_bind_problem(host, port, error)) from None
    return listener


def _bind_problem(host: str, port: int, error: OSError) -> Problem:
    if error.errno == errno.EADDRINUSE:
        return Problem("port", f"{port}, which another process uses", "a free port", "port=0 takes any free one")
    if error.errno == errno.EACCES:
        return Problem("port", f"{port}, which only root may use", "a port from 1024 on")
    return Problem("host", repr(host), f"an address of this machine ({error.strerror})")


def url_of(host: str, listener: socket.socket) -> str:
    """As a client on this machine types it."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{listener.getsockname()[1]}"


def _load_and_run(endpoint: Endpoint, engine: dict[str, Any], listener: socket.socket) -> None:
    console().print(f"loading {endpoint.model} ...", style="dim", markup=False, highlight=False)
    start = time.monotonic()
    from vlmsft.generation.generate import Generator
    from vlmsft.generation.model import load_model
    from vlmsft.serving.app import create_app

    loaded = load_model(endpoint.model, engine["device"], engine["dtype"], engine["processor"])
    settings = settings_of(endpoint, engine, loaded)
    app = create_app(Generator(loaded), lambda turns: len(loaded.encoder.prompt_ids(turns)), settings)
    seconds = time.monotonic() - start
    lines = greeting(endpoint, settings, loaded, url_of(endpoint.host, listener), seconds)

    def announce() -> None:
        for line in lines:
            console().print(line, markup=False, highlight=False, soft_wrap=True)

    run(app, listener, engine["shutdown_seconds"], engine["access_log"], announce)


def settings_of(endpoint: Endpoint, engine: dict[str, Any], loaded: LoadedModel) -> Settings:
    """Raises UserError where max_model_len is more than the model can do."""
    from vlmsft.serving.app import Settings
    from vlmsft.serving.images import ImageLimits
    from vlmsft.serving.schema import Defaults

    longest = loaded.model.config.text_config.max_position_embeddings
    if endpoint.max_model_len is not None and endpoint.max_model_len > longest:
        raise UserError(Problem("max_model_len", str(endpoint.max_model_len), f"at most the model's {longest}"))
    return Settings(
        model_name=endpoint.served_model_name,
        max_model_len=longest if endpoint.max_model_len is None else endpoint.max_model_len,
        max_num_seqs=endpoint.max_num_seqs,
        max_waiting=engine["max_waiting"],
        gather_seconds=engine["gather_seconds"],
        max_body_bytes=int(engine["max_body_mib"] * MIB),
        body_timeout_seconds=engine["body_timeout_seconds"],
        images=ImageLimits(
            max_images=endpoint.max_images,
            max_image_bytes=int(engine["max_image_mib"] * MIB),
            max_image_pixels=engine["max_image_pixels"],
            fetch_timeout_seconds=engine["fetch_timeout_seconds"],
            allow_private_addresses=engine["allow_private_addresses"],
            image_root=endpoint.image_root,
        ),
        defaults=Defaults(engine["temperature"], engine["top_p"]),
        api_key=endpoint.api_key,
    )


def greeting(endpoint: Endpoint, settings: Settings, loaded: LoadedModel, url: str, seconds: float) -> list[str]:
    """What the server says once it answers: what is where, and how to ask."""
    name = settings.model_name
    body = {"model": name, "messages": [{"role": "user", "content": "こんにちは"}]}
    key = "" if settings.api_key is None else " -H 'Authorization: Bearer <key>'"
    dtype = str(loaded.dtype).removeprefix("torch.")
    lines = [
        f"{name} ({dtype} on {loaded.device}, loaded in {seconds:.1f} s) at {url}/v1",
        f"  {settings.max_num_seqs} requests at once and {settings.max_waiting} waiting,"
        f" {settings.max_model_len:,} tokens each; Ctrl-C stops it",
        f"  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json'"
        f" -d '{json.dumps(body, ensure_ascii=False)}'",
        f'  openai.OpenAI(base_url="{url}/v1", api_key="{"-" if settings.api_key is None else "<key>"}")'
        f'.chat.completions.create(model="{name}", messages=[...])',
    ]
    if settings.api_key is None and endpoint.host not in ("127.0.0.1", "localhost", "::1"):
        lines.append("  other machines can reach it, and it asks for no key: api_key_variable sets one")
    return lines


def run(
    app: Any, listener: socket.socket, shutdown_seconds: int, access_log: bool, announce: Callable[[], None]
) -> None:
    """Blocks until a signal. announce: called once connections are taken."""
    import uvicorn
    from uvicorn.config import LOGGING_CONFIG

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            announce()

    log_config = copy.deepcopy(LOGGING_CONFIG)
    log_config["loggers"]["vlmsft"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    config = uvicorn.Config(
        app,
        log_config=log_config,
        log_level=logging.INFO if access_log else logging.WARNING,
        access_log=access_log,
        timeout_graceful_shutdown=shutdown_seconds,
    )
    try:
        Server(config).run(sockets=[listener])
    except OSError as error:  # bound by two at once, and the other one listens already
        if error.errno != errno.EADDRINUSE:
            raise
        raise UserError(_bind_problem("", listener.getsockname()[1], error)) from None
