"""An OpenAI-compatible server that names a picture's color, and a judge that fails on purpose."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

NAMES = {(255, 0, 0): "red", (0, 128, 0): "green", (0, 0, 255): "blue", (255, 255, 255): "white"}


class Server:
    """url: with /v1; requests: bodies in the order they came"""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.url = ""

    def reply(self, request: dict[str, Any]) -> tuple[int, str]:
        """Status and answer."""
        content = request["messages"][-1]["content"]
        url = next(part["image_url"]["url"] for part in content if part["type"] == "image_url")
        image = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
        name = NAMES[image.convert("RGB").getpixel((0, 0))]  # pyright: ignore[reportArgumentType]
        return 200, name if request["model"] == "good" else "red"


class JudgeServer(Server):
    """5 or 1 point; an error for what is green, words for what is blue."""

    def reply(self, request: dict[str, Any]) -> tuple[int, str]:
        text = request["messages"][-1]["content"]
        is_heron = "gpt4o_answer" in text
        color = next(name for name in NAMES.values() if f"Answer: {name}" in text or f'"gpt4o_answer": {name}' in text)
        given = text.split("Prediction: ")[-1].split("\n")[0] if not is_heron else text.split('"model_answer": ')[1]
        points = 5 if given.startswith(color) else 1
        if color == "green":
            return 500, "out of order"
        if color == "blue":
            return 200, "I would rather not say."
        return 200, json.dumps({"score_gpt": 8, "score": points * 2}) if is_heron else str(points)


@contextmanager
def running(server: Server) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in ("good", "bad")]})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append(request)
            status, text = server.reply(request)
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            body = {
                "id": "1",
                "object": "chat.completion",
                "created": 1,
                "model": "m",
                "choices": [choice],
                "usage": usage,
            }
            self.send(status, body if status == 200 else {"error": {"message": text}})

        def send(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
