"""How fast training is: samples, tokens and FLOPs per second, waiting for data, memory; for metrics.csv and loggers.

All is counted on the host, from tensors that are there anyway; the GPU is never waited for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from vlmsft.mllama.flops import Costs, Counts, count_batch, step_costs
from vlmsft.mllama.sizes import GIB, VisionShape
from vlmsft.mllama.step import WAIT_KEY
from vlmsft.runtime.progress import Pause, data_parallel_group, global_batch_size
from vlmsft.runtime.summary import mllama_shapes, training_of

PEAK_FLOPS = {
    # of dense matrix products in bf16, from NVIDIA's data sheets (which print twice the number, "with sparsity")
    "H100 PCIe": 756e12,  # nvidia.com/en-us/data-center/h100
    "H100 NVL": 835e12,
    "H100": 989e12,  # SXM, as the H200 and the GH200
    "H200": 989e12,  # nvidia.com/en-us/data-center/h200
    "GH200": 989e12,
    "B200": 2250e12,  # nvidia.com/en-us/data-center/hgx
    "A100": 312e12,  # nvidia.com/en-us/data-center/a100
    "L40S": 362e12,  # nvidia.com/en-us/data-center/l40s
    "L4": 121e12,  # nvidia.com/en-us/data-center/l4
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its name (torch.cuda.get_device_name()); None for one that the table lacks."""
    words = device_name.replace("-", " ").split()
    known = [name for name in PEAK_FLOPS if all(word in words for word in name.split())]
    return PEAK_FLOPS[max(known, key=len)] if known else None


@dataclass
class _Interval:
    """Since the last logged step, on this rank."""

    started: float
    first_step: int
    counts: Counts = field(default_factory=Counts)
    waited: float = 0.0


class Throughput(Callback):
    """Logs every `trainer.log_every_n_steps` steps and at the last one, as means since the time before:

    step_seconds: of an optimizer step, without validation and checkpoints
    samples_per_second: of all data-parallel ranks
    tokens_per_second: text tokens without padding, of all ranks
    tflops_per_second_per_gpu: model FLOPs (vlmsft.mllama.flops: nothing twice, text without padding, 1e12)
    mfu: these as a share of the GPU's dense bf16 peak (PEAK_FLOPS); not in fp32, nor where the peak isn't known
    data_wait_fraction: share of the time that the host waited for the next micro batch, mean over the ranks
    peak_memory_gib: highest allocation since the start on the rank that writes (torch's allocator); on a GPU

    The first step pays for compilation and first allocations, and it is logged as it was. Tokens and FLOPs are logged
    for MLlamas.
    """

    def __init__(self) -> None:
        self._interval: _Interval | None = None
        self._pause = Pause()
        self._vision: VisionShape | None = None
        self._costs: Costs | None = None
        self._peak: float | None = None
        self._is_known = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._interval = _Interval(time.monotonic(), trainer.global_step)
        self._pause = Pause()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._interval is not None:
            self._interval.started += self._pause.end(time.monotonic())
        if not self._is_known:  # not earlier: NeMo applies LoRA after on_fit_start
            self._look_at(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause.begin(time.monotonic())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._pause.begin(time.monotonic())

    def on_megatron_microbatch_start(self, step: Any, batch: Any) -> None:
        """NeMo hands Lightning's hooks only the last micro batch of a step; this hook sees each of them."""
        if self._interval is None or self._vision is None or step.trainer is None or not step.trainer.training:
            return
        self._interval.counts += counts_of(batch, self._vision)
        self._interval.waited += batch[WAIT_KEY]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, interval = trainer.global_step, self._interval
        every = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue] # set from outside the class
        if interval is None or step == interval.first_step or not (step % every == 0 or step == trainer.max_steps):
            return
        now = time.monotonic()
        for name, value in self._metrics(trainer, interval, now - interval.started, step - interval.first_step).items():
            # not a number: Lightning would copy it to the GPU, which waits for all that the GPU has to do
            pl_module.log(name, torch.as_tensor(value, dtype=torch.float32), batch_size=1)
        self._interval = _Interval(now, step)

    def _metrics(
        self, trainer: Trainer, interval: _Interval, seconds: float, num_steps: int
    ) -> Mapping[str, float | torch.Tensor]:
        metrics: dict[str, float | torch.Tensor] = {"step_seconds": seconds / num_steps}
        batch_size = global_batch_size(trainer)
        if batch_size:
            metrics["samples_per_second"] = num_steps * batch_size / seconds
        if self._costs is not None:
            flops = self._costs.of(interval.counts)
            tokens, flops, waited = _sum_over_data_parallel_ranks([interval.counts.text, flops, interval.waited])
            metrics["tokens_per_second"] = tokens / seconds
            per_gpu = flops / seconds / trainer.world_size
            metrics["tflops_per_second_per_gpu"] = per_gpu / 1e12
            if self._peak is not None:
                metrics["mfu"] = per_gpu / self._peak
            metrics["data_wait_fraction"] = waited / seconds / _num_data_parallel_ranks()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            metrics["peak_memory_gib"] = torch.cuda.max_memory_allocated() / GIB
        return metrics

    def _look_at(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_known = True
        shapes = mllama_shapes(pl_module)
        if shapes is None:
            return
        self._vision = shapes[1]
        tp = getattr(trainer.strategy, "tensor_model_parallel_size", 1)
        self._costs = step_costs(*shapes, training_of(pl_module, tp))
        if torch.cuda.is_available() and next(pl_module.parameters()).element_size() == 2:
            self._peak = peak_flops(torch.cuda.get_device_name())


def counts_of(batch: Mapping[str, Any], vision: VisionShape) -> Counts:
    """Of a micro batch as `data_step` gives it: host tensors and shapes only."""
    rows = batch["visible_until"] - batch["visible_from"]
    return count_batch(
        vision,
        text_tokens=batch["num_text_tokens"].tolist(),
        num_answers=len(batch["answer_rows"]),
        num_tiles=batch["num_tiles"].tolist(),
        visible_rows=rows.tolist(),
    )


def _num_data_parallel_ranks() -> int:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size(data_parallel_group())


def _sum_over_data_parallel_ranks(values: list[float]) -> list[float] | list[torch.Tensor]:
    """A collective, which no one waits for: on GPUs the sums are tensors there, read when a logger writes them."""
    if _num_data_parallel_ranks() == 1:
        return values
    group = data_parallel_group()
    sums = torch.tensor(values, dtype=torch.float64)
    if torch.distributed.get_backend(group) == "nccl":
        sums = sums.pin_memory().to("cuda", non_blocking=True)
    torch.distributed.all_reduce(sums, group=group)
    return list(sums)
