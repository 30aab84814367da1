"""vLLM's command, its environment and that its packages resolve; the server itself needs a GPU."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from vlmsft.config_files import root
from vlmsft.errors import UserError
from vlmsft.serving import vllm
from vlmsft.serving.endpoint import Endpoint
from vlmsft.serving.vllm import Environment, find_uv, model_problems, serve_command, server_environment

GOLDEN = """
/e/venv/bin/vllm serve exports/11b
--host 127.0.0.1
--port 8000
--served-model-name 11b
--tensor-parallel-size 1
--max-num-seqs 16
--dtype bfloat16
--limit-mm-per-prompt '{"image": 5}'
--generation-config vllm
--enforce-eager
"""


@pytest.fixture
def engine():
    with hydra.initialize_config_dir(str(root() / "conf"), version_base="1.3"):
        cfg = hydra.compose("serve", ["engine=vllm"])
    return OmegaConf.to_container(cfg.engine, resolve=True)


def endpoint(**changes):
    values = dict(model="exports/11b", served_model_name="11b", host="127.0.0.1", port=8000, max_num_seqs=16,
                  max_model_len=None, max_images=5, image_root=None, api_key=None, dryrun=False)  # fmt: skip
    return Endpoint(**{**values, **changes})


def test_golden_command(engine):
    command = serve_command(endpoint(), Path("/e/venv/bin/vllm"), engine)
    assert command == shlex.split(GOLDEN)


def test_every_key_reaches_the_command(engine):
    engine |= {"tensor_parallel_size": 2, "enforce_eager": False, "extra_arguments": ["--seed", 1]}
    asked = endpoint(max_num_seqs=8, max_model_len=8192, image_root=Path("/photos"), api_key="secret", port=81)
    command = shlex.join(serve_command(asked, Path("/e/venv/bin/vllm"), engine))
    for words in ("--tensor-parallel-size 2", "--max-num-seqs 8", "--max-model-len 8192", "--port 81",
                  "--allowed-local-media-path /photos", "--seed 1"):  # fmt: skip
        assert words in command
    assert "--enforce-eager" not in command
    assert "secret" not in command, "everybody on the machine can read a command"
    assert server_environment(asked)["VLLM_API_KEY"] == "secret"


def test_our_python_stays_out_of_its_environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    variables = server_environment(endpoint())
    assert "PYTHONPATH" not in variables and "VLLM_API_KEY" not in variables and variables["PATH"] == os.environ["PATH"]


def test_packages_resolve(engine, tmp_path):
    """Asks the package index (about 10 s). The platform is vLLM's, whatever this machine is."""
    command = [find_uv(), "--directory", str(tmp_path), "pip", "compile", "--quiet", "--no-header", "--no-annotate",
               "--python-version", engine["python"], "--python-platform", "x86_64-manylinux_2_28", "-"]  # fmt: skip
    done = subprocess.run(command, input="\n".join(engine["packages"]), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    versions = dict(line.split("==") for line in done.stdout.splitlines() if "==" in line)
    assert (versions["vllm"], versions["torch"]) == ("0.10.2", "2.8.0")
    assert versions["transformers"].startswith("4.") and int(versions["transformers"].split(".")[1]) >= 56


def test_a_hugging_face_folder_will_do(hf_folder):
    assert model_problems(str(hf_folder)) == []


def test_a_checkpoint_is_refused_with_what_to_type(tmp_path):
    (tmp_path / "run" / "weights").mkdir(parents=True)
    (problem,) = model_problems(str(tmp_path / "run"))
    assert f"python -m vlmsft.export_ckpt checkpoint={tmp_path}/run output=exports/run" in str(problem)


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "'llama'" in str(model_problems(str(tmp_path))[0])
    (tmp_path / "config.json").write_text('{"model_type": "mllama"}')
    assert "preprocessor_config.json, tokenizer_config.json" in str(model_problems(str(tmp_path))[0])


# --- the environment --------------------------------------------------------------------------------------------------


@pytest.fixture
def uv(tmp_path, monkeypatch):
    """A uv that notes what it is asked; it fails where the file `fail` says so."""
    program = tmp_path / "uv"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n[ -e {tmp_path}/fail ] && [ "$3" = pip ] && exit 2\nexit 0\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(vllm, "find_uv", lambda: str(program))
    return lambda: (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []


def test_made_once_and_anew_when_packages_change(tmp_path, uv):
    first = Environment(tmp_path / "e", "3.12", ("vllm==0.10.2",))
    assert not first.is_complete
    first.make()
    assert first.is_complete and len(uv()) == 2
    assert uv()[1].endswith(f"pip install --python {tmp_path}/e/venv/bin/python vllm==0.10.2")
    first.make()
    assert len(uv()) == 2
    other = Environment(tmp_path / "e", "3.12", ("vllm==0.10.1",))
    assert not other.is_complete and other.problems() == []
    other.make()
    assert other.is_complete and not first.is_complete and len(uv()) == 4


def test_one_that_failed_is_made_anew(tmp_path, uv):
    environment = Environment(tmp_path / "e", "3.12", ("vllm==0.10.2",))
    (tmp_path / "fail").touch()
    with pytest.raises(UserError, match="ended with 2"):
        environment.make()
    assert not environment.is_complete and environment.problems() == []
    (tmp_path / "fail").unlink()
    environment.make()
    assert environment.is_complete and len(uv()) == 4


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    environment = Environment(folder, "3.12", ())
    assert environment.problems() == [], "an empty folder will do"
    (folder / "pyvenv.cfg").touch()
    assert "vlmsft didn't make" in str(environment.problems()[0])


def test_constraints_of_the_working_directory_do_not_count(tmp_path, monkeypatch):
    """vlmsft's own pyproject.toml asks for another torch, and uv reads it where it is started."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text('[tool.uv]\nconstraint-dependencies = ["filelock==99"]\n')
    monkeypatch.chdir(project)
    environment = Environment(tmp_path / "e", "3.12", ("filelock>=3",))
    environment.folder.mkdir()
    *_, install = environment.steps(find_uv())
    compile_ = [*install[:3], "pip", "compile", "--quiet", "-"]
    done = subprocess.run(compile_, input="filelock>=3", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
