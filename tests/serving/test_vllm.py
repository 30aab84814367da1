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
from vlmsft.runtime.environments import find_uv
from vlmsft.serving.endpoint import Endpoint
from vlmsft.serving.vllm import model_problems, serve_command, server_environment

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
