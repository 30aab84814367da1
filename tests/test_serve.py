"""python -m vlmsft.serve: its keys."""

from __future__ import annotations

import os
import subprocess
import sys

from vlmsft.config_files import root
from vlmsft.serve import with_checkpoint

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(root())}


def serve(tmp_path, *arguments, **variables):
    command = [sys.executable, "-m", "vlmsft.serve", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**ENVIRONMENT, **variables}, timeout=120
    )


def test_all_problems_at_once(tmp_path):
    done = serve(tmp_path, "model=x", "port=70000", "max_num_seqs=0", "image_root=nowhere", "api_key_variable=NO_KEY",
                 "engine.top_p=2", "engine.max_waiting=-1")  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("6 problems; nothing was started")
    for key in ("port", "max_num_seqs", "image_root", "api_key_variable", "engine.top_p", "engine.max_waiting"):
        assert f"  {key}: found" in done.stderr


def test_without_a_model(tmp_path):
    done = serve(tmp_path)
    assert done.returncode == 2 and "  checkpoint: found nothing" in done.stderr


def test_vllm_dry_run(tmp_path):
    (tmp_path / "m").mkdir()
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        (tmp_path / "m" / name).write_text("{}")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "mllama"}')
    done = serve(tmp_path, "model=m", "engine=vllm", "dryrun=true", f"engine.environment={tmp_path}/e")
    assert done.returncode == 0, done.stderr
    assert "uv --directory" in done.stdout and "vllm==0.10.2 'transformers>=4.56,<5'" in done.stdout
    assert f"{tmp_path}/e/venv/bin/vllm serve m --host 127.0.0.1" in done.stdout
    assert not (tmp_path / "e").exists()


def test_model_means_checkpoint():
    assert with_checkpoint("model=runs/a=b") == "checkpoint=runs/a=b"
    for other in ("model", "served_model_name=x", "--cfg", "engine=vllm"):
        assert with_checkpoint(other) == other
