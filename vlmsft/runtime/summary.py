"""What is about to run, on one screen, before the first step."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from vlmsft.mllama import sizes
from vlmsft.mllama.memory import Training, memory_estimate
from vlmsft.runtime import logging as run_logging
from vlmsft.runtime.progress import global_batch_size, total_steps


@dataclass(frozen=True)
class RunFacts:
    """What the summary says. None and empty stand for "not known" and leave their row out.

    parameters: {"tower": (total, trainable), ...}, of the whole model: tensor-parallel shards are added up
    tokens_per_step: {"text": padded upper bound, "vision": with one image of all tiles in each sample}
    memory_gib_per_gpu: an estimate, for such samples
    layers: what an MLlama's layers run as, and why
    """

    model: str
    parameters: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    precision: str | None = None
    layers: str | None = None
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    data_parallel_size: int = 1
    device: str | None = None
    micro_batch_size: int | None = None
    global_batch_size: int | None = None
    tokens_per_step: Mapping[str, int] = field(default_factory=dict)
    num_train_samples: int | None = None
    max_steps: int | None = None
    first_step: int = 0
    val_check_interval: int | None = None
    num_validation_batches: int | None = None
    memory_gib_per_gpu: float | None = None
    run_dir: str | None = None
    resume_command: str | None = None


def rows(facts: RunFacts) -> list[tuple[str, str]]:
    """(label, text) rows of the summary."""
    table = [("model", facts.model), *_parameter_rows(facts.parameters)]
    if facts.first_step:
        table.insert(0, ("continues", f"from step {facts.first_step:,}"))
    ranks = facts.tensor_model_parallel_size * facts.pipeline_model_parallel_size * facts.data_parallel_size
    layout = f"{ranks} {_plural(ranks, 'process', 'processes')}: TP {facts.tensor_model_parallel_size}"
    layout += f" x PP {facts.pipeline_model_parallel_size} x DP {facts.data_parallel_size}"
    table.append(("layout", f"{layout} on {facts.device}" if facts.device else layout))
    if facts.precision:
        table.append(("precision", facts.precision))
    if facts.layers:
        table.append(("layers", facts.layers))
    table += _step_rows(facts)
    if facts.memory_gib_per_gpu is not None:
        table.append(("memory", f"about {facts.memory_gib_per_gpu:.1f} GiB per GPU (estimate)"))
    if facts.run_dir:
        table.append(("run folder", facts.run_dir))
    if facts.resume_command:
        table.append(("to resume", facts.resume_command))
    return table


def _parameter_rows(parameters: Mapping[str, tuple[int, int]]) -> list[tuple[str, str]]:
    if not parameters:
        return []
    total, trainable = (sum(counts[i] for counts in parameters.values()) for i in (0, 1))
    share = f" ({100 * trainable / total:.3g} %)" if total else ""
    table = [("parameters", f"{_count(total)}, of which {_count(trainable)} train{share}")]
    for part, (size, trained) in parameters.items():
        state = "trains" if trained == size else "frozen" if not trained else f"{_count(trained)} train"
        table.append((f"  {part}", f"{_count(size)}, {state}"))
    return table


def _step_rows(facts: RunFacts) -> list[tuple[str, str]]:
    table = []
    batch, micro = facts.global_batch_size, facts.micro_batch_size
    if batch and micro:
        accumulation = batch // (micro * facts.data_parallel_size)
        formula = f"micro batch {micro} x DP {facts.data_parallel_size} x accumulation {accumulation}"
        table.append(("samples per step", f"{batch} = {formula}"))
    if facts.tokens_per_step:
        parts = [f"{_count(number)} {kind}" for kind, number in facts.tokens_per_step.items()]
        table.append(("tokens per step", ", ".join(parts) + " (one full image per sample)"))
    if facts.max_steps is not None:
        table.append(("steps", f"{facts.max_steps:,}{_epochs(facts)}"))
    if facts.num_train_samples is not None:
        table.append(("training samples", f"{facts.num_train_samples:,}"))
    if facts.num_validation_batches:
        when = f"every {facts.val_check_interval} steps, " if facts.val_check_interval else ""
        batches = _plural(facts.num_validation_batches, "batch", "batches")
        table.append(("validation", f"{when}{facts.num_validation_batches} {batches}"))
    elif facts.num_validation_batches == 0:
        table.append(("validation", "none"))
    return table


def _epochs(facts: RunFacts) -> str:
    if not (facts.num_train_samples and facts.global_batch_size and facts.max_steps):
        return ""
    per_epoch = facts.num_train_samples / facts.global_batch_size
    return f" = {facts.max_steps / per_epoch:.2f} epochs of {per_epoch:,.1f} steps"


def _count(number: int) -> str:
    """E.g. "10.67 B", "23.1 M", "512"."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return str(number)


def _plural(number: int, one: str, many: str) -> str:
    return one if number == 1 else many


def show(facts: RunFacts, console: Console) -> None:
    """A table in a terminal, "label: text" lines elsewhere."""
    if not console.is_terminal:
        lines = [f"{label}: {text}" for label, text in rows(facts)]
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
        return
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in rows(facts):
        table.add_row(label, text)
    console.print(table, markup=False, highlight=False)


class StartSummary(Callback):
    """Prints the summary on global rank 0 before the first training step.

    Not on_fit_start: NeMo applies LoRA and restores a checkpoint after it, and parameters are counted as they train.

    model: name to show
    resume_command: what to type to go on with this run

    Tokens and memory are told for models whose config has MLlama's parts, memory on a GPU only.
    """

    def __init__(
        self,
        model: str,
        precision: str | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        resume_command: str | None = None,
    ):
        self.model = model
        self.precision = precision
        self.run_dir = None if run_dir is None else os.fspath(run_dir)
        self.resume_command = resume_command
        self._shown = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._shown or not trainer.is_global_zero:
            return
        self._shown = True
        show(self.facts(trainer, pl_module), run_logging.console())

    def facts(self, trainer: Trainer, pl_module: LightningModule) -> RunFacts:
        """What the trainer, its data module and the built model say."""
        strategy = trainer.strategy
        tp = getattr(strategy, "tensor_model_parallel_size", 1)
        pp = getattr(strategy, "pipeline_model_parallel_size", 1)
        data = getattr(trainer, "datamodule", None)
        return RunFacts(
            model=self.model,
            parameters=count_parameters(pl_module, tp),
            precision=self.precision or str(trainer.precision),
            layers=layers_run_as(pl_module),
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            data_parallel_size=max(trainer.world_size // (tp * pp), 1),
            device=_device_name(),
            micro_batch_size=getattr(data, "micro_batch_size", None),
            global_batch_size=global_batch_size(trainer),
            tokens_per_step=_tokens_per_step(pl_module, data),
            num_train_samples=getattr(data, "num_train_samples", None),
            max_steps=total_steps(trainer),
            first_step=trainer.global_step,
            val_check_interval=_validation_interval(trainer),
            num_validation_batches=_validation_batches(trainer),
            memory_gib_per_gpu=memory_gib(trainer, pl_module) if torch.cuda.is_available() else None,
            run_dir=self.run_dir,
            resume_command=self.resume_command,
        )


def mllama_shapes(pl_module: LightningModule) -> tuple[sizes.TextShape, sizes.VisionShape] | None:
    config: Any = getattr(pl_module, "config", None)
    if not hasattr(getattr(config, "vision_model_config", None), "intermediate_layers_indices"):
        return None
    return sizes.TextShape.of(config.language_model_config), sizes.VisionShape.of(config.vision_model_config)


def find_mllama(pl_module: LightningModule) -> Any | None:
    """vlmsft's MLlamaBase, in whatever NeMo wrapped it."""
    return next((module for module in pl_module.modules() if hasattr(module, "megatron_because")), None)


def layers_run_as(pl_module: LightningModule) -> str | None:
    mllama = find_mllama(pl_module)
    if mllama is None:
        return None
    reason = mllama.megatron_because()
    return f"Megatron's classes: {reason}" if reason else "plain functions"


def _tokens_per_step(pl_module: LightningModule, data: Any) -> dict[str, int]:
    shapes = mllama_shapes(pl_module)
    if shapes is None or not hasattr(data, "decoder_seq_length"):
        return {}
    vision = shapes[1]
    return sizes.tokens_per_step(
        vision,
        global_batch_size=data.global_batch_size,
        text_tokens=data.decoder_seq_length,
    )


def memory_gib(trainer: Trainer, pl_module: LightningModule) -> float | None:
    """The plan's estimate of one GPU's peak, for the parts that train and the LoRA factors that the model has."""
    data: Any = getattr(trainer, "datamodule", None)
    shapes = mllama_shapes(pl_module)
    if shapes is None or not hasattr(data, "decoder_seq_length"):
        return None
    strategy: Any = trainer.strategy
    tp, mllama = getattr(strategy, "tensor_model_parallel_size", 1), find_mllama(pl_module)
    estimate = memory_estimate(
        *shapes,
        training_of(pl_module, tp),
        micro_batch_size=data.micro_batch_size,
        text_tokens=data.decoder_seq_length,
        tensor_model_parallel_size=tp,
        sequence_parallel=getattr(strategy, "sequence_parallel", False),
        data_parallel_size=max(trainer.world_size // tp, 1),
        distributed_optimizer=getattr(getattr(strategy, "ddp_config", None), "use_distributed_optimizer", False),
        bf16=next(pl_module.parameters()).element_size() == 2,
        lean_forward=mllama is not None and mllama.megatron_because() is None,
        frozen_fp8=getattr(pl_module.config, "frozen_fp8", None),
    )
    return estimate.peak / sizes.GIB


def training_of(pl_module: LightningModule, tensor_model_parallel_size: int = 1) -> Training:
    """What trains in a built MLlama, LoRA applied."""
    config: Any = pl_module.config
    shapes = mllama_shapes(pl_module)
    assert shapes is not None
    counts = count_parameters(pl_module, tensor_model_parallel_size)
    adapted = [name.split(".adapter.")[0] for name, _ in pl_module.named_parameters() if ".adapter." in name]
    # wrappers put more modules above the decoder and the tower
    modules = list(dict.fromkeys(f"module.{name.rpartition('module.')[2]}" for name in adapted))
    width = sum(sizes.lora_matrices(*shapes)[name] for name in modules)
    return Training(
        text=counts["text"][1] > 0,
        tower=counts["tower"][1] > 0,
        projector=counts["projector"][1] > 0,
        lora_modules=modules,
        lora_dim=counts["LoRA"][0] // width if modules else 0,
        lora_dropout=bool(getattr(getattr(pl_module, "model_transform", None), "dropout", True)),
        recompute_text=_recomputes(config.language_model_config),
        recompute_tower=_recomputes(config.vision_model_config),
    )


def _recomputes(config: Any) -> bool:
    return getattr(config, "recompute_granularity", None) == "full"


def count_parameters(module: torch.nn.Module, tensor_model_parallel_size: int = 1) -> dict[str, tuple[int, int]]:
    """{part: (total, trainable)} of the whole model; parts as in `part_of`.

    Megatron marks a sharded parameter with `tensor_model_parallel`; ranks hold equal shards, so one rank knows all.
    """
    counts: dict[str, list[int]] = {}
    for name, parameter in module.named_parameters():
        shards = tensor_model_parallel_size if getattr(parameter, "tensor_model_parallel", False) else 1
        count = counts.setdefault(part_of(name), [0, 0])
        count[0] += parameter.numel() * shards
        count[1] += parameter.numel() * shards if parameter.requires_grad else 0
    order = ["tower", "projector", "text", "LoRA", "other"]
    return {part: (total, trains) for part, (total, trains) in sorted(counts.items(), key=lambda x: order.index(x[0]))}


def part_of(name: str) -> str:
    """tower, projector, text or LoRA, from an MLlama parameter's name; "other" for other models."""
    path = f".{name}."
    for mark, part in (
        (".adapter.", "LoRA"),
        (".vision_projection.", "projector"),
        (".vision_model.", "tower"),
        (".language_model.", "text"),
    ):
        if mark in path:
            return part
    return "other"


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"


def _validation_interval(trainer: Trainer) -> int | None:
    """In optimizer steps; Lightning counts batches, of which one step takes accumulate_grad_batches."""
    batches = trainer.val_check_batch
    if not isinstance(batches, (int, float)) or not math.isfinite(batches):
        return None
    return int(batches) // trainer.accumulate_grad_batches


def _validation_batches(trainer: Trainer) -> int | None:
    total = sum(trainer.num_val_batches)
    return int(total) if math.isfinite(total) else None
