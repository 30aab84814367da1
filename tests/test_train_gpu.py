"""Real trainings of the tiny model on a GPU, with TransformerEngine's layers and in bf16: saved, resumed, exported.

Run with `pytest -m gpu -s` where torch, TransformerEngine 2.9 and NeMo 2.7.3 are installed; -s shows each training's
end. The first step of a process that trains takes half a minute more, for torch.compile.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from config_cases import compose
from train_cases import CHECKPOINT_AFTER, RUNS, Job, largest_difference, metrics, run_jobs

from vlmsft.config_files import sample_set
from vlmsft.generate import answer_file

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

STEPS = 10
ON_GPU = ["strategy=megatron", "precision=bf16-mixed", "trainer.accelerator=gpu", "trainer.devices=1"]
ON_CPU = ["strategy=cpu"]
DEMO = ["experiment=demo", "trainer.callbacks.overfit=null", "data.micro_batch_size=4", "data.global_batch_size=4"]
SCHEDULE = [f"trainer.max_steps={STEPS}", f"trainer.val_check_interval={CHECKPOINT_AFTER}", "log.ckpt.save_top_k=-1"]
SPEED = ["optim.warmup_steps=2", "optim.max_lr=2e-3"]
LORA = ["peft=lora", "peft.dropout=0.2", "optim.max_lr=2e-2"]
ONLY_VALIDATED = ["trainer.max_steps=2", "trainer.val_check_interval=2", "optim.warmup_steps=1"] + [
    f"optim.{rate}=1e-12"  # less than fp32 can add to a weight
    for rate in ("max_lr", "min_lr")
]
NOISE = 2e-3
"""Relative difference of two means over answer tokens that bf16 explains: its steps are 2^-8, and they average out."""


class Runs:
    """All trainings of this file: a worker on the GPU and one on the CPU, as importing NeMo costs more than a training.
    The exports run meanwhile."""

    def __init__(self, folder: Path):
        self.folder = folder
        run_jobs(folder, self.on_gpu())
        print("exports and the training on the CPU begin", flush=True)
        exports = {name: self.export(name) for name in ("full", "lora")}
        try:
            run_jobs(folder, [self.validated("torch-on-cpu", *ON_CPU)])
            self.exported = {name: (process.communicate(timeout=300)[0], process) for name, process in exports.items()}
        finally:
            for process in exports.values():
                process.kill()

    def on_gpu(self) -> list[Job]:
        full, lora = [*DEMO, *ON_GPU, *SPEED, *SCHEDULE], [*DEMO, *ON_GPU, *SPEED, *SCHEDULE, *LORA]
        short = ["trainer.max_steps=2", "trainer.val_check_interval=2", "optim.warmup_steps=1"]
        return [
            Job("start", [*DEMO, *ON_GPU, *short]),
            Job("full", full, weights_from="start"),
            Job("full-again", full, weights_from="start"),
            Job("full-resumed", full, weights_from="start", cut_from="full"),
            Job("lora", lora, weights_from="start"),
            Job("lora-resumed", lora, weights_from="start", cut_from="lora"),
            self.validated("torch-on-gpu", *ON_GPU, "model.config.layers=torch", "model.config.lean_forward=false"),
        ]

    def validated(self, name: str, *overrides: str) -> Job:
        return Job(name, [*DEMO, *overrides, *ONLY_VALIDATED], weights_from="full")

    def export(self, name: str) -> subprocess.Popen[str]:
        command = ["vlmsft.export_ckpt", f"checkpoint={RUNS / name}", f"output=exports/{name}", "which=last"]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([sys.executable, "-m", *command], cwd=self.folder, **streams)

    def metrics(self, name: str) -> dict[str, list[float]]:
        return metrics(self.folder / RUNS / name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Runs]:
    """What one process compiled, the others find."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield Runs(tmp_path_factory.mktemp("runs"))


def difference(run: dict, other: dict) -> float:
    """The largest of losses and validation losses of all steps, relative."""
    assert run["step"] == other["step"] == [float(step) for step in range(1, STEPS + 1)]
    return max(largest_difference(run[name], other[name]) for name in ("reduced_train_loss", "val_loss"))


@pytest.mark.parametrize("name", ["full", "lora"])
def test_resumed_run_equals_the_one_that_never_stopped(runs, name):
    """As much as one equals itself: a GPU adds some gradients in the order in which they are ready. An optimizer that
    lost its moments made 2e-2 on the CPU, where there is no noise."""
    reference = runs.metrics(name)
    assert reference["val_loss"][-1] < (1 - 2 * NOISE) * reference["val_loss"][0]  # it learns, so a wrong step shows
    again = difference(runs.metrics("full-again"), runs.metrics("full"))
    resumed = difference(runs.metrics(f"{name}-resumed"), reference)
    print({"run": name, "again": again, "resumed": resumed})
    assert again < 4 * NOISE
    assert resumed < max(NOISE, 2 * again)
    assert runs.metrics(f"{name}-resumed")["lr"] == reference["lr"]


@pytest.mark.parametrize("name", ["torch-on-gpu", "torch-on-cpu"])
def test_portable_layers_validate_a_checkpoint_of_transformer_engines_alike(runs, name):
    """bf16 and Megatron's classes on the GPU, fp32 on the CPU."""
    trained, portable = runs.metrics("full")["val_loss"], runs.metrics(name)["val_loss"]
    print({"run": name, "difference": portable[-1] / trained[-1] - 1})
    assert abs(trained[0] / trained[-1] - 1) > 5 * NOISE  # weights of another step would show
    assert portable[-1] == pytest.approx(trained[-1], rel=NOISE)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_export_passes_its_gate_and_answers_on_the_gpu_as_the_checkpoint_does(runs, name, tmp_path, monkeypatch):
    output, process = runs.exported[name]
    assert process.returncode == 0, output[-3000:]
    monkeypatch.chdir(runs.folder)
    sample = sample_set()
    answers = {}
    for source in (f"exports/{name}", str(RUNS / name)):
        file = tmp_path / f"{len(answers)}.jsonl"
        asked = [f"input={sample}/validation.jsonl", f"image_folder={sample}/images", f"output={file}"]
        options = [f"checkpoint={source}", "device=cuda", "batch_size=48", "max_new_tokens=12"]
        assert answer_file(compose(*options, *asked, config_name="generate")) == 0
        answers[source] = [json.loads(line)["answer"] for line in file.read_text(encoding="utf-8").splitlines()]
    of_export, of_checkpoint = answers.values()
    assert len(of_export) == 48 and any(of_export)
    assert of_export == of_checkpoint
