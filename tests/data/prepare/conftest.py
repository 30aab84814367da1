"""The sample photographs as archives, and a web server that cuts connections."""

import http.server
import json
import tarfile
import threading
import zipfile

import pytest

from vlmsft.data.prepare.settings import Settings


@pytest.fixture
def photographs(sample_folder):
    """Six real photographs, by name."""
    paths = sorted((sample_folder / "images").iterdir())[:6]
    return {path.name: path.read_bytes() for path in paths}


def record(image, number=0):
    markers = "<image>" * (0 if image is None else 1 if isinstance(image, str) else len(image))
    turns = [{"from": "human", "value": f"{markers}\n質問{number}"}, {"from": "gpt", "value": f"答え{number}"}]
    return {**({} if image is None else {"image": image}), "conversations": turns}


@pytest.fixture
def conversations(tmp_path, photographs):
    """40 LLaVA records in a JSONL file, as the tutorial's name their pictures: coco/train2017/..."""
    names = [f"coco/train2017/{name}" for name in photographs]
    records = [{"id": f"x{number % 6}", **record(names[number % 6], number)} for number in range(38)]
    records += [record(None, 38), record(names[:2], 39)]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in records), encoding="utf-8")
    return path


@pytest.fixture
def zip_archive(tmp_path, photographs):
    path = tmp_path / "train2017.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name, data in photographs.items():
            file.writestr(f"train2017/{name}", data)
        file.writestr("../../evil.jpg", b"outside")
    return path


@pytest.fixture
def tar_archive(tmp_path, photographs):
    path = tmp_path / "train2017.tar.gz"
    (tmp_path / "train2017").mkdir()
    for name, data in photographs.items():
        (tmp_path / "train2017" / name).write_bytes(data)
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tmp_path / "train2017", "train2017")
    return path


@pytest.fixture
def settings(tmp_path, conversations):
    """Makes Settings as conf/prepare.yaml has them, for the conversations above."""

    def make(**changes):
        output = changes.pop("output", tmp_path / "out")
        values = {
            "output": output,
            "conversations": str(conversations),
            "validation": None,
            "revision": None,
            "hub_split": "train",
            "images": None,
            "images_sha256": None,
            "formats": ("jsonl", "energon"),
            "validation_fraction": 0.1,
            "split_by": "record",
            "seed": 42,
            "shuffle": True,
            "shard_size_mb": 0.1,
            "shard_max_records": 10000,
            "on_problem": "raise",
            "verify_images": True,
            "download_folder": output / "downloads",
            "download_attempts": 3,
            "keep_archive": True,
            "num_threads": 2,
        }
        return Settings(**{**values, **changes})

    return make


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` with ranges; each connection ends after `cut_after` bytes.

    requests: the Range header of each request; num_errors: answers of 503 before the first good one
    """

    content, cut_after, etag, has_ranges, num_errors, status = b"", None, '"1"', True, 0, None

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/zips/train2017.zip"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.requests.append(wanted)
        if server.status or server.num_errors:
            server.num_errors = max(0, server.num_errors - 1)
            return self.send_error(server.status or 503)
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        if not server.has_ranges or self.headers.get("If-Range") != server.etag:
            start = 0
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.end_headers()
        self.wfile.write(body[: server.cut_after])
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
