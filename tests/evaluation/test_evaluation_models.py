"""What `models=` names, what answers behind a URL, and what a folder holds."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from evaluation_toys import scripted
from hydra.core.override_parser.overrides_parser import OverridesParser

from vlmsft.config_files import root
from vlmsft.errors import UserError
from vlmsft.evaluation import models as models_module
from vlmsft.evaluation.engines import numerics_warnings, probe
from vlmsft.evaluation.models import (
    Model,
    Serve,
    content_fingerprint,
    describe,
    read_models,
    serve_command,
    serving,
)

SERVE = Serve("auto", "auto", None, 16, 5)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("exports/11b", "other/11b"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    for run in ("1", "2"):
        for part in ("weights", "context"):
            (tmp_path / "runs" / "demo" / run / "checkpoints" / "val_loss=0.5-step=9" / part).mkdir(parents=True)
    os.utime(tmp_path / "runs/demo/1/checkpoints/val_loss=0.5-step=9", (1, 1))
    return tmp_path


def test_sources(here):
    models, problems = read_models(["exports/11b", "demo", "http://h:8000/v1/"])
    assert problems == []
    assert [model.name for model in models] == ["11b", "demo", "h_8000"]
    assert models[0].run_dir is None
    assert models[1].run_dir == here / "runs" / "demo" / "2", "the newest run of the name"
    assert models[2].place is None and models[2].url == "http://h:8000/v1"


def test_names(here):
    models, problems = read_models({"base": "exports/11b", "sft": {"source": "http://h/v1", "model": "m"}})
    assert [model.name for model in models] == ["base", "sft"] and problems == []
    assert models[1].served_model == "m"
    _, (problem,) = read_models(["exports/11b", "other/11b"])
    assert "11b for exports/11b, other/11b" in problem.found


def test_all_problems_of_models(here, monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    given = {
        "a": "nowhere",
        "b": {"source": "http://h/v1", "modle": "x"},
        "c": {"source": "http://h/v1", "api_key_variable": "NO_KEY"},
        "d": {"model": "x"},
    }
    models, problems = read_models(given)
    assert models == [] and [problem.where for problem in problems] == ["models.a", "models.b", "models.c", "models.d"]
    assert "NO_KEY, which is not set" in problems[2].found
    assert read_models([])[1][0].where == "models"


@pytest.mark.parametrize(
    ("card", "paths", "expected"),
    [
        ({"owned_by": "vllm", "root": "/m"}, {"/version": {"version": "0.10.2"}}, ("vllm", "0.10.2", None, "/m")),
        ({"owned_by": "sglang"}, {"/get_server_info": {"version": "0.5.2"}}, ("sglang", "0.5.2", None, None)),
        ({"owned_by": "vllm"}, {}, ("vllm", None, None, None)),
        (
            {"owned_by": "vlmsft", "engine_version": "abc", "transformers_version": "4.57.6"},
            {},
            ("vlmsft builtin", "abc", "4.57.6", None),
        ),
        ({"owned_by": "someone"}, {}, ("unknown", None, None, None)),
    ],
)
def test_engines_are_found_out(card, paths, expected):
    with scripted(lambda body, number: "", card, paths) as server:
        served = probe(server.url, None, "-", None)
        assert (served.engine, served.version, served.transformers, served.root) == expected
        assert served.model == "toy"
        assert probe(server.url, "hidden", "-", "Transformers 4.57.6").engine == "transformers"


def test_urls_that_are_no_servers():
    wrong = pytest.raises(UserError, match=r"status 404 and no list of models.*ends with /v1")
    with scripted(lambda body, number: "") as server, wrong:
        probe(server.url.removesuffix("/v1"), None, "-", None)
    with pytest.raises(UserError, match="nothing that answers"):
        probe(server.url, None, "-", None)


@pytest.mark.parametrize(
    ("engine", "version", "said"),
    [
        ("vllm", "0.10.2", ["in front of the first image"]),
        ("vllm", "0.33.0", ["has no Llama-3.2-Vision", "in front of the first image"]),
        ("sglang", "0.5.23", ["in front of the first image", "sees all pictures"]),
        ("transformers", "4.57.6", ["one layer too late"]),
        ("transformers", "4.54.1", []),
        ("vlmsft builtin", "abc", []),
        ("unknown", None, ["unknown engine"]),
    ],
)
def test_warnings_of_numerics(engine, version, said):
    warnings = numerics_warnings(engine, version)
    assert len(warnings) == len(said) and all(part in warning for part, warning in zip(said, warnings, strict=True))


def test_the_fingerprint_of_weights(tmp_path):
    def folder(name, change=None):
        (tmp_path / name).mkdir()
        data = bytearray(b"\1" * (1 << 25))
        if change is not None:
            data[change:] = bytes(value ^ 1 for value in data[change:])
        (tmp_path / name / "w.bin").write_bytes(data)
        return content_fingerprint(tmp_path / name)

    first = folder("a")
    assert folder("b") == first, "a copy"
    assert folder("c", len(b"x" * 1000)) != first
    (tmp_path / "b" / "config.json").write_text("{}")
    assert content_fingerprint(tmp_path / "b") != first


def test_an_export_is_checked_whole(tmp_path):
    """Weights cut short and no image processor: both named, before anything is served."""
    from generation_toys import write_hf_folder

    good = write_hf_folder(tmp_path / "good")
    bad = Path(shutil.copytree(good, tmp_path / "bad"))
    weights = bad / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (bad / "preprocessor_config.json").unlink()
    models, _ = read_models([str(good), str(bad)])
    assert describe(models[0], SERVE)["dtype"] == "float32"
    with pytest.raises(UserError) as error:
        describe(models[1], SERVE)
    assert "truncated" in str(error.value) and "preprocessor_config" in str(error.value)


def test_the_servers_command_line_is_hydras(here):
    (model,), _ = read_models([str(here / "runs/demo/2/checkpoints/val_loss=0.5-step=9")])
    command = serve_command(model, Serve("cpu", "auto", "it's here", 4, 5), 8)
    parsed = OverridesParser.create().parse_overrides(command[4:])
    values = {override.key_or_group: override.value() for override in parsed}
    assert str(values["checkpoint"]) == str(model.place)
    assert str(values["engine.processor"]) == "it's here" and values["max_num_seqs"] == 4 and values["port"] == 0


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until_dead(pid: int) -> None:
    end = time.monotonic() + 20
    while is_alive(pid):
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def server_program(monkeypatch):
    """What runs in place of vlmsft.serve."""

    def server_program(program):
        monkeypatch.setattr(models_module, "serve_command", lambda *_: [sys.executable, "-uc", program])

    return server_program


def test_a_local_server_lives_as_long_as_it_is_used(tmp_path, server_program):
    program = "import os, time; print(os.getpid()); print('tiny at http://127.0.0.1:9/v1'); time.sleep(60)"
    server_program(program)
    log = tmp_path / "logs" / "tiny.log"
    log.parent.mkdir()
    log.write_text("of an earlier start: x at http://127.0.0.1:1/v1\n")
    with serving(Model("tiny", "tiny", tmp_path), {}, SERVE, 3, log) as endpoint:
        assert (endpoint.base_url, endpoint.model, endpoint.concurrency) == ("http://127.0.0.1:9/v1", "tiny", 3)
        pid = int(log.read_text().splitlines()[1])
        assert is_alive(pid)
    assert not is_alive(pid)


def test_a_server_that_does_not_start_is_told_with_its_last_words(tmp_path, server_program):
    server_program("import sys; print('1 problem; nothing was started:'); print('  device: found 9'); sys.exit(2)")
    model = Model("tiny", "tiny", tmp_path)
    said = pytest.raises(UserError, match=r"a server that ended: 1 problem.*device: found 9")
    with said as error, serving(model, {}, SERVE, 3, tmp_path / "tiny.log"):
        pass
    assert "tiny.log" in str(error.value)


def test_a_killed_evaluation_leaves_no_server(tmp_path):
    """kill -9 of the parent: else a server would stay on the GPU."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from vlmsft.evaluation import models\n"
        "from vlmsft.evaluation.models import Model, Serve, serving\n"
        "child = \"import os, time; print(os.getpid(), 'at http://127.0.0.1:9/v1'); time.sleep(60)\"\n"
        "models.serve_command = lambda *_: [sys.executable, '-uc', child]\n"
        "with serving(Model('m', 'm', Path('.')), {}, Serve('cpu', 'auto', None, 1, 1), 1, Path('log')):\n"
        "    print(Path('log').read_text().split()[0], flush=True)\n"
        "    import time; time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root())},
    )
    pid = int(parent.stdout.readline())
    assert is_alive(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until_dead(pid)
