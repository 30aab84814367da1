"""python -m vlmsft.evaluate as a process: killed and started again, its imports, its messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "evaluation"))

from config_cases import compose
from evaluation_toys import last_text, questions, scripted, write_task
from nemo_forks import Forked, run_module

from vlmsft.config_files import root
from vlmsft.evaluate import plan_of
from vlmsft.evaluation.run import evaluate

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(root())}


def command(*arguments):
    return [sys.executable, "-m", "vlmsft.evaluate", *arguments]


def right(body, number):
    return last_text(body).split()[-1]


def table_of(folder):
    (path,) = folder.glob("evaluations/*/results.json")
    return json.loads(path.read_text())


def test_killed_in_the_middle_it_goes_on(tmp_path, monkeypatch):
    """kill -9: each question is answered once over both starts, and the table is that of a run that wasn't killed."""
    write_task(tmp_path, questions(30))
    with scripted(lambda body, number: right(body, number) if number < 11 else None) as server:
        arguments = [f"models={{a: '{server.url}'}}", "tasks=[toy.yaml]", "concurrency=4"]
        process = subprocess.Popen(command(*arguments), cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 120
        while len(server.asked) < 15:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        process.kill()
        process.wait()
        (answers,) = tmp_path.glob("evaluations/*/answers/a/toy.jsonl")
        assert answers.read_bytes().count(b"\n") == 11
        with open(answers, "ab") as file:
            file.write(b'{"id": "q29", "rep')  # killed while it wrote
        server.reply = right
        done = subprocess.run(command(*arguments), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert set(Counter(map(last_text, server.answered)).values()) == {1} and len(server.answered) == 30
        resumed = table_of(tmp_path)
        (tmp_path / "evaluations").rename(tmp_path / "first")
        monkeypatch.chdir(tmp_path)
        assert evaluate(plan_of(compose(*arguments, config_name="evaluate"), [])) == 0
        assert len(server.answered) == 60 and table_of(tmp_path) == resumed
    assert resumed["a"]["toy"]["exact_match"]["score"] == 100


def test_a_url_needs_neither_torch_nor_nemo(tmp_path):
    write_task(tmp_path, questions(2))
    program = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('HEAVY', [m for m in ('torch', 'nemo', 'transformers') if m in sys.modules]))\n"
        "from vlmsft.evaluate import main\n"
        "main()\n"
    )
    with scripted(right) as server:
        arguments = [f"models=[{server.url}]", "tasks=[toy.yaml]"]
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("HEAVY []\n")
    name = server.url.removeprefix("http://").removesuffix("/v1").replace(":", "_")
    assert list(table_of(tmp_path)) == [name], "a URL without a name is called by its host and port"


def test_without_models_and_tasks(tmp_path):
    done = subprocess.run(command(), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "  models: found nothing" in done.stderr and "  tasks: found nothing" in done.stderr


def test_tasks_of_a_config_folder(tmp_path):
    """--config-dir: a task there has a name as those of conf/task."""
    write_task(tmp_path / "mine" / "task", questions(2), "quiz")
    with scripted(right) as server:
        arguments = ["--config-dir", "mine", f"models={{a: '{server.url}'}}", "tasks=[quiz,sample]", "dryrun=true"]
        done = subprocess.run(command(*arguments), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "quiz" in done.stdout and "48" in done.stdout


@pytest.mark.nemo  # NeMo is not needed, but the processes import torch and transformers
def test_a_local_model_is_served_and_stopped(tmp_path):
    """An HF folder and a bad copy of it: named before anything starts; then answers equal the generator's."""
    from generation_toys import write_hf_folder

    model = write_hf_folder(tmp_path / "exports" / "tiny")
    common = ["tasks=[sample]", "limit=2", "generation.max_new_tokens=3", "serve.device=cpu"]
    bad = write_hf_folder(tmp_path / "exports" / "bad")
    (bad / "preprocessor_config.json").unlink()
    (bad / "model.safetensors").write_bytes((bad / "model.safetensors").read_bytes()[:-100])
    code, output = evaluated(tmp_path, "models=[exports/tiny,exports/bad]", *common)
    assert code == 2 and "Traceback" not in output
    assert "truncated" in output and "preprocessor_config" in output
    assert not (tmp_path / "evaluations").exists()

    code, output = evaluated(tmp_path, f"models={{sft: {model}}}", *common)
    assert code == 0, output
    (answers,) = tmp_path.glob("evaluations/*/answers/sft/sample.jsonl")
    assert len(answers.read_text().splitlines()) == 2
    (log,) = tmp_path.glob("evaluations/*/logs/sft.log")
    port = log.read_text().split("http://127.0.0.1:")[1].split("/")[0]
    listening = Path("/proc/net/tcp").read_text()
    assert f"0100007F:{int(port):04X} 00000000:0000 0A" not in listening, "the server has ended"


def evaluated(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and output."""
    process = Forked(run_module, "vlmsft.evaluate", *arguments, folder=folder, environment=ENVIRONMENT)
    return process.wait(300), process.output()
