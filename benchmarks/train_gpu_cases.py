"""What train_gpu.py measures: the cases, their floor, and the same samples in the form that each system takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

GLOBAL_BATCH = 8
GATE = 0.5
PEAK_TFLOPS = 798  # of a large bf16 matrix product on an H100, measured: what the floor is computed with
IMAGE_ROW = 5  # of the text: the image's token, from which on the text sees it
ASPECT_RATIO_IDS = {1: 1, 2: 2, 3: 3, 4: 6}  # HF's, of so many tiles
MAX_TILES = 4
TEXT, TOWER = "language_model_config", "vision_model_config"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Phase:
    """Optimizer steps of one shape. Half of the text has labels.

    warm_up, steps: optimizer steps before the clock starts, and those that it measures
    recompute: the parts of vlmsft's model with recompute_granularity=full
    """

    micro_batch_size: int
    text_tokens: int = 256
    tiles: int = 2
    warm_up: int = 3
    steps: int = 6
    recompute: tuple[str, ...] = ()

    @property
    def global_batch_size(self) -> int:
        return max(GLOBAL_BATCH, self.micro_batch_size)


@dataclass(frozen=True)
class Case:
    """A process of its own: one model, and the phases that it goes through.

    overrides: of conf/train.yaml. They say what vlmsft trains, and for every system what the floor counts
    fits: text layers as many as fit the GPU with the first phase
    """

    name: str
    system: str
    phases: tuple[Phase, ...]
    overrides: tuple[str, ...] = ("peft=lora",)
    fits: bool = False
    note: str = ""


TOWER_TOO = "LoRA on text and tower"
MAIN = (
    Case(
        "nemo",
        "nemo",
        # the last one is expected to run out of memory
        (Phase(1, warm_up=2, steps=4), Phase(4, warm_up=2, steps=4), Phase(8, warm_up=1, steps=3)),
        ("peft=lora_tower",),  # what its target_modules hit
        note=TOWER_TOO,
    ),
    Case("hf", "hf", tuple(Phase(size, warm_up=2, steps=5) for size in (1, 4, 8))),
    Case("vlmsft", "vlmsft", tuple(Phase(size) for size in (1, 2, 4, 8, 16))),
)
MORE = (
    Case(
        "vlmsft-fp8",
        "vlmsft",
        tuple(Phase(size, warm_up=2, steps=5) for size in (4, 8, 16)),
        ("peft=lora", "model.config.frozen_fp8=tower"),
        note="the tower in fp8",
    ),
    Case(
        "vlmsft-fp8-all",
        "vlmsft",
        tuple(Phase(size, warm_up=2, steps=5) for size in (4, 8, 16)),
        ("peft=lora", "model.config.frozen_fp8=all"),
        note="tower and text in fp8",
    ),
    Case("hf-long", "hf", (Phase(4, text_tokens=1024, warm_up=2, steps=4),)),
    Case(
        "vlmsft-shapes",
        "vlmsft",
        (*(Phase(size, text_tokens=1024) for size in (1, 4, 8)), *(Phase(size, tiles=4) for size in (1, 8))),
    ),
    Case(
        "vlmsft-tower",
        "vlmsft",
        (Phase(1, steps=4), Phase(2, steps=4), Phase(4, steps=4, recompute=(TOWER,))),
        ("peft=lora_tower",),
        note=TOWER_TOO,
    ),
    Case(
        "vlmsft-full",
        "vlmsft",
        (Phase(8, steps=4), Phase(1, steps=4)),
        ("peft=none", "model.config.freeze_vision_model=true"),
        fits=True,
        note="all weights of the text decoder, tower frozen",
    ),
)
SETS = {"main": MAIN, "more": MORE, "all": (*MAIN, *MORE)}


def small(case: Case) -> Case:
    """What a CPU computes in no time: each kind of phase, two short steps."""
    phases = dict.fromkeys(
        replace(phase, micro_batch_size=min(phase.micro_batch_size, 4), text_tokens=64, warm_up=1, steps=2)
        for phase in case.phases
    )
    return replace(case, phases=tuple(phases), fits=False)


# --- the config that vlmsft trains with, and that every floor is computed from ----------------------------------------


def compose(case: Case, on_gpu: bool, *more: str) -> DictConfig:
    """conf/train.yaml with the case's overrides and `more`; without a GPU the demo's tiny model on the CPU."""
    import hydra

    from vlmsft.config_files import register_resolvers, root

    register_resolvers()
    where = ["model=mllama_11b", "trainer.devices=1"] if on_gpu else ["experiment=demo", "~trainer.callbacks.overfit"]
    gates = [f"model.config.gate_init={GATE}", "restore_from=null"]
    data = ["data.train_path=none", "data.validation_path=null", "data.image_folder=null"]
    overrides = [*where, *case.overrides, *gates, *data, *more]
    with hydra.initialize_config_dir(str(root() / "conf"), version_base="1.3"):
        cfg = hydra.compose("train", overrides)
        if not case.fits:
            return cfg
        return hydra.compose("train", [*overrides, *fewer_layers(cfg, case.phases[0])])


def fewer_layers(cfg: DictConfig, phase: Phase) -> list[str]:
    """Overrides for the most text layers, with a cross-attention layer to each four, that fit the GPU by estimate."""
    key, text = f"model.config.{TEXT}", cfg.model.config[TEXT]
    for number in range(text.num_layers, 0, -1):
        text.num_layers, text.num_cross_attention_layers = number, max(1, number // 4)
        if device_gib(cfg, phase) <= cfg.gpu_memory_gib:
            return [f"{key}.{name}={text[name]}" for name in ("num_layers", "num_cross_attention_layers")]
    raise ValueError("not even one layer fits")


def device_gib(cfg: DictConfig, phase: Phase) -> float:
    from vlmsft import estimates
    from vlmsft.facts import Facts
    from vlmsft.mllama.memory import memory_estimate
    from vlmsft.mllama.sizes import GIB

    facts = Facts(cfg)
    estimate = memory_estimate(
        *estimates.shapes_of(facts),
        estimates.training(facts),
        micro_batch_size=phase.micro_batch_size,
        text_tokens=phase.text_tokens,
        answer_tokens=phase.text_tokens - phase.text_tokens // 2,
        tiles_per_image=phase.tiles,
        frozen_fp8=cfg.model.config.frozen_fp8,
    )
    return estimate.device / GIB


def tflop_per_sample(cfg: DictConfig, phase: Phase) -> float:
    """Model FLOPs (vlmsft.mllama.flops) of a sample, in 1e12."""
    from vlmsft import estimates
    from vlmsft.facts import Facts
    from vlmsft.mllama.flops import count_batch, step_costs

    facts = Facts(cfg)
    text, vision = estimates.shapes_of(facts)
    length = phase.text_tokens
    counts = count_batch(
        vision,
        text_tokens=[length],
        num_answers=length - length // 2,
        num_tiles=[phase.tiles],
        visible_rows=[length - IMAGE_ROW],
    )
    return step_costs(text, vision, estimates.training(facts)).of(counts) / 1e12


# --- the samples ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """A micro batch before any system's form. text (B, S + 1), labels (B, S), tiles: uint8 (tiles of sample, 3, H, W)
    for each; every sample's text sees its one image from IMAGE_ROW on."""

    text: Tensor
    labels: Tensor
    tiles: list[Tensor]

    @classmethod
    def random(cls, num_tiles: Sequence[int], text_tokens: int, vocab_size: int, side: int, seed: int) -> Samples:
        import torch

        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(0, vocab_size, (len(num_tiles), text_tokens + 1), generator=generator)
        labels = text[:, 1:].clone()
        labels[:, : text_tokens // 2] = -100
        text[:, IMAGE_ROW] = vocab_size  # the image's token comes after the text's
        return cls(text, labels, random_tiles(num_tiles, side, generator))

    @property
    def num_tiles(self) -> list[int]:
        return [len(tiles) for tiles in self.tiles]

    def with_other_images(self, seed: int) -> Samples:
        import torch

        generator = torch.Generator().manual_seed(seed)
        return replace(self, tiles=random_tiles(self.num_tiles, self.tiles[0].shape[-1], generator))

    def text_part(self) -> dict[str, Tensor]:
        """What NeMo's batch and vlmsft's have in common."""
        import torch

        size, length = self.labels.shape
        return {
            "tokens": self.text[:, :-1].contiguous(),
            "labels": self.labels,
            "loss_mask": (self.labels != -100).float(),
            "position_ids": torch.arange(length).repeat(size, 1),
        }

    def for_vlmsft(self) -> dict[str, Any]:
        """As vlmsft.data.collate makes it."""
        import torch

        size, length = self.labels.shape
        return {
            **self.text_part(),
            "tiles": torch.cat(self.tiles),
            "image_sample": torch.arange(size),
            "num_tiles": torch.tensor(self.num_tiles),
            "aspect_ratio_ids": torch.tensor([ASPECT_RATIO_IDS[number] for number in self.num_tiles]),
            "visible_from": torch.full((size,), IMAGE_ROW),
            "visible_until": torch.full((size,), length),
            "num_text_tokens": torch.full((size,), length),
            "num_truncated_tokens": torch.zeros(size, dtype=torch.int64),
        }

    def for_nemo(self) -> dict[str, Any]:
        """As NeMo's MLlamaPreloadedDataset and MockDataModule collate it: fp32 pixels of four tiles, one slot."""
        import torch

        pixels, ids, _ = self._slots()
        return {
            **self.text_part(),
            "attention_mask": None,
            "batch_images": pixels,
            "batch_masks": [torch.tensor([[IMAGE_ROW, self.labels.shape[1]]]) for _ in self.tiles],
            "num_chunks": torch.tensor(self.num_tiles).unsqueeze(1),
            "aspect_ratio_ids": ids,
        }

    def for_hf(self) -> dict[str, Any]:
        """As MllamaProcessor makes it, less its attention mask (nothing is padded). The labels are shifted already,
        and loss sums are divided by the step's labels, as transformers' Trainer does."""
        import torch

        size, length = self.labels.shape
        pixels, ids, mask = self._slots()
        cross = torch.zeros(size, length, 1, MAX_TILES, dtype=torch.int64)
        cross[:, IMAGE_ROW:] = mask.unsqueeze(1)
        return {
            "input_ids": self.text[:, :-1].contiguous(),
            "labels": self.labels,
            "shift_labels": self.labels,
            "pixel_values": pixels,
            "aspect_ratio_ids": ids,
            "aspect_ratio_mask": mask,
            "cross_attention_mask": cross,
        }

    def _slots(self) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 1, 4, 3, H, W) normalised pixels, (B, 1) aspect ratio ids, (B, 1, 4) which tiles are real."""
        import torch

        pixels = torch.zeros(len(self.tiles), 1, MAX_TILES, *self.tiles[0].shape[1:])
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        for of_sample, tiles in zip(pixels, self.tiles, strict=True):
            of_sample[0, : len(tiles)] = (tiles / 255 - mean) / std
        counts = torch.tensor(self.num_tiles).view(-1, 1, 1)
        ids = torch.tensor([[ASPECT_RATIO_IDS[number]] for number in self.num_tiles])
        return pixels, ids, (torch.arange(MAX_TILES) < counts).long()


def random_tiles(num_tiles: Sequence[int], side: int, generator: Any) -> list[Tensor]:
    """Pictures of 7 x 7 coloured fields: noise of pixels would be the same to a tower, whatever the seed."""
    import torch

    fields = [torch.randint(0, 256, (number, 3, 7, 7), generator=generator) for number in num_tiles]
    times = -(-side // 7)
    grown = [f.repeat_interleave(times, 2).repeat_interleave(times, 3)[..., :side, :side] for f in fields]
    return [tiles.to(torch.uint8).contiguous() for tiles in grown]


FORMS = {"vlmsft": Samples.for_vlmsft, "nemo": Samples.for_nemo, "hf": Samples.for_hf}


def micro_batches(phase: Phase, system: str, cfg: DictConfig, on_gpu: bool) -> list[dict[str, Any]]:
    """Two, to be served in turn, in pinned memory as loaders with pin_memory leave them."""
    sizes, batches = cfg.model.config, []
    for seed in range(2):
        samples = Samples.random(
            [phase.tiles] * phase.micro_batch_size,
            phase.text_tokens,
            sizes[TEXT].vocab_size,
            sizes[TOWER].vision_chunk_size,
            seed,
        )
        batches.append(pinned(FORMS[system](samples)) if on_gpu else FORMS[system](samples))
    return batches


def pinned(batch: dict[str, Any]) -> dict[str, Any]:
    import torch

    return {key: value.pin_memory() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


# --- the clock --------------------------------------------------------------------------------------------------------


class Clock:
    """Times a phase, the same way in every system: (GPU idle; the steps; GPU idle) / steps. Between these two points no
    step is waited for. Beside it the median of the times between CUDA events at the steps' ends."""

    def __init__(self, on_gpu: bool):
        self.on_gpu = on_gpu
        self._marks: list[Any] = []
        self._started = 0.0

    def start(self) -> None:
        self._wait()
        self._marks = []
        self._started = time.perf_counter()
        self.mark()

    def mark(self) -> None:
        """After each step."""
        if not self.on_gpu:
            self._marks.append(time.perf_counter())
            return
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def stop(self) -> dict[str, float]:
        self._wait()
        seconds = time.perf_counter() - self._started
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        each = [a.elapsed_time(b) / 1000 if self.on_gpu else b - a for a, b in pairs]
        return {"step_seconds": seconds / len(pairs), "median_step_seconds": statistics.median(each)}

    def _wait(self) -> None:
        import torch

        if self.on_gpu:
            torch.cuda.synchronize()


def reset_peak(on_gpu: bool) -> None:
    import torch

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()


def peak_gib(on_gpu: bool) -> float | None:
    """torch's allocator, since the last reset."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None


def free_memory(on_gpu: bool) -> None:
    import gc

    import torch

    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
