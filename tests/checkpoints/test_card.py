"""The model card says where the model comes from, how to load it and how far it was compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from vlmsft.checkpoints.card import Run, card, metrics_at
from vlmsft.checkpoints.verify import Comparison, Report

NAME = "val_loss=0.5000-step=1-consumed_samples=4.0"
METRICS = """step,consumed_samples,reduced_train_loss,val_loss,lr,val_loss/a
1,2,0.9,,0.1,
2,4,0.8,0.5,0.1,0.4
3,6,0.1,0.2,0.1,0.1
"""
REPORT = Report(
    (Comparison("validation.jsonl 1: a|b?", "an\nanswer\x85\x12\u2028!", 4, 3, 2e-7, 3e-5, 1e-6),), 84, torch.float32
)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    run = tmp_path / "demo" / "20261124"
    (run / "checkpoints" / NAME).mkdir(parents=True)
    (run / "config.yaml").write_text("name: demo\nseed: 7\n")
    (run / "metrics.csv").write_text(METRICS)
    provenance = {
        "data": {"files": {"/data/train.jsonl": {"sha256": "abc"}}, "images": {"folder": "/data", "files": 3}},
        "code": {"commit": "c0ffee"},
        "packages": {"torch": "2.0"},
    }
    (run / "provenance.json").write_text(json.dumps(provenance))
    return run / "checkpoints" / NAME


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


def test_metrics_of_the_checkpoints_step(checkpoint):
    found = metrics_at(checkpoint.parent.parent / "metrics.csv", NAME)
    assert found == {
        "step": "2", "consumed_samples": "4", "reduced_train_loss": "0.8", "val_loss": "0.5", "val_loss/a": "0.4",
    }  # fmt: skip


def test_metrics_of_a_name_without_a_step(checkpoint):
    assert metrics_at(checkpoint.parent.parent / "metrics.csv", "last") == {}


def test_what_it_says(checkpoint):
    text = card(NAME, Run.of(checkpoint), REPORT, None, {"transformers": "4.57.6"})
    for said in (
        "# demo/20261124",
        "seed: 7",
        "- val_loss: 0.5",
        'train.jsonl: {"sha256": "abc"}',
        'images: {"files": 3}',
        "c0ffee",
        "- torch: 2.0",
        "- transformers: 4.57.6",
        "hf_reference.load(folder",
        "transformers 4.55 and newer computes this architecture differently",
        "All 84 tensors equal",
        "up to 1e-05 was allowed",
        "float32",
        "| validation.jsonl 1: a\\|b? | an answer   ! | 3 of 4 | 2.0e-07 | 3.0e-05 |",
    ):
        assert said in text, said
    assert "/data" not in text  # paths of the machine that trained
    assert front_matter(text)["library_name"] == "transformers"


def test_a_checkpoint_without_a_run(tmp_path):
    assert Run.of(tmp_path) == Run()
    text = card("models/11b", Run(), None, None, {})
    assert "# models/11b" in text and "its training is not known" in text
    assert "Not compared: exported with `verify=false`" in text


def test_an_adapter_names_its_base(checkpoint):
    text = card(NAME, Run.of(checkpoint), replace(REPORT, num_tensors=0), "meta-llama/Base", {})
    assert "tensors equal" not in text
    assert front_matter(text) | {"tags": []} == {
        "library_name": "peft", "pipeline_tag": "image-text-to-text", "base_model": "meta-llama/Base", "tags": [],
    }  # fmt: skip
    assert 'hf_reference.load("meta-llama/Base"' in text and "PeftModel.from_pretrained(base, folder)" in text


def test_the_code_is_python(checkpoint):
    for base in (None, "", "meta-llama/Base"):
        text = card(NAME, Run(), None, base, {})
        compile(text.split("```python\n")[1].split("```")[0], "card", "exec")
