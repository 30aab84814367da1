"""One tiny model, generator and server for all tests of the folder."""

from __future__ import annotations

import importlib.util
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

MODEL_NAME = "tiny"


def _generation_toys():
    """tests/generation/conftest.py, whose tiny model this is: two files of that name can't be imported by it."""
    path = Path(__file__).parents[1] / "generation" / "conftest.py"
    spec = importlib.util.spec_from_file_location("generation_conftest", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_toys = _generation_toys()
hf_folder, loaded, generator = _toys.hf_folder, _toys.loaded, _toys.generator


@pytest.fixture(scope="session")
def settings(tmp_path_factory):
    from vlmsft.serving.app import Settings
    from vlmsft.serving.images import ImageLimits
    from vlmsft.serving.schema import Defaults

    images = ImageLimits(
        max_images=3,
        max_image_bytes=200_000,
        max_image_pixels=1_000_000,
        fetch_timeout_seconds=5,
        allow_private_addresses=True,
        image_root=tmp_path_factory.mktemp("root"),
    )
    return Settings(
        model_name=MODEL_NAME,
        max_model_len=400,
        max_num_seqs=16,
        max_waiting=16,
        gather_seconds=0.1,
        max_body_bytes=1_000_000,
        body_timeout_seconds=5,
        images=images,
        defaults=Defaults(temperature=0.0, top_p=1.0),
        api_key=None,
    )


@pytest.fixture(scope="session")
def serving(settings):
    """A context manager: a server in a thread with this generator and the settings changed as given; yields its URL."""

    @contextmanager
    def serving(generator, count_tokens=lambda turns: 10, **changes):
        import uvicorn

        from vlmsft.serving.app import create_app

        app = create_app(generator, count_tokens, replace(settings, **changes))
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        wait_for(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            listener.close()
            assert not thread.is_alive(), "the server doesn't end"

    return serving


@pytest.fixture(scope="session")
def url(serving, generator, loaded):
    """The real model's server."""
    with serving(generator, lambda turns: len(loaded.encoder.prompt_ids(turns))) as url:
        yield url


def wait_for(holds, seconds: float = 10) -> None:
    """Until holds() is true; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.01)
