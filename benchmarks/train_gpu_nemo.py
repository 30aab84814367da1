"""NeMo's recipe as shipped, and vlmsft: llm.finetune with samples that are there, timed by a callback."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fiddle as fdl
import lightning.pytorch as pl
import nemo_run as run
import torch
from memory_model import set_recompute
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from omegaconf import DictConfig
from train_gpu_cases import (
    GATE,
    TEXT,
    Case,
    Clock,
    Phase,
    compose,
    free_memory,
    micro_batches,
    peak_gib,
    reset_peak,
)

Report = Callable[[Phase, dict[str, Any]], None]
GATES = ("gate_attn", "gate_ffn", "gate", "gated_positional_embedding_gate")
"""As vlmsft.mllama.model's, which opens its own."""


def measure(case: Case, cfg: DictConfig, report: Report, on_gpu: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        samples = Prepared(case, cfg, on_gpu)
        recipe = {"nemo": nemo_recipe, "vlmsft": vlmsft_recipe}[case.system](case, folder, on_gpu)
        recipe.data = run.Config(PreparedData, prepared=samples)
        recipe.trainer.max_steps = sum(phase.warm_up + phase.steps for phase in case.phases)
        task: Any = fdl.build(recipe)
        # behind all others, so that what they do at a step's end is part of the step
        task.keywords["trainer"].callbacks.append(Phases(case, samples, report, on_gpu))
        task()


# --- recipes ----------------------------------------------------------------------------------------------------------


def nemo_recipe(case: Case, folder: str, on_gpu: bool) -> run.Partial:
    """NeMo's, changed only in what its weights, data and files are: random weights, our samples, no checkpoints, logs
    or validation; and a warm-up shorter than the few steps. Its tokenizer is the data's, as the recipe's own comes with
    the pretrained weights."""
    from nemo.collections.vlm.recipes import mllama_11b

    recipe = mllama_11b.finetune_recipe(dir=folder, name="benchmark", peft_scheme="lora", num_gpus_per_node=1)
    recipe.resume = None
    recipe.tokenizer = "data"
    recipe.log.ckpt = recipe.log.tensorboard = None
    recipe.trainer.logger = recipe.trainer.enable_checkpointing = False
    recipe.trainer.limit_val_batches = 0
    recipe.optim.lr_scheduler.warmup_steps = 1
    return recipe


def vlmsft_recipe(case: Case, folder: str, on_gpu: bool) -> run.Partial:
    """conf/train.yaml's, without checkpoints, validation and the answers that go with it; all other callbacks stay."""
    from vlmsft.recipe import finetune_recipe

    run_dir = Path(folder, "run")
    run_dir.mkdir()
    cfg = compose(
        case,
        on_gpu,
        f"run_dir='{run_dir}'",
        "log.ckpt=null",
        "+trainer.enable_checkpointing=false",
        "trainer.limit_val_batches=0",
        "trainer.callbacks.answers=null",
        "optim.warmup_steps=1",
    )
    return finetune_recipe(cfg)


class Tokenizer:
    """All that NeMo's model asks one for."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size


# --- data -------------------------------------------------------------------------------------------------------------


class Prepared:
    """Micro batches of the phase that is on; serves them for ever."""

    def __init__(self, case: Case, cfg: DictConfig, on_gpu: bool):
        self.case, self.cfg, self.on_gpu = case, cfg, on_gpu
        self._batches: Iterator[dict[str, Any]] = iter(())

    def turn_to(self, phase: Phase) -> None:
        self._batches = itertools.cycle(micro_batches(phase, self.case.system, self.cfg, self.on_gpu))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield dict(next(self._batches))


class Sampler(MegatronDataSampler):
    """NeMo's, for samples that have an order."""

    def transform_dataloader(self, dataloader: Any, consumed_samples: int = 0) -> Any:
        return dataloader


class PreparedData(pl.LightningDataModule):
    def __init__(self, prepared: Prepared):
        super().__init__()
        self.prepared = prepared
        phase = prepared.case.phases[0]
        self.micro_batch_size, self.global_batch_size = phase.micro_batch_size, phase.global_batch_size
        self.seq_length, self.decoder_seq_length = 6404, phase.text_tokens
        self.tokenizer = Tokenizer(prepared.cfg.model.config[TEXT].vocab_size)
        self.data_sampler = Sampler(
            seq_len=self.seq_length,
            decoder_seq_len=self.decoder_seq_length,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size,
        )

    def turn_to(self, phase: Phase) -> None:
        """NeMo reads the sampler's sizes, and Megatron's number of micro batches, at the start of each step."""
        from megatron.core.num_microbatches_calculator import reconfigure_num_microbatches_calculator

        self.prepared.turn_to(phase)
        self.decoder_seq_length = self.data_sampler.decoder_seq_len = phase.text_tokens
        for owner in (self, self.data_sampler):
            owner.micro_batch_size, owner.global_batch_size = phase.micro_batch_size, phase.global_batch_size
        reconfigure_num_microbatches_calculator(
            rank=0,
            rampup_batch_size=None,
            global_batch_size=phase.global_batch_size,
            micro_batch_size=phase.micro_batch_size,
            data_parallel_size=1,
        )

    def train_dataloader(self) -> Prepared:
        return self.prepared

    def val_dataloader(self) -> list:
        return []


# --- phases -----------------------------------------------------------------------------------------------------------


class Phases(pl.Callback):
    """Takes a training through a case's phases. One that runs out of memory is reported, and the next begins."""

    def __init__(self, case: Case, prepared: Prepared, report: Report, on_gpu: bool):
        self.case, self.prepared, self.report, self.on_gpu = case, prepared, report, on_gpu
        self.clock = Clock(on_gpu)
        self.waiting = list(case.phases)
        self.phase: Phase | None = None
        self.step = 0
        self.failed = False
        self.build_peak: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.case.system == "nemo":
            open_gates(pl_module)
        self.build_peak = peak_gib(self.on_gpu)
        strategy: Any = trainer.strategy
        strategy.training_step = self._surviving(strategy, strategy.training_step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.phase is None:
            self._begin(trainer, pl_module)
        assert self.phase is not None
        if self.step == self.phase.warm_up:
            self.clock.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.phase is not None
        self.step += 1
        of_phase = self.phase.warm_up + self.phase.steps
        if self.failed:
            loop: Any = trainer.fit_loop.epoch_loop
            loop.max_steps -= of_phase - self.step
            self._end({"outcome": "out of memory"})
            return
        if self.step > self.phase.warm_up:
            self.clock.mark()
        if self.step == of_phase:
            times = self.clock.stop()
            loss = float(trainer.callback_metrics["reduced_train_loss"])
            self._end({"outcome": "measured", **times, "peak_gib": peak_gib(self.on_gpu), "loss": loss})

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.phase, self.step, self.failed = self.waiting.pop(0), 0, False
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue] # Lightning sets it
        data.turn_to(self.phase)
        if self.case.system == "vlmsft":
            model = next(module for module in pl_module.modules() if hasattr(module, "vision_model"))
            set_recompute(model, self.phase.recompute)
        free_memory(self.on_gpu)
        reset_peak(self.on_gpu)

    def _end(self, result: dict[str, Any]) -> None:
        assert self.phase is not None
        self.report(self.phase, {**result, "build_gib": self.build_peak})
        self.phase = None

    def _surviving(self, strategy: Any, training_step: Callable) -> Callable:
        """training_step, or where the GPU is full a loss of 0 and gradients of 0."""

        def step(*args: Any, **kwargs: Any) -> Any:
            try:
                return training_step(*args, **kwargs)
            except torch.cuda.OutOfMemoryError:
                self.failed = True
            free_memory(self.on_gpu)  # here, where the exception with its frames is gone
            for chunk in strategy.model:
                chunk.zero_grad_buffer()
            return torch.zeros((), device=strategy.root_device)

        return step


def open_gates(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rsplit(".", 1)[-1] in GATES:
                parameter.fill_(GATE)
