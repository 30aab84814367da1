"""Clients, pictures and a generator that fails on demand."""

from __future__ import annotations

import base64
import contextlib
import io
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

from vlmsft.generation.generate import Answer


def picture(color=(200, 30, 30), size=(120, 80)) -> Image.Image:
    image = Image.new("RGB", size, color)
    image.paste((255 - color[0], 255, color[2]), (10, 10, size[0] // 2, size[1] // 2))
    return image


def png(*arguments, **keywords) -> bytes:
    file = io.BytesIO()
    picture(*arguments, **keywords).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def image_part(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def user(*parts) -> dict:
    return {"role": "user", "content": list(parts)}


def client(url: str, key: str = "-"):
    import openai

    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


class ToyGenerator:
    """Answers "word word ...", a word a step, as many as max_new_tokens; notes what it is asked.

    fail_at: the step that raises; pause_seconds: of a step; hold: waits for this event before the first step
    """

    def __init__(self, fail_at=None, pause_seconds=0.0, hold=None):
        self.fail_at, self.pause_seconds, self.hold = fail_at, pause_seconds, hold
        self.batches: list[int] = []
        self.samplings: list = []
        self.cancelled_at: list[int] = []

    def generate(self, prompts, sampling, *, cancel, on_text, on_answer):
        self.batches.append(len(prompts))
        self.samplings += sampling
        if self.hold is not None:
            self.hold.wait(20)
        live, step = set(range(len(prompts))), 0
        while live:
            time.sleep(self.pause_seconds)
            if step == self.fail_at:
                raise RuntimeError("out of memory, they say")
            step += 1
            for row in sorted(live):
                if cancel[row].is_set():
                    self.cancelled_at.append(step)
                    live.discard(row)
                    continue
                on_text(row, "word ")
                if step == sampling[row].max_new_tokens:
                    on_answer(row, Answer("word " * step, "length", 10, step))
                    live.discard(row)


@contextmanager
def web_server(answer):
    """A local HTTP server; answer(path) -> (status, headers, body). Yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = answer(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # the client has heard enough
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
