"""hf://... against a local server that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import pytest

from vlmsft.checkpoints.download import Source, download, parse_source
from vlmsft.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "org/model"
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
FILES = {
    "config.json": b'{"model_type": "mllama"}',
    "model-00001-of-00001.safetensors": WEIGHTS,
    "model.safetensors.index.json": b"{}",
    "preprocessor_config.json": b"{}",
    "chat_template.json": b"{}",
    "tokenizer.json": b"{}",
    "LICENSE.txt": b"licence",
    "original/consolidated.pth": b"not needed",
    "pytorch_model.bin": b"not needed",
    "README.md": b"not needed",
}
NEEDED = {name for name, content in FILES.items() if content != b"not needed"}


class Hub(ThreadingHTTPServer):
    """refuse: (status, X-Error-Code) for everything

    cut: the connection breaks after so many bytes of the weights
    ranges: of the weights, as asked for; tokens: that came
    size_said: of the weights, in the list of files
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.refuse: tuple[int, str] | None = None
        self.cut: int | None = None
        self.ranges: list[str | None] = []
        self.tokens: set[str | None] = set()
        self.size_said: int | None = None


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        self.server.tokens.add(self.headers.get("Authorization"))
        path = unquote(urlparse(self.path).path)
        if self.server.refuse:
            status, code = self.server.refuse
            return self.send(status, b"{}", {"X-Error-Code": code}, with_body)
        if path.startswith(f"/api/models/{REPO}"):
            revision = path.partition("/revision/")[2] or "main"
            if revision not in ("main", "v1", COMMIT):
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body)
            files = [{"rfilename": name, "size": self.size(name)} for name in FILES]
            info = {"id": REPO, "sha": COMMIT, "siblings": files, "private": False, "tags": [], "downloads": 0}
            return self.send(200, json.dumps(info).encode(), {}, with_body)
        name = path.partition(f"/{REPO}/resolve/{COMMIT}/")[2]
        if name in FILES:
            return self.send_file(name, with_body)
        return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)

    def size(self, name):
        is_weights = name.endswith(".safetensors")
        return self.server.size_said if is_weights and self.server.size_said else len(FILES[name])

    def send_file(self, name, with_body):
        content = FILES[name]
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        status, start = 200, 0
        if with_body and name.endswith(".safetensors"):
            self.server.ranges.append(self.headers.get("Range"))
        if with_body and self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0])
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = self.server.cut if with_body and name.endswith(".safetensors") else None
        self.send(status, content[start:], headers, with_body, cut)

    def send(self, status, body, headers, with_body, cut=None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.connection.close()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # between its five tries
    yield server
    server.shutdown()
    server.server_close()


def refused(tmp_path, source=None) -> str:
    with pytest.raises(UserError) as error:
        download(source or Source(REPO), tmp_path)
    return str(error.value)


def test_sources():
    assert parse_source("some/folder") is None
    assert parse_source("hf://org/model") == Source("org/model")
    assert parse_source("hf://org/model@v1") == Source("org/model", "v1")
    assert str(Source("org/model", "v1")) == "hf://org/model@v1"
    for wrong in ("hf://", "hf://model", "hf://org/model@", "hf://a/b/c", "hf:///b"):
        with pytest.raises(UserError, match="hf://organisation/model"):
            parse_source(wrong)


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_needed_files_only_with_the_token(hub, tmp_path, revision):
    folder = download(Source(REPO, revision), tmp_path)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == NEEDED
    assert (folder / "model-00001-of-00001.safetensors").read_bytes() == WEIGHTS
    assert hub.tokens == {"Bearer hf_secret"}


def test_a_second_download_fetches_nothing(hub, tmp_path):
    folder = download(Source(REPO), tmp_path)
    fetched = list(hub.ranges)
    assert download(Source(REPO), tmp_path) == folder
    assert hub.ranges == fetched


def test_a_transfer_that_was_cut_off_goes_on(hub, tmp_path):
    hub.cut = 300_000
    message = refused(tmp_path)
    assert "the connection broke" in message and "goes on where it stopped" in message
    hub.cut, hub.ranges = None, []
    folder = download(Source(REPO), tmp_path)
    assert (folder / "model-00001-of-00001.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges and all(asked is not None for asked in hub.ranges)
    assert int(hub.ranges[0].removeprefix("bytes=").rstrip("-").partition("-")[0]) >= 300_000


def test_a_gated_model_with_a_token(hub, tmp_path):
    hub.refuse = (403, "GatedRepo")
    message = refused(tmp_path)
    assert "gated model that the account of HF_TOKEN may not read (403)" in message
    assert f"Open https://huggingface.co/{REPO} with the account of your HF_TOKEN, accept the licence" in message
    assert "hf_secret" not in message


def test_a_gated_model_without_a_token(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    hub.refuse = (401, "GatedRepo")
    message = refused(tmp_path)
    assert "no HF_TOKEN (401)" in message
    assert f"Open https://huggingface.co/{REPO}, accept the licence, make a token at" in message


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ((401, ""), "(401)"),
        ((403, ""), "HF_TOKEN may not read this model (403)"),
        ((404, "RepoNotFound"), "no such model, or a private one"),
        ((500, ""), "the hub answered 500"),
    ],
)
def test_other_refusals(hub, tmp_path, refusal, said):
    hub.refuse = refusal
    assert said in refused(tmp_path)


def test_an_unknown_revision(hub, tmp_path):
    assert "no revision 'v9' (404)" in refused(tmp_path, Source(REPO, "v9"))


def test_no_server(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "the hub can't be reached" in refused(tmp_path)


def test_without_a_connection_the_cache_does(hub, tmp_path, monkeypatch):
    folder = download(Source(REPO), tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert download(Source(REPO), tmp_path) == folder


def test_a_disk_that_is_too_small_is_found_before_downloading(hub, tmp_path):
    hub.size_said = 10**18
    message = refused(tmp_path)
    assert "free on the file system at" in message
    assert hub.ranges == []
