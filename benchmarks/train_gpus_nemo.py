"""NeMo's recipe with the tutorial's values, below torchrun:

    train_gpus_nemo.py FILES FOLDER GPUS MICRO_BATCH [--make-only]

FILES: what input_pipeline.py made. FOLDER: gets speed.json. Changed of the tutorial only what its weights and files
are: random weights, no checkpoints, logs or validation, fewer steps and a smaller global batch, which leaves samples/s
as they are but for the optimizer's share.

--make-only: makes recipe and data and reads one micro batch, for where there is no GPU.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import fiddle as fdl
import lightning.pytorch as pl
import nemo_run as run
import torch
from nemo import lightning as nl
from nemo.collections import vlm
from nemo.collections.llm.recipes.optim.adam import distributed_fused_adam_with_cosine_annealing
from nemo.collections.vlm.neva.data.conversation import conv_templates
from nemo.collections.vlm.recipes import mllama_11b
from transformers import AutoProcessor

WARM_UP, STEPS = 1, 3
ACCUMULATION = 8  # micro batches of a rank in a step; the tutorial has 32


class Clock(pl.Callback):
    """Writes the median step, with the GPU idle before and after; after the first, which compiles."""

    def __init__(self, folder: str, global_batch_size: int, micro_batch_size: int):
        self.folder, self.global_batch_size, self.micro_batch_size = Path(folder), global_batch_size, micro_batch_size
        self.times: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.cuda.synchronize()
        self.last = time.monotonic()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        torch.cuda.synchronize()
        now = time.monotonic()
        self.times.append(now - self.last)
        self.last = now
        if trainer.global_rank == 0 and len(self.times) > WARM_UP:
            self.write()

    def write(self) -> None:
        seconds = statistics.median(self.times[WARM_UP:])
        found = {
            "step_seconds": seconds,
            "samples_per_second": self.global_batch_size / seconds,
            "micro_batch_size": self.micro_batch_size,
            "global_batch_size": self.global_batch_size,
            "steps": len(self.times),
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        }
        (self.folder / "speed.json").write_text(json.dumps(found))


def recipe(files: Path, folder: Path, gpus: int, micro_batch_size: int) -> run.Partial:
    global_batch_size = ACCUMULATION * micro_batch_size * max(gpus // 2, 1)
    made = mllama_11b.finetune_recipe(
        dir=str(folder), name="benchmark", num_nodes=1, num_gpus_per_node=gpus, peft_scheme="none"
    )
    made.trainer.strategy = run.Config(
        nl.MegatronStrategy,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=1,
        encoder_pipeline_model_parallel_size=0,
        pipeline_dtype=torch.bfloat16,
    )
    made.optim = distributed_fused_adam_with_cosine_annealing(max_lr=2.0e-5, min_lr=2.0e-07, warmup_steps=1)
    made.trainer.max_steps = WARM_UP + STEPS
    made.trainer.log_every_n_steps = 1
    made.trainer.limit_val_batches = 0
    made.trainer.callbacks.append(run.Config(Clock, str(folder), global_batch_size, micro_batch_size))
    made.resume, made.tokenizer = None, "data"
    made.log.ckpt = made.log.tensorboard = None
    made.trainer.logger = made.trainer.enable_checkpointing = False
    made.data = run.Config(data, str(files), global_batch_size, micro_batch_size)
    return made


def data(files: str, global_batch_size: int, micro_batch_size: int) -> Any:
    """The tutorial's, whose class differs from NeMo's in its validation set only. NeMo reads a list of records, and the
    tokenizer of each sample from a hub's id that is written in its code: here it is our processor's."""
    folder = Path(files)
    records = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    listed = folder / "train.json"
    if not listed.exists():
        mine = listed.with_name(f"train-{time.monotonic_ns()}.json")  # all ranks write the same
        mine.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
        mine.rename(listed)
    processor = str(folder / "processor")
    conv_templates["mllama"].tokenizer_name_or_path = processor
    loaded = AutoProcessor.from_pretrained(processor)
    return vlm.MLlamaPreloadedDataModule(
        paths=[str(listed)],
        data_config=vlm.ImageDataConfig(image_folder=str(folder / "images"), conv_template="mllama"),
        seq_length=6404,
        decoder_seq_length=2048,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        tokenizer=loaded.tokenizer,
        image_processor=loaded.image_processor,
        num_workers=2,
    )


def main(files: Path, folder: Path, gpus: int, micro_batch_size: int, make_only: bool) -> None:
    folder.mkdir(exist_ok=True)
    made = recipe(files, folder, gpus, micro_batch_size)
    if not make_only:
        run.run(made, direct=True)
        return
    module: Any = fdl.build(made.data)
    module.setup()
    samples = [module._train_ds[number] for number in range(micro_batch_size)]
    batch = module._train_ds.collate_fn(samples)
    (folder / "speed.json").write_text(json.dumps({"tokens": list(batch["tokens"].shape)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), "--make-only" in sys.argv)
