"""A tiny MLlama, micro batches for it, and the same micro batch as NeMo's stock model and as HF take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VOCAB_SIZE = 320
IMAGE_TOKEN = VOCAB_SIZE
PAD_TOKEN = 3
TILE = 56
TOKENS_PER_TILE = (TILE // 14) ** 2 + 1
MAX_TILES = 4
# HF's aspect ratio id -> number of tiles
TILES_OF_ID = {1: 1, 2: 2, 3: 3, 4: 4, 5: 2, 6: 4, 7: 3, 8: 4}

TEXT = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 96,
    "num_cross_attention_layers": 2,
    "vocab_size": VOCAB_SIZE,
    "seq_length": 128,
}
VISION = {
    "num_layers": 4,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "ffn_hidden_size": 80,
    "num_global_layers": 2,
    "vision_chunk_size": TILE,
    "text_hidden_size": 64,
    "intermediate_layers_indices": [0, 2, 3],
}


ON_HOST = {"image_sample", "num_tiles", "aspect_ratio_ids", "visible_from", "visible_until"}
TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "linear_q", "linear_kv"]
"""The text decoder's and the tower's matrices, for LoRA."""


@dataclass(frozen=True)
class Sample:
    """length: unpadded text length; images: (row of the image token, HF's aspect ratio id) in text order."""

    length: int
    images: tuple[tuple[int, int], ...] = ()


CASES: dict[str, tuple[Sample, ...]] = {
    "one tile": (Sample(20, ((0, 1),)),),
    "two tiles": (Sample(20, ((0, 5),)),),
    "three tiles": (Sample(20, ((0, 3),)),),
    "four tiles": (Sample(20, ((0, 6),)),),
    "text before the image": (Sample(20, ((7, 2),)),),
    "mixed tile counts": (Sample(20, ((1, 4),)), Sample(15, ((0, 1),)), Sample(20, ((3, 5),)), Sample(18, ((1, 8),))),
    "several images": (Sample(24, ((1, 2), (9, 3))), Sample(20, ((4, 1),))),
    "images in a row": (Sample(24, ((2, 1), (3, 5), (4, 3), (15, 1))), Sample(22, ((0, 4), (1, 1)))),
    "text-only beside images": (Sample(16), Sample(20, ((2, 7),)), Sample(12)),
}


def make_batch(samples: tuple[Sample, ...], seed: int = 0) -> dict[str, Tensor]:
    """The batch of the contract, with random text, random tiles and labels on about half of the rows."""
    generator = torch.Generator().manual_seed(seed)
    size = max(sample.length for sample in samples) + 3
    tokens = torch.full((len(samples), size), PAD_TOKEN)
    labels = torch.full((len(samples), size), -100)
    rows: dict[str, list[int]] = {
        name: [] for name in ("image_sample", "num_tiles", "aspect_ratio_ids", "visible_from", "visible_until")
    }
    for b, sample in enumerate(samples):
        text = torch.randint(4, VOCAB_SIZE, (sample.length,), generator=generator)
        labelled = torch.rand(sample.length, generator=generator) < 0.5
        labels[b, : sample.length][labelled] = torch.randint(4, VOCAB_SIZE, (int(labelled.sum()),), generator=generator)
        for row, _ in sample.images:
            text[row] = IMAGE_TOKEN
        tokens[b, : sample.length] = text
        for (row, aspect_ratio_id), end in zip(sample.images, visible_until(sample), strict=True):
            rows["image_sample"].append(b)
            rows["num_tiles"].append(TILES_OF_ID[aspect_ratio_id])
            rows["aspect_ratio_ids"].append(aspect_ratio_id)
            rows["visible_from"].append(row)
            rows["visible_until"].append(end)
    host = {name: torch.tensor(values, dtype=torch.int64) for name, values in rows.items()}
    tiles = torch.randint(0, 256, (sum(rows["num_tiles"]), 3, TILE, TILE), dtype=torch.uint8, generator=generator)
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": (labels != -100).float(),
        "position_ids": torch.arange(size).repeat(len(samples), 1),
        "tiles": tiles,
        **host,
    }


def visible_until(sample: Sample) -> list[int]:
    """One past the last row that sees each image: the next image's row; images in a row share the last one's."""
    ends = [row for row, _ in sample.images[1:]] + [sample.length] * bool(sample.images)
    for i in reversed(range(len(ends) - 1)):
        if ends[i] == sample.images[i][0] + 1:
            ends[i] = ends[i + 1]
    return ends


def inputs_of(batch: dict[str, Tensor], *, labels: bool = False) -> dict[str, Tensor]:
    """What MLlamaBase.forward takes."""
    skip = {"loss_mask"} if labels else {"loss_mask", "labels"}
    return {name: value for name, value in batch.items() if name not in skip}


def on_device(batch: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """As a training has it: what is decided on the host stays there."""
    return {name: value if name in ON_HOST else value.to(device) for name, value in batch.items()}


def swap_images(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same batch with other pictures."""
    return {**batch, "tiles": 255 - batch["tiles"]}


def _slots(batch: dict[str, Tensor], pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, list[list[int]]]:
    """(B, slots, 4, 3, H, W) pixels, (B, slots) aspect ratio ids and tile counts, image numbers of each sample."""
    images = [[i for i, s in enumerate(batch["image_sample"].tolist()) if s == b] for b in range(len(batch["tokens"]))]
    num_slots = max(1, *(len(of_sample) for of_sample in images))
    shape = (len(images), num_slots)
    padded = pixels.new_zeros(*shape, MAX_TILES, *pixels.shape[1:])
    ids, counts = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    per_image = pixels.split(batch["num_tiles"].tolist())
    for b, of_sample in enumerate(images):
        for slot, image in enumerate(of_sample):
            count = int(batch["num_tiles"][image])
            padded[b, slot, :count] = per_image[image]
            ids[b, slot], counts[b, slot] = batch["aspect_ratio_ids"][image], count
    return padded, ids, counts, images


def nemo_inputs(batch: dict[str, Tensor], pixels: Tensor) -> dict[str, Any]:
    """The batch for NeMo's stock model; pixels: (T, 3, H, W) normalised.

    A sample without images gets a slot of 0 tiles. Masks come from NeMo's own create_vision_mask_tensor, so they check
    the contract's visible ranges as well.
    """
    from nemo.collections.vlm.mllama.model.utils import create_vision_mask_tensor

    padded, ids, counts, images = _slots(batch, pixels)
    masks = []
    for b, of_sample in enumerate(images):
        text = batch["tokens"][b]
        length = int((text != PAD_TOKEN).nonzero().max()) + 1
        seen = create_vision_mask_tensor(text[:length], IMAGE_TOKEN).tolist() if of_sample else []
        masks.append(seen + [[0, 0]] * (ids.shape[1] - len(of_sample)))
    return {
        "tokens": batch["tokens"],
        "position_ids": batch["position_ids"],
        "batch_images": padded,
        "batch_masks": masks,
        "num_chunks": counts,
        "aspect_ratio_ids": ids,
    }


def hf_inputs(batch: dict[str, Tensor], pixels: Tensor) -> dict[str, Tensor]:
    """The batch for HF's model; pixels: (T, 3, H, W) normalised."""
    if len(pixels) == 0:
        return {"input_ids": batch["tokens"]}
    padded, ids, counts, images = _slots(batch, pixels)
    tiles = torch.arange(MAX_TILES)
    cross = torch.zeros(*batch["tokens"].shape, ids.shape[1], MAX_TILES)
    for b, of_sample in enumerate(images):
        for slot, image in enumerate(of_sample):
            first, end = int(batch["visible_from"][image]), int(batch["visible_until"][image])
            cross[b, first:end, slot, : counts[b, slot]] = 1
    return {
        "input_ids": batch["tokens"],
        "pixel_values": padded,
        "aspect_ratio_ids": ids,
        # HF's processor gives an unused slot one real tile
        "aspect_ratio_mask": (tiles < counts.clamp(min=1).unsqueeze(-1)).long(),
        "cross_attention_mask": cross,
    }


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights of a size that shows in the logits, gates open: a fresh model's gates are 0 and hide the image path."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "gate" in name.rsplit(".", 1)[-1]:
                values = 0.2 + 0.6 * torch.rand(p.shape, generator=generator)
            elif "norm" in name or "ln_p" in name:
                values = 0.1 * torch.randn(p.shape, generator=generator) + (0 if name.endswith("bias") else 1)
            elif p.ndim == 1:
                values = 0.1 * torch.randn(p.shape, generator=generator)
            elif "embed" in name:
                values = 0.5 * torch.randn(p.shape, generator=generator)
            else:
                values = torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5
            p.copy_(values)


def build(layers: str = "torch", text: dict | None = None, vision: dict | None = None, seed: int = 0, **config):
    """vlmsft's tiny MLlamaModel in fp32 with random weights and open gates."""
    from vlmsft.mllama.config import MLlamaConfig, TextConfig, VisionConfig
    from vlmsft.mllama.model import MLlamaModel

    model = MLlamaModel(
        MLlamaConfig(
            layers=layers,
            use_cpu_initialization=True,
            language_model_config=TextConfig(**{**TEXT, **(text or {})}),
            vision_model_config=VisionConfig(**{**VISION, **(vision or {})}),
            **config,
        )
    )
    model.configure_model()
    randomise(model.module, seed)
    return model


def with_lora(targets, **config):
    """The tiny model with NeMo's LoRA on `targets`."""
    from nemo.collections.vlm.peft import LoRA

    model = build(**config)
    add_adapters(model, LoRA(target_modules=targets, dim=4, alpha=8))
    return model


def add_adapters(model, peft):
    """NeMo's PEFT on a built model, of which nothing else trains; random, since fresh adapters add nothing."""
    for p in model.parameters():
        p.requires_grad_(False)
    model.walk(peft.transform)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".adapter." in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))


def hf_config():
    """The same tiny model as a transformers config."""
    from hf_cases import ROPE_SCALING, mllama_config

    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": TEXT["hidden_size"],
        "num_hidden_layers": TEXT["num_layers"] + TEXT["num_cross_attention_layers"],
        "num_attention_heads": TEXT["num_attention_heads"],
        "num_key_value_heads": TEXT["num_query_groups"],
        "intermediate_size": TEXT["ffn_hidden_size"],
        "rope_theta": 500_000,
        "rope_scaling": ROPE_SCALING,
        "cross_attention_layers": [1, 4],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": PAD_TOKEN,
    }
    vision = {
        "hidden_size": VISION["hidden_size"],
        "num_hidden_layers": VISION["num_layers"],
        "num_global_layers": VISION["num_global_layers"],
        "attention_heads": VISION["num_attention_heads"],
        "intermediate_size": VISION["ffn_hidden_size"],
        "vision_output_dim": VISION["hidden_size"] * (1 + len(VISION["intermediate_layers_indices"])),
        "intermediate_layers_indices": VISION["intermediate_layers_indices"],
        "image_size": TILE,
        "patch_size": 14,
        "max_num_tiles": MAX_TILES,
    }
    return mllama_config(text, vision)


def hf_model(seed: int = 0):
    """HF's tiny model as transformers builds it, fp32, random weights, open gates."""
    from transformers import MllamaForConditionalGeneration

    torch.manual_seed(seed)
    model = MllamaForConditionalGeneration(hf_config()).eval()
    randomise(model, seed)
    return model
