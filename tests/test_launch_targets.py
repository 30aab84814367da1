"""Launch targets: what each would submit, word for word (UPDATE_GOLDEN=1 rewrites it), and no secret in any of it."""

from __future__ import annotations

import getpass
import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
from config_cases import DATA, compose
from kubernetes.config import kube_config
from launch_cases import (
    KUBECONFIG,
    SENTINELS,
    TARGETS,
    command_of,
    environment_bin,
    files_with,
    made_job,
    make_repository,
    normalised,
)

from vlmsft.checks import Facts
from vlmsft.errors import UserError
from vlmsft.launch_checks import paths_survive_nemo_run, secrets_stay_out, time_is_left_before_the_signal
from vlmsft.runtime import job

GOLDEN = Path(__file__).with_name("golden") / "launch"
ELSEWHERE = [target for target in TARGETS if target not in ("local", "skypilot")]


@pytest.fixture
def launched_from(tmp_path, monkeypatch):
    """A repository with one commit as working directory; a Kubernetes configuration that leads nowhere."""
    folder = make_repository(tmp_path / "repository")
    monkeypatch.chdir(folder)
    (tmp_path / "kubeconfig").write_text(KUBECONFIG)
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)  # NeMo-Run's packager reads it, pytest's refuses
        yield folder


def dry_run(target: str, tmp_path: Path, *overrides: str) -> Path:
    """Folder of NeMo-Run's experiment."""
    made, executor = made_job(target, tmp_path / "runs" / "toys" / "one", *overrides)
    assert executor is not None and job.launch(made, executor, dry_run=True) == 0
    (experiment,) = Path(made.run_dir, job.HOME, "experiments", "toys").iterdir()
    return experiment


@pytest.mark.parametrize("target", ELSEWHERE)
def test_what_would_be_submitted(target, tmp_path, launched_from):
    experiment = dry_run(target, tmp_path)
    scripts = sorted([*experiment.glob("*.sh"), *experiment.glob("train/launch.sh")])
    request = [] if target.startswith("slurm") else [experiment / "train_request.txt"]  # Slurm's is its script
    text = "\n".join(path.read_text() for path in [*scripts, *request])
    known = {
        str(tmp_path): "/TMP",
        experiment.name: "toys_TIME",
        experiment.name.replace("_", "-"): "toys-TIME",
        environment_bin(): "/ENV/bin",
        f"/nemo_run/{getpass.getuser()}/": "/nemo_run/USER/",
        os.environ["PATH"]: "$PATH",
        str(Path(job.__file__).parents[2]): "/VLMSFT",
    }
    volatile = r"(?<=rdzv-id )\d+|(?<=rdzv-id\n  - ')\d+|(?<=[/ ]train-)\w{12,}"  # the id is from 1 to 10000
    text = re.sub(volatile, "N", normalised(text, known))
    golden = GOLDEN / f"{target}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text(), "intended? UPDATE_GOLDEN=1"


def test_skypilots_settings_as_far_as_they_go_without_its_package(tmp_path):
    from nemo_run.core.serialization.yaml import YamlSerializer

    _, executor = made_job("skypilot", tmp_path / "run")
    text = normalised(YamlSerializer().serialize(executor), {str(tmp_path): "/TMP"})
    golden = GOLDEN / "skypilot.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.skipif(importlib.util.find_spec("sky") is not None, reason="SkyPilot is installed")
def test_a_missing_package_is_named(tmp_path, launched_from):
    made, executor = made_job("skypilot", tmp_path / "run")
    with pytest.raises(UserError, match=r"launch\.executor: found Skypilot is not installed.*nemo_run\[skypilot\]"):
        job.launch(made, executor, dry_run=True)


def test_no_cluster_is_the_users_error(tmp_path, launched_from, monkeypatch):
    (tmp_path / "kubeconfig").unlink()
    made, executor = made_job("kubeflow", tmp_path / "run")
    with pytest.raises(UserError, match=r"launch\.executor: found .*kube-config"):
        job.launch(made, executor, dry_run=True)


def test_slurm_says_what_the_config_says(tmp_path, launched_from):
    overrides = ["trainer.num_nodes=2", "trainer.devices=4", "launch.executor.container_image=null"]
    experiment = dry_run("slurm", tmp_path, *overrides)
    lines = (experiment / "train_sbatch.sh").read_text().splitlines()
    assert {"#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4", "#SBATCH --gpus-per-node=4"} <= set(lines)
    assert f"export PATH={environment_bin()}:$PATH" in lines, "the environment that it is submitted from"
    assert (experiment / "train" / "code" / "code.py").read_text() == "x = 1\n", "the committed code travels along"


def test_uncommitted_code_is_refused(tmp_path, launched_from):
    (launched_from / "code.py").write_text("x = 2\n")
    with pytest.raises(UserError, match=r"launch\.executor: found .*uncommitted"):
        dry_run("slurm", tmp_path)


# --- secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ELSEWHERE)
def test_no_secret_is_written(target, tmp_path, launched_from, monkeypatch, capfd):
    for name, value in SENTINELS.items():
        monkeypatch.setenv(name, value)
    experiment = dry_run(target, tmp_path)
    assert files_with([str(tmp_path / "runs")], experiment), "the search reads what NeMo-Run writes"
    assert files_with(list(SENTINELS.values()), tmp_path) == []
    said = capfd.readouterr()
    assert not [value for value in SENTINELS.values() if value in said.out + said.err]


def test_the_search_finds_packed_secrets(tmp_path, launched_from):
    """Else the test above would find none wherever they were."""
    experiment = dry_run("slurm", tmp_path, "+launch.executor.env_vars.HARMLESS=5entinel-of-this-test")
    found = {Path(line.split(":")[0]).name for line in files_with(["5entinel-of-this-test"], experiment)}
    assert {"train_sbatch.sh", "_CONFIG"} & found and len(found) > 1


def problems_of(target: str, *overrides: str) -> list[str]:
    return [str(problem) for problem in secrets_stay_out(Facts(compose(*command_of(target), *overrides)))]


@pytest.mark.parametrize("target", TARGETS)
def test_shipped_settings_hold_no_secret(target):
    assert problems_of(target) == []


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "HUGGING_FACE_HUB_TOKEN"])
@pytest.mark.parametrize("target", ["torchrun", "slurm", "docker", "kubeflow"])
def test_a_token_for_an_executor_is_refused(target, name):
    (problem,) = problems_of(target, f"+launch.executor.env_vars.{name}=abc")
    assert problem.startswith(f"launch.executor.env_vars.{name}: found a secret, expected no secret")
    assert "abc" not in problem and ("secretKeyRef" in problem or "own environment" in problem)


def test_a_token_under_another_name_is_refused(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SENTINELS["HF_TOKEN"])
    (problem,) = problems_of("docker", "+launch.executor.env_vars.HARMLESS=${oc.env:HF_TOKEN}")
    assert problem.startswith("launch.executor.env_vars.HARMLESS") and SENTINELS["HF_TOKEN"] not in problem
    (problem,) = problems_of("kubeflow", "launch.executor.env_list=[{name:HF_TOKEN,value:abc}]")
    assert problem.startswith("launch.executor.env_list[0].HF_TOKEN")


def test_references_to_secrets_are_fine():
    assert problems_of("lepton", "+launch.executor.secret_vars.HF_TOKEN=my-token") == []
    reference = "{name:HF_TOKEN,valueFrom:{secretKeyRef:{name:my-secret,key:hf}}}"
    assert problems_of("kubeflow", f"launch.executor.env_list=[{reference}]") == []
    assert problems_of("slurm", "+launch.executor.env_vars.TOKENIZERS_PARALLELISM='false'") == []


def test_dgxclouds_secret_comes_from_the_environment(monkeypatch, tmp_path, launched_from):
    """And only when NeMo-Run asks for a token."""
    import requests

    sent = []

    class Response:
        text = '{"accessToken": "granted"}'

    monkeypatch.setattr(requests, "post", lambda url, json, headers: sent.append(json) or Response())
    _, config = made_job("dgxcloud", tmp_path / "run")
    executor = job.build_executor(config)
    monkeypatch.setenv("DGXCLOUD_CLIENT_SECRET", SENTINELS["DGXCLOUD_CLIENT_SECRET"])
    assert executor.get_auth_token() == "granted" and executor.client_secret == ""
    assert sent[0]["clientSecret"] == SENTINELS["DGXCLOUD_CLIENT_SECRET"]
    monkeypatch.delenv("DGXCLOUD_CLIENT_SECRET")
    with pytest.raises(UserError, match="DGXCLOUD_CLIENT_SECRET: found nothing"):
        executor.get_auth_token()


@pytest.mark.parametrize(
    ("image", "run_dir", "number"),
    [("null", "/a/nemo_run/b", 1), ("x", "/a/nemo_run/b", 0), ("null", "/a/nemo-run/b", 0)],
)
def test_paths_that_nemo_run_would_rewrite_are_refused(image, run_dir, number):
    overrides = [f"launch.executor.container_image={image}", f"run_dir={run_dir}"]
    cfg = compose(*command_of("slurm"), *overrides)
    assert [problem.where for problem in paths_survive_nemo_run(Facts(cfg))] == ["run_dir"] * number


def test_scripts_without_a_container_keep_their_paths(tmp_path, launched_from):
    experiment = dry_run("slurm", tmp_path, "launch.executor.container_image=null")
    script = (experiment / "train_sbatch.sh").read_text()
    assert f"-n train {experiment}/train/configs/train_fn_or_script" in script
    assert f"#SBATCH --output={experiment}/train/sbatch_" in script


# --- Slurm's signal ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("time", "signal", "number"),
    [
        ("'00:05:00'", "TERM@300", 1),
        ("'5'", "TERM@300", 1),
        ("'04:00'", "TERM@300", 1),
        ("'00:05:01'", "TERM@300", 0),
        ("1-0", "TERM@300", 0),
        ("'00:01:00'", "null", 0),
    ],
)
def test_a_signal_at_the_start_is_refused(time, signal, number):
    cfg = compose(*command_of("slurm"), f"launch.executor.time={time}", f"launch.executor.signal={signal}")
    assert len(list(time_is_left_before_the_signal(Facts(cfg)))) == number


def test_targets_that_follow_say_so():
    for target in TARGETS:
        follow = "follow" in compose(*DATA, f"launch={target}").launch
        assert follow == (target not in ("local", "torchrun", "docker")), target
