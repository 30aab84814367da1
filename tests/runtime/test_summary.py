"""The start-up summary."""

from __future__ import annotations

import io
import re
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from runtime_toys import ToyData, ToyModel

from vlmsft.mllama.memory import Training, memory_estimate
from vlmsft.mllama.sizes import GIB, TextShape, VisionShape, parameter_counts
from vlmsft.runtime.summary import (
    RunFacts,
    StartSummary,
    _tokens_per_step,
    count_parameters,
    layers_run_as,
    memory_gib,
    part_of,
    rows,
    show,
)

FACTS = RunFacts(
    model="MLlama 11B",
    parameters={"tower": (863_567_379, 0), "text": (9_775_192_080, 9_775_192_080), "LoRA": (23_100_000, 100)},
    precision="bf16-mixed",
    layers="plain functions",
    tensor_model_parallel_size=2,
    data_parallel_size=4,
    device="NVIDIA H100 80GB HBM3",
    micro_batch_size=1,
    global_batch_size=128,
    tokens_per_step={"text": 262_144, "vision": 819_712},
    num_train_samples=74_240,
    max_steps=1160,
    first_step=580,
    val_check_interval=580,
    num_validation_batches=12,
    memory_gib_per_gpu=59.6,
    run_dir="runs/lora/1",
    resume_command="python -m vlmsft.train id=1",
)


def test_rows_say_it_in_units():
    table = dict(rows(FACTS))
    assert table["parameters"] == "10.66 B, of which 9.775 B train (91.7 %)"
    assert table["  tower"] == "863.6 M, frozen"
    assert table["  text"] == "9.775 B, trains"
    assert table["  LoRA"] == "23.1 M, 100 train"
    assert table["layers"] == "plain functions"
    assert table["layout"] == "8 processes: TP 2 x PP 1 x DP 4 on NVIDIA H100 80GB HBM3"
    assert table["samples per step"] == "128 = micro batch 1 x DP 4 x accumulation 32"
    assert table["tokens per step"] == "262.1 k text, 819.7 k vision (one full image per sample)"
    assert rows(FACTS)[0] == ("continues", "from step 580")
    assert table["steps"] == "1,160 = 2.00 epochs of 580.0 steps"
    assert table["validation"] == "every 580 steps, 12 batches"
    assert table["memory"] == "about 59.6 GiB per GPU (estimate)"


def test_unknown_facts_have_no_row():
    assert [label for label, _ in rows(RunFacts(model="x"))] == ["model", "layout"]


def test_table_in_a_terminal_and_lines_elsewhere():
    plain, terminal = io.StringIO(), io.StringIO()
    show(FACTS, Console(file=plain, width=40))
    assert "run folder: runs/lora/1" in plain.getvalue().splitlines()
    assert len(plain.getvalue().splitlines()) == len(rows(FACTS)), "a log's lines aren't folded"
    show(FACTS, Console(file=terminal, force_terminal=True, width=100))
    assert "\x1b[1m" in terminal.getvalue() and "runs/lora/1" in terminal.getvalue()


def test_parts_by_name():
    names = {
        "module.vision_model.vision_encoder.conv1._linear.weight": "tower",
        "module.vision_model.vision_projection.encoder.weight": "projector",
        "module.language_model.decoder.layers.0.self_attention.linear_qkv.weight": "text",
        "module.language_model.decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight": "LoRA",
        "linear.weight": "other",
    }
    assert {name: part_of(name) for name in names} == names


def test_tensor_parallel_shards_are_counted_as_the_whole():
    model = torch.nn.Module()
    model.language_model = torch.nn.Linear(4, 3)  # as on one of two ranks
    model.language_model.weight.tensor_model_parallel = True
    model.language_model.bias.requires_grad = False
    assert count_parameters(model, 2) == {"text": (2 * 12 + 3, 2 * 12)}


def test_callback_prints_once_before_the_first_step(toy_trainer, capsys):
    summary = StartSummary("toy", run_dir="runs/toy/1", resume_command="do it again")
    toy_trainer(summary, max_steps=12, val_check_interval=4).fit(ToyModel(), ToyData())
    text = capsys.readouterr().out
    assert text.count("model: toy") == 1
    for line in (
        "parameters: 3, of which 3 train (100 %)",
        "samples per step: 4 = micro batch 2 x DP 1 x accumulation 2",
        "steps: 12 = 1.50 epochs of 8.0 steps",
        "training samples: 32",
        "validation: every 4 steps, 2 batches",
        "layout: 1 process: TP 1 x PP 1 x DP 1 on the CPU",
        "to resume: do it again",
    ):
        assert re.search(f"^{re.escape(line)}$", text, re.MULTILINE), line
    assert "continues" not in text


def test_first_line_of_a_resumed_run_names_its_step(toy_trainer, tmp_path, capsys):
    first = toy_trainer(max_steps=5)
    first.fit(ToyModel(), ToyData())
    first.save_checkpoint(tmp_path / "five.ckpt")
    capsys.readouterr()
    toy_trainer(StartSummary("toy"), max_steps=12).fit(ToyModel(), ToyData(), ckpt_path=tmp_path / "five.ckpt")
    assert "continues: from step 5\nmodel: toy\n" in capsys.readouterr().out


def test_memory_and_tokens_of_an_mllama_like_model():
    """As the estimate for the same numbers, from the parameters that the model has."""
    text, vision = TextShape(4, 2, 32, 64, 4, 2, 128), VisionShape(3, 2, 48, 56, 14, 2, 32)
    model = torch.nn.Module()
    model.config = SimpleNamespace(
        language_model_config=SimpleNamespace(**asdict(text)),
        vision_model_config=SimpleNamespace(**asdict(vision), intermediate_layers_indices=[0, 2]),
    )
    model.megatron_because = lambda: None
    for part, count in parameter_counts(text, vision).items():
        holder = {"tower": "vision_model", "projector": "vision_projection", "text": "language_model"}[part]
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(torch.zeros(count.total), requires_grad=part != "tower")
        setattr(model, holder, layer)
    data = SimpleNamespace(decoder_seq_length=64, micro_batch_size=2, global_batch_size=8)
    trainer = SimpleNamespace(datamodule=data, world_size=1, strategy=SimpleNamespace())

    def expected(**options):
        shape = {"micro_batch_size": 2, "text_tokens": 64, "bf16": False}
        return memory_estimate(text, vision, Training(tower=False), **shape, **options).peak / GIB

    assert memory_gib(trainer, model) == pytest.approx(expected())
    assert layers_run_as(model) == "plain functions"
    model.megatron_because = lambda: "Linear has a forward hook"
    assert memory_gib(trainer, model) == pytest.approx(expected(lean_forward=False))
    assert expected(lean_forward=False) > expected()
    assert layers_run_as(model) == "Megatron's classes: Linear has a forward hook"
    assert _tokens_per_step(model, data) == {"text": 8 * 64, "vision": 8 * 4 * 17}
    del model.config
    assert memory_gib(trainer, model) is None and _tokens_per_step(model, data) == {}
