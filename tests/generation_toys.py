"""A tiny model that answers the packaged processor's tokens: random weights, gates open, so images change answers."""

from __future__ import annotations

from pathlib import Path

import torch
from hf_cases import ROPE_SCALING, mllama_config

from vlmsft.config_files import sample_set

PROCESSOR = f"{sample_set()}/processor"
VOCAB_SIZE = 512


TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "rope_scaling": ROPE_SCALING,
    "cross_attention_layers": [1, 3],
    "bos_token_id": 496,
    "eos_token_id": 497,
    "pad_token_id": 500,
}
VISION = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_global_layers": 1,
    "attention_heads": 4,
    "intermediate_size": 80,
    "vision_output_dim": 48 * 3,
    "intermediate_layers_indices": [0, 2],
    "image_size": 112,
    "patch_size": 28,
    "max_num_tiles": 4,
}


def hf_config():
    return mllama_config(TEXT, VISION)


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights of a size that shows in the logits, and gates open: a fresh model hides its image path."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=generator)
            if name.rsplit(".", 1)[-1].endswith("gate"):
                p.fill_(0.7)
            elif "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.1 * noise)
            elif p.ndim == 1:
                p.copy_(0.1 * noise)
            elif "embed" in name:
                p.copy_(0.5 * noise)
            else:
                p.copy_(noise / p[0].numel() ** 0.5)


def write_hf_folder(folder: Path) -> Path:
    """As an export leaves it: model, generation defaults that sample, processor."""
    from transformers import AutoProcessor, GenerationConfig, MllamaForConditionalGeneration

    model = MllamaForConditionalGeneration(hf_config())
    randomise(model)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[497, 505], pad_token_id=500
    )
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(PROCESSOR).save_pretrained(folder)
    return folder
