"""A scripted OpenAI-compatible server that counts what it is asked, and evaluations on it."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vlmsft.config_files import root
from vlmsft.evaluation.runner import EvalMM, Generation, JudgeSettings, Settings


class Script:
    """What the server does.

    reply(body, number): text of an answer, or an int: the status of an error, or None: hold the request until `release`
    asked: bodies of all requests; answered: of those that got an answer
    """

    def __init__(self, reply: Callable[[dict, int], str | int | None]):
        self.reply = reply
        self.asked: list[dict] = []
        self.answered: list[dict] = []
        self.release = threading.Event()
        self.lock = threading.Lock()
        self.url = ""


def last_text(body: dict) -> str:
    """Of the request's last message."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


@contextmanager
def scripted(reply, card: dict[str, Any] | None = None, paths: dict[str, Any] | None = None):
    """Serves until the end of the block; yields the Script, whose url ends with /v1.

    card: of its one model; paths: JSON that other GET requests get
    """
    script = Script(reply)
    models = {"object": "list", "data": [{"id": "toy", "object": "model", "owned_by": "vlmsft", **(card or {})}]}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            found = {"/v1/models": models, **(paths or {})}.get(self.path)
            self.send(404 if found is None else 200, found or {})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with script.lock:
                number = len(script.asked)
                script.asked.append(body)
            said = script.reply(body, number)
            if said is None:
                script.release.wait(60)
                said = 503
            if isinstance(said, int):
                return self.send(said, {"error": {"message": f"scripted {said}"}})
            message = {"role": "assistant", "content": said}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
            with script.lock:
                script.answered.append(body)
            self.send(200, {"id": "x", "object": "chat.completion", "created": 0, "model": "toy",
                            "choices": [choice], "usage": usage})  # fmt: skip

        def send(self, status, content):
            data = json.dumps(content).encode()
            with contextlib.suppress(ConnectionError):  # the client was killed
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):  # clients are killed on purpose
            pass

    server = Server(("127.0.0.1", 0), Handler)
    script.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield script
    finally:
        script.release.set()
        server.shutdown()
        server.server_close()


def judge_settings(url: str, cache: Path, **changes: Any) -> JudgeSettings:
    values = {
        "base_url": url, "model": "toy", "api_key": "-", "temperature": 0.0, "max_tokens": 16, "seed": 0,
        "timeout_seconds": 5.0, "num_attempts": 2, "concurrency": 4, "cache": str(cache),
    }  # fmt: skip
    return JudgeSettings(**{**values, **changes})


def settings(**changes: Any) -> Settings:
    generation = Generation(**{"max_new_tokens": 8, "temperature": 0.0, "top_p": 1.0, "seed": 0,
                               **changes.pop("generation", {})})  # fmt: skip
    values = {"limit": None, "repeats": 1, "timeout_seconds": 10.0, "num_attempts": 2, "judge": None,
              "eval_mm": EvalMM("unused", "3.12")}  # fmt: skip
    return Settings(generation=generation, **{**values, **changes})


def defaults(name: str) -> dict[str, Any]:
    """A node of conf/evaluate.yaml."""
    return OmegaConf.to_container(OmegaConf.load(root() / "conf" / "evaluate.yaml"), resolve=False)[name]


def write_task(folder: Path, records: list[dict], name: str = "toy", **keys: Any) -> Path:
    """A task's YAML and its records."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    content = {"data": f"{name}.jsonl", "prompt": "{{ question }}", "scorers": ["exact_match"], **keys}
    (folder / f"{name}.yaml").write_text(json.dumps(content))
    return folder / f"{name}.yaml"


def questions(count: int) -> list[dict]:
    return [{"id": f"q{index}", "question": f"question {index}", "reference": f"{index}"} for index in range(count)]
