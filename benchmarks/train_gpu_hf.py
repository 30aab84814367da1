"""HF transformers with PEFT: a plain training loop, as fast as one gets it without changing the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from train_gpu_cases import (
    GATE,
    TEXT,
    TOWER,
    Case,
    Clock,
    Phase,
    free_memory,
    micro_batches,
    peak_gib,
    reset_peak,
)

LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj)"


def measure(case: Case, cfg: DictConfig, report: Callable[[Phase, dict[str, Any]], None], on_gpu: bool) -> None:
    reset_peak(on_gpu)
    model = build(cfg, on_gpu)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=on_gpu)
    build_gib = peak_gib(on_gpu)
    for phase in case.phases:
        reset_peak(on_gpu)
        batches = micro_batches(phase, "hf", cfg, on_gpu)
        result: dict[str, Any] = {"outcome": "out of memory"}
        try:
            times, loss = run_steps(model, parameters, optimizer, batches, phase, on_gpu)
            result = {"outcome": "measured", **times, "peak_gib": peak_gib(on_gpu), "loss": loss}
        except torch.cuda.OutOfMemoryError:
            pass
        optimizer.zero_grad()
        free_memory(on_gpu)
        report(phase, {**result, "build_gib": build_gib})


def run_steps(
    model: Any, parameters: list, optimizer: Any, batches: list[dict[str, Any]], phase: Phase, on_gpu: bool
) -> tuple[dict[str, float], float]:
    """The phase's times, and the last step's loss."""
    clock, loader = Clock(on_gpu), itertools.cycle(batches)
    loss = torch.zeros(())
    for number in range(phase.warm_up + phase.steps):
        if number == phase.warm_up:
            clock.start()
        loss = step(model, parameters, optimizer, loader, phase, on_gpu)
        if number >= phase.warm_up:
            clock.mark()
    times = clock.stop()
    return times, float(loss)


def step(model: Any, parameters: list, optimizer: Any, loader: Any, phase: Phase, on_gpu: bool) -> torch.Tensor:
    """An optimizer step; gives the mean loss of its labels, without waiting for it."""
    number = phase.global_batch_size // phase.micro_batch_size
    micro = [next(loader) for _ in range(number)]
    labels = sum(int((batch["labels"] != -100).sum()) for batch in micro)  # no tensor: its copy would wait for the GPU
    device = "cuda" if on_gpu else "cpu"
    total = torch.zeros((), device=device)
    for batch in micro:
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        loss = model(**batch, num_items_in_batch=labels, use_cache=False).loss
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def build(cfg: DictConfig, on_gpu: bool) -> Any:
    """Random bf16 weights, made on the GPU; adapters in bf16, the fastest that PEFT offers; gates open."""
    from peft import LoraConfig, get_peft_model
    from transformers import MllamaForConditionalGeneration

    dtype = torch.bfloat16 if on_gpu else torch.float32
    config = hf_config(cfg)
    config._attn_implementation = "sdpa"
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda" if on_gpu else "cpu"):
            model = MllamaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate") or name.rsplit(".", 1)[-1] in ("gate_attn", "gate_ffn"):
                parameter.fill_(GATE)
    lora = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.05, target_modules=LORA_TARGETS)
    return get_peft_model(model, lora, autocast_adapter_dtype=False).train()


def hf_config(cfg: DictConfig) -> Any:
    """transformers' config with the sizes of conf/model; for the 11B model, that of Llama-3.2-11B-Vision-Instruct."""
    from transformers import MllamaConfig
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

    text, vision = cfg.model.config[TEXT], cfg.model.config[TOWER]
    intermediate = list(vision.intermediate_layers_indices)
    vision_config = MllamaVisionConfig(
        hidden_size=vision.hidden_size,
        num_hidden_layers=vision.num_layers,
        num_global_layers=vision.num_global_layers,
        attention_heads=vision.num_attention_heads,
        intermediate_size=vision.ffn_hidden_size,
        vision_output_dim=vision.hidden_size * (1 + len(intermediate)),
        intermediate_layers_indices=intermediate,
        image_size=vision.vision_chunk_size,
        patch_size=vision.patch_size,
        max_num_tiles=vision.max_num_tiles,
    )
    both, num_cross = text.num_layers + text.num_cross_attention_layers, text.num_cross_attention_layers
    text_config = MllamaTextConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        num_hidden_layers=both,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_query_groups,
        intermediate_size=text.ffn_hidden_size,
        rope_theta=text.rotary_base,
        rope_scaling={
            "rope_type": "llama3",
            "factor": text.scale_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        max_position_embeddings=131072,
        cross_attention_layers=list(range(3, both, both // num_cross))[:num_cross] if both > 3 else [1],
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=3,
    )
    return MllamaConfig(vision_config=vision_config, text_config=text_config, image_token_index=text.vocab_size)
