"""The server as a process: its port, what it says when it is up, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import time

import httpx
import pytest
from nemo_forks import Forked, environment, run_module

from vlmsft.errors import UserError
from vlmsft.serving.builtin import bind, url_of


def test_port_in_use():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"{port}, which another process uses"):
            bind("127.0.0.1", port)


def test_unknown_host():
    with pytest.raises(UserError, match="host"):
        bind("nowhere.invalid", 0)


def test_urls():
    for host, shown in (("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("localhost", "localhost")):
        with bind(host, 0) as listener:
            assert url_of(host, listener) == f"http://{shown}:{listener.getsockname()[1]}"


@pytest.mark.nemo  # NeMo is not needed, but a process that imports torch and transformers takes 10 to 40 s
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_starts_answers_and_ends(how, tmp_path, hf_folder):
    """The answer that runs when the signal comes is given whole."""
    command = (run_module, "vlmsft.serve", f"model={hf_folder}", "port=0", "served_model_name=tiny")
    server = Forked(*command, folder=tmp_path, environment=environment(PYTHONUNBUFFERED="1"))
    try:
        deadline = time.monotonic() + 120
        while "openai.OpenAI" not in server.output():
            assert time.monotonic() < deadline and server.process.is_alive(), server.output()
            time.sleep(0.1)
        lines = server.output().splitlines()
        assert "tiny (float32 on " in lines[1] and "curl http://127.0.0.1:" in "".join(lines)
        url = lines[1].split()[-1]
        body = {"model": "tiny", "max_tokens": 60, "messages": [{"role": "user", "content": "こんにちは"}]}
        whole = httpx.post(f"{url}/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]["content"]
        with httpx.stream("POST", f"{url}/chat/completions", json={**body, "stream": True}, timeout=60) as response:
            chunks = response.iter_lines()
            next(chunks)
            os.kill(server.process.pid, how)
            assert [line for line in chunks if line][-1] == "data: [DONE]"
        assert whole
        assert server.wait(60) == (130 if how == signal.SIGINT else -signal.SIGTERM)
    finally:
        server.kill()
    assert "Traceback" not in server.output()
