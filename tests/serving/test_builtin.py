"""The server as a process: its port, what it says when it is up, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest

from vlmsft.config_files import root
from vlmsft.errors import UserError
from vlmsft.serving.builtin import bind, url_of

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(root())}


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


@pytest.mark.nemo  # NeMo is not imported, but a process that imports torch and transformers takes 10 to 40 s
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_starts_answers_and_ends(how, tmp_path, hf_folder):
    """The answer that runs when the signal comes is given whole."""
    command = [sys.executable, "-u", "-m", "vlmsft.serve", f"model={hf_folder}", "port=0", "served_model_name=tiny"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=ENVIRONMENT
    )
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        lines = []
        while not any("openai.OpenAI" in line for line in lines):
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            lines.append(line)
        assert "tiny (float32 on " in lines[1] and "curl http://127.0.0.1:" in "".join(lines)
        url = lines[1].split()[-1]
        body = {"model": "tiny", "max_tokens": 60, "messages": [{"role": "user", "content": "こんにちは"}]}
        whole = httpx.post(f"{url}/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]["content"]
        with httpx.stream("POST", f"{url}/chat/completions", json={**body, "stream": True}, timeout=60) as response:
            chunks = response.iter_lines()
            next(chunks)
            process.send_signal(how)
            assert [line for line in chunks if line][-1] == "data: [DONE]"
        assert whole
        error = process.communicate(timeout=60)[1]
    finally:
        watchdog.cancel()
        process.kill()
    assert "Traceback" not in error
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGTERM)
