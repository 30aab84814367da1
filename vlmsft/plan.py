"""python -m vlmsft.plan key=value ...: what vlmsft.train would run with the same overrides, without starting it."""

from __future__ import annotations

import os
from typing import Any

from omegaconf import DictConfig

from vlmsft.cli import command
from vlmsft.errors import Problem, UserError
from vlmsft.mllama.sizes import (
    GIB,
    Count,
    MemoryEstimate,
    TextShape,
    VisionShape,
    lora_count,
    memory_estimate,
    parameter_counts,
    tokens_per_step,
)

TILES_PER_IMAGE = 4
"""For the estimates: what a large picture is cut into, and what the tower always computes."""


@command("train")
def main(cfg: DictConfig) -> None:
    from fiddle.printing import as_str_flattened

    from vlmsft.runtime.logging import console
    from vlmsft.runtime.summary import show
    from vlmsft.train import check

    recipe, _, problems = check(cfg)
    if recipe is not None:
        console().print(as_str_flattened(recipe), markup=False, highlight=False, soft_wrap=True)
        console().print()
    if not problems or can_be_counted(problems):
        show(facts(cfg), console())
    if problems:
        raise UserError(problems)


def can_be_counted(problems: list[Problem]) -> bool:
    """Whether the sizes that the summary is computed from are themselves in order."""
    prefixes = ("model", "data.global", "data.micro", "data.decoder", "trainer.devices", "trainer.num", "strategy", "peft")
    return not any(problem.where.startswith(prefixes) for problem in problems)


def facts(cfg: DictConfig) -> Any:
    """The summary (RunFacts) of a config whose sizes are in order."""
    from vlmsft.runtime.summary import RunFacts

    text, vision = shapes(cfg)
    ranks = cfg.trainer.num_nodes * cfg.trainer.devices
    return RunFacts(
        model=cfg.model_name,
        parameters=parameters(cfg, text, vision),
        precision=str(cfg.precision),
        tensor_model_parallel_size=cfg.strategy.tensor_model_parallel_size,
        data_parallel_size=ranks // cfg.strategy.tensor_model_parallel_size,
        device="CPU" if cfg.trainer.accelerator == "cpu" else f"{ranks} GPUs",
        micro_batch_size=cfg.data.micro_batch_size,
        global_batch_size=cfg.data.global_batch_size,
        tokens_per_step=tokens(cfg, vision),
        num_train_samples=num_records(cfg.data.train_path),
        max_steps=cfg.trainer.max_steps,
        val_check_interval=cfg.trainer.val_check_interval,
        memory_gib_per_gpu=memory(cfg, text, vision).peak / GIB,
        run_dir=cfg.run_dir,
    )


def shapes(cfg: DictConfig) -> tuple[TextShape, VisionShape]:
    """The sizes of the model's two halves."""
    text, vision = cfg.model.config.language_model_config, cfg.model.config.vision_model_config
    return (
        TextShape(
            num_layers=text.num_layers,
            num_cross_attention_layers=text.num_cross_attention_layers,
            hidden_size=text.hidden_size,
            ffn_hidden_size=text.ffn_hidden_size,
            num_attention_heads=text.num_attention_heads,
            num_query_groups=text.num_query_groups,
            vocab_size=text.vocab_size,
        ),
        VisionShape(
            num_layers=vision.num_layers,
            num_global_layers=vision.num_global_layers,
            hidden_size=vision.hidden_size,
            ffn_hidden_size=vision.ffn_hidden_size,
            vision_chunk_size=vision.vision_chunk_size,
            patch_size=vision.patch_size,
            num_intermediate_layers=len(vision.intermediate_layers_indices),
            text_hidden_size=vision.text_hidden_size,
            max_num_tiles=vision.max_num_tiles,
        ),
    )


def parameters(cfg: DictConfig, text: TextShape, vision: VisionShape) -> dict[str, tuple[int, int]]:
    """{part: (total, trainable)}."""
    config = cfg.model.config
    frozen = {
        "tower": config.freeze_vision_model,
        "projector": config.freeze_vision_projection,
        "text": config.freeze_language_model,
    }
    counts: dict[str, Count] = parameter_counts(text, vision)
    adapters = cfg.peft is not None
    table = {part: (count.total, 0 if adapters or frozen[part] else count.total) for part, count in counts.items()}
    if adapters:
        size = lora_count(text, cfg.peft.dim, list(cfg.peft.target_modules)).total
        table["LoRA"] = (size, size)
    return table


def tokens(cfg: DictConfig, vision: VisionShape) -> dict[str, int]:
    """Text and vision tokens of an optimizer step, if every sample had the longest text and one image of 4 tiles."""
    return tokens_per_step(
        vision,
        global_batch_size=cfg.data.global_batch_size,
        text_tokens=cfg.data.decoder_seq_length,
        images_per_sample=1,
        tiles_per_image=TILES_PER_IMAGE,
    )


def memory(cfg: DictConfig, text: TextShape, vision: VisionShape) -> MemoryEstimate:
    """One GPU's bytes, at the longest text and one image of 4 tiles a sample."""
    config, tp = cfg.model.config, cfg.strategy.tensor_model_parallel_size
    return memory_estimate(
        text,
        vision,
        micro_batch_size=cfg.data.micro_batch_size,
        text_tokens=cfg.data.decoder_seq_length,
        tiles_per_image=TILES_PER_IMAGE,
        tensor_model_parallel_size=tp,
        data_parallel_size=cfg.trainer.num_nodes * cfg.trainer.devices // tp,
        bf16=str(cfg.precision) != "32",
        freeze_language_model=config.freeze_language_model,
        freeze_vision_model=config.freeze_vision_model,
        freeze_vision_projection=config.freeze_vision_projection,
        lora_dim=0 if cfg.peft is None else cfg.peft.dim,
        lora_target_modules=() if cfg.peft is None else list(cfg.peft.target_modules),
    )


def num_records(path: str) -> int | None:
    """Records of a JSON or JSONL file; None if it isn't there."""
    from vlmsft.data.records import RecordFile

    return len(RecordFile(path)) if os.path.isfile(path) else None


if __name__ == "__main__":
    main()
