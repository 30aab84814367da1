"""The memory estimate beside a GPU: python benchmarks/memory_model.py [--output lines.jsonl] [--only NAME]

Builds MLlama with the code and the YAML of a training (vlmsft's model, NeMo's LoRA, Megatron's DDP and distributed
optimizer, one GPU), takes optimizer steps at several shapes and compares torch's peak with vlmsft.mllama.memory. One
process, seconds a shape; each result is written as a JSON line as soon as it is there, and a shape that runs out of
memory is one. Without a GPU: the tiny model, which shows that the script works and measures nothing.

--table lines.jsonl prints the Markdown of an earlier run's lines.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

from hardware import versions

from vlmsft.mllama.memory import memory_estimate
from vlmsft.mllama.sizes import GIB

PACKAGES = ("torch", "transformer_engine", "megatron-core", "nemo_toolkit")
STEPS = 2  # the optimizer's state is there from the first one on
TEXT, TOWER = "language_model_config", "vision_model_config"
FEW_LAYERS = {f"model.config.{TEXT}.num_layers": 4, f"model.config.{TEXT}.num_cross_attention_layers": 1}


@dataclass(frozen=True)
class Shape:
    """A micro batch of a model; half of the text has labels.

    recompute: the parts with recompute_granularity=full
    """

    micro_batch_size: int
    text_tokens: int = 256
    tiles: int = 2
    recompute: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """A model and the shapes that it is measured at, one after the other. overrides: of conf/train.yaml"""

    name: str
    shapes: tuple[Shape, ...]
    overrides: tuple[str, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)


MODELS = (
    Model(
        "LoRA, text",
        (
            Shape(1),
            Shape(8),
            Shape(24),
            Shape(8, tiles=4),
            Shape(8, tiles=1),
            Shape(8, text_tokens=1024),
            Shape(16, recompute=(TEXT,)),
            Shape(16, text_tokens=1024, recompute=(TEXT,)),
            Shape(32),
        ),
        ("peft=lora",),
    ),
    Model(
        "LoRA, text and tower",
        (Shape(1), Shape(2), Shape(4, recompute=(TOWER,)), Shape(8, recompute=(TEXT, TOWER))),
        ("peft=lora_tower",),
    ),
    Model(
        "full, tower frozen, 4 + 1 layers",
        (Shape(1), Shape(8), Shape(8, text_tokens=1024), Shape(8, text_tokens=1024, recompute=(TEXT,))),
        ("peft=none", "model.config.freeze_vision_model=true"),
        FEW_LAYERS,
    ),
    Model(
        "full, 4 + 1 layers",
        (Shape(1), Shape(2), Shape(4, recompute=(TOWER,))),
        ("peft=none",),
        FEW_LAYERS,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("memory_model.jsonl"))
    parser.add_argument("--only", default="", help="models whose name holds this")
    parser.add_argument("--table", type=Path)
    arguments = parser.parse_args()
    if arguments.table is None:
        measure_all([model for model in MODELS if arguments.only in model.name], arguments.output)
    lines = (arguments.table or arguments.output).read_text().splitlines()
    print(table([json.loads(line) for line in lines]))


def measure_all(models: Iterable[Model], output: Path) -> None:
    started = time.monotonic()
    import torch

    on_gpu = torch.cuda.is_available()
    set_up(on_gpu)
    log(started, "NeMo is imported")
    for model in models:
        with trainer_of(model, on_gpu) as trainer:
            log(started, f"{model.name}: built")
            for shape in model.shapes if on_gpu else small(model.shapes):
                result = trainer.measure(shape)
                with open(output, "a") as lines:
                    lines.write(json.dumps(result) + "\n")
                log(started, f"{model.name}: {describe(result)}: {result['outcome']}")


def small(shapes: Iterable[Shape]) -> list[Shape]:
    """What a CPU computes in no time: each kind once."""
    return list(dict.fromkeys(replace(shape, micro_batch_size=1, text_tokens=64) for shape in shapes))


def log(started: float, text: str) -> None:
    print(f"{time.monotonic() - started:5.0f} s  {text}", flush=True)


def set_up(on_gpu: bool) -> None:
    """Megatron's groups for one process."""
    import torch
    from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage] # as torch documents it

    if not on_gpu:
        from vlmsft.runtime import cpu

        cpu.activate()
    from megatron.core import parallel_state, tensor_parallel

    from vlmsft.config_files import register_resolvers

    register_resolvers()
    device = torch.device("cuda", 0) if on_gpu else None
    backend, store = "nccl" if on_gpu else "gloo", HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, device_id=device)
    parallel_state.initialize_model_parallel(1)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


@contextmanager
def trainer_of(model: Model, on_gpu: bool) -> Iterator[Trainer]:
    """Frees the GPU at the end."""
    import torch

    trainer = Trainer(model, on_gpu)
    try:
        yield trainer
    finally:
        del trainer.ddp, trainer.optimizer, trainer.model
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()


class Trainer:
    """A model behind Megatron's DDP with its distributed optimizer, as NeMo's strategy makes them."""

    def __init__(self, model: Model, on_gpu: bool):
        import fiddle as fdl
        import hydra
        import torch
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import get_megatron_optimizer

        from vlmsft.config_files import root
        from vlmsft.recipe import translate

        self.name, self.on_gpu = model.name, on_gpu
        reset_peak(on_gpu)
        overrides = [*model.overrides, "restore_from=null", "model.config.gate_init=0.5"]
        if on_gpu:
            overrides += [f"{key}={value}" for key, value in model.sizes.items()]
        else:
            overrides += ["experiment=demo"]
        with hydra.initialize_config_dir(str(root() / "conf"), version_base="1.3"):
            cfg = hydra.compose("train", overrides)
        config: Any = fdl.build(translate(cfg.model.config))
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        config.params_dtype, config.bf16, config.autocast_dtype = self.dtype, on_gpu, self.dtype
        config.use_cpu_initialization = not on_gpu
        self.model = config.configure_model()
        add_lora(self.model, cfg.peft)
        self.model.to("cuda" if on_gpu else "cpu").train()
        self.ddp = DistributedDataParallel(
            self.model.config,
            DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
            self.model,
        )
        self.ddp.broadcast_params()
        settings: Any = fdl.build(translate(cfg.optim)).config
        settings.bf16, settings.params_dtype = on_gpu, self.dtype
        self.optimizer = get_megatron_optimizer(settings, [self.ddp])
        self.build_peak_gib = peak_gib(on_gpu)

    def measure(self, shape: Shape) -> dict[str, Any]:
        """The shape, estimates and measured values in GiB (None without a GPU, or where memory ran out)."""
        import torch

        set_recompute(self.model, shape.recompute)
        reset_peak(self.on_gpu)
        outcome, started = "measured" if self.on_gpu else "no GPU", time.monotonic()
        try:
            for _ in range(STEPS):
                self.step(shape)
        except torch.cuda.OutOfMemoryError:
            outcome = "out of memory"
        known = outcome == "measured"
        result = {
            "model": self.name,
            **vars(shape),
            "outcome": outcome,
            "seconds": round(time.monotonic() - started, 2),
            "measured_gib": peak_gib(self.on_gpu) if known else None,
            "reserved_gib": torch.cuda.max_memory_reserved() / GIB if known else None,
            "device_gib": used_gib() if known else None,
            "build_gib": self.build_peak_gib,
            **self.estimates(shape),
            "device": torch.cuda.get_device_name() if self.on_gpu else "CPU",
            "versions": versions(PACKAGES),
        }
        for parameter in self.model.parameters():  # what a step that failed has left
            parameter.grad = None
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
        return result

    def step(self, shape: Shape) -> None:
        """Forward, backward and the optimizer's step."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self.ddp(**self.batch(shape))
        (losses.sum() / losses.numel()).backward()
        self.ddp.finish_grad_sync()
        self.optimizer.step()

    def batch(self, shape: Shape) -> dict[str, Any]:
        """Random text and tiles; each sample's text sees its one image."""
        import torch

        from vlmsft.mllama.step import answer_rows

        config = self.model.config
        device = "cuda" if self.on_gpu else "cpu"
        number, length, vocabulary = shape.micro_batch_size, shape.text_tokens, config.language_model_config.vocab_size
        tokens, labels = torch.randint(0, vocabulary, (2, number, length))
        labels[:, : length // 2] = -100
        side = config.vision_model_config.vision_chunk_size
        tiles = torch.randint(0, 256, (number * shape.tiles, 3, side, side), dtype=torch.uint8)
        return {
            "tokens": tokens.to(device),
            "labels": labels.to(device),
            "answer_rows": answer_rows(labels).to(device),
            "tiles": tiles.to(device),
            "image_sample": torch.arange(number),
            "num_tiles": torch.full((number,), shape.tiles),
            "aspect_ratio_ids": torch.full((number,), {1: 1, 2: 2, 4: 4}[shape.tiles]),
            "visible_from": torch.full((number,), 5),
            "visible_until": torch.full((number,), length),
        }

    def estimates(self, shape: Shape) -> dict[str, float]:
        """As a plan makes them, at the shape's own tiles and labels."""
        from vlmsft.runtime.summary import mllama_shapes, training_of

        shapes = mllama_shapes(self.model)
        assert shapes is not None
        estimate = memory_estimate(
            *shapes,
            training_of(self.model),
            micro_batch_size=shape.micro_batch_size,
            text_tokens=shape.text_tokens,
            answer_tokens=shape.text_tokens - shape.text_tokens // 2,
            tiles_per_image=shape.tiles,
            bf16=self.on_gpu,
            lean_forward=self.model.config.lean_forward,
            frozen_fp8=self.model.config.frozen_fp8,
        )
        parts = {name: value / GIB for name, value in vars(estimate).items()}
        whole = {"estimated_gib": estimate.training / GIB, "estimated_device_gib": estimate.device / GIB}
        return {**whole, **{f"estimated_{name}_gib": value for name, value in parts.items()}}


def add_lora(model: Any, peft: Any) -> None:
    """NeMo's, on a model by itself; freezes the rest."""
    if peft is None:
        return
    import torch
    from nemo.collections.llm import fn
    from nemo.collections.vlm import LoRA

    class Root(torch.nn.Module, fn.FNMixin):
        def __init__(self) -> None:
            super().__init__()
            self.module = model

    settings = {name: peft[name] for name in ("dim", "alpha", "dropout", "dropout_position")}
    model.requires_grad_(False)
    Root().walk(LoRA(target_modules=list(peft.target_modules), **settings).transform)


def set_recompute(model: Any, parts: Iterable[str]) -> None:
    """On the built model, as recompute_granularity=full in the config of these parts."""
    towers = model.vision_model.vision_encoder
    owners = {
        TEXT: [model.config.language_model_config, model.language_model.decoder.config],
        TOWER: [model.config.vision_model_config, towers.config],
    }
    for part, configs in owners.items():
        for config in configs:
            config.recompute_granularity = "full" if part in parts else None


def reset_peak(on_gpu: bool) -> None:
    import torch

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()


def peak_gib(on_gpu: bool) -> float | None:
    import torch

    return torch.cuda.max_memory_allocated() / GIB if on_gpu else None


def used_gib() -> float:
    """All that the GPU has given away."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


def describe(result: dict[str, Any]) -> str:
    text = f"micro batch {result['micro_batch_size']}, {result['text_tokens']} tokens, {result['tiles']} tiles"
    again = [{TEXT: "text", TOWER: "tower"}[part] for part in result["recompute"]]
    return f"{text}, recomputes {' and '.join(again)}" if again else text


def table(results: list[dict[str, Any]]) -> str:
    """Markdown; the difference is of the estimate from torch's peak, "beside" what the GPU gave beyond that."""
    lines = [
        f"{date.today()}, {results[0]['device']}, {results[0]['versions']}",
        "",
        "| model | shape | measured GiB | estimated GiB | difference | beside, measured | beside, estimated |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        measured, estimated = result["measured_gib"], result["estimated_gib"]
        over = result["estimated_device_gib"] - max(estimated, result["estimated_build_gib"])
        cells = [result["outcome"], f"{estimated:.1f}", "", "", f"{over:.1f}"]
        if measured is not None:
            cells[0], cells[2] = f"{measured:.1f}", f"{100 * (estimated / measured - 1):+.1f} %"
            cells[3] = f"{result['device_gib'] - measured:.1f}"
        lines.append(f"| {' | '.join([result['model'], describe(result), *cells])} |")
    builds = {result["model"]: result for result in results if result["build_gib"] is not None}
    lines += [""] + [
        f"{name}: build {result['build_gib']:.1f} GiB measured, {result['estimated_build_gib']:.1f} estimated"
        for name, result in builds.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
