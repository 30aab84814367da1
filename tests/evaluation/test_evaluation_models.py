"""What `models=` names, what answers behind a URL, and what a folder holds."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from evaluation_toys import scripted
from hydra.core.override_parser.overrides_parser import OverridesParser

from vlmsft.errors import UserError
from vlmsft.evaluation.engines import numerics_warnings, probe
from vlmsft.evaluation.models import Serve, content_fingerprint, describe, read_models, serve_command

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
