"""python -m vlmsft.plan key=value ...: what vlmsft.train would run with the same overrides, without starting it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from vlmsft.cli import command
from vlmsft.errors import UserError
from vlmsft.mllama.sizes import (
    GIB,
    NONE,
    MemoryEstimate,
    TextShape,
    VisionShape,
    lora_count,
    lora_hits_tower,
    memory_estimate,
    parameter_counts,
    tokens_per_step,
)

if TYPE_CHECKING:
    from vlmsft.checks import Facts


@command("train")
def main(cfg: DictConfig) -> None:
    from vlmsft.runtime.logging import console
    from vlmsft.train import check

    recipe, _, problems = check(cfg)  # imports NeMo and keeps it quiet: what imports torch comes after it
    if recipe is not None:
        console().print(f"{written_out(recipe)}\n", markup=False, highlight=False, soft_wrap=True)
    if can_be_counted(cfg):
        from vlmsft.runtime.summary import show

        show(facts(cfg), console())
    if problems:
        raise UserError(problems)


def written_out(recipe: Any) -> str:
    """Each class and value that the recipe sets, one a line; what it leaves to NeMo's defaults is left out."""
    import fiddle as fdl
    from fiddle import daglish

    lines, said = [], set()
    for value, path in daglish.iterate(recipe, memoized=False):
        name = daglish.path_str(path).lstrip(".")
        if any(name.startswith(f"{parent}[") for parent in said):
            continue
        if isinstance(value, fdl.Buildable):
            target = fdl.get_callable(value)
            lines.append(f"{name or 'run'}: {target.__module__}.{target.__qualname__}")
        elif not isinstance(value, (list, tuple)) or not any(isinstance(item, fdl.Buildable) for item in value):
            lines.append(f"{name} = {value!r}")
            said.add(name)
    return "\n".join(lines)


def can_be_counted(cfg: DictConfig) -> bool:
    """Whether all that the summary is computed from is there and fits, whatever else is wrong."""
    from vlmsft import checks

    values = checks.Facts(cfg, None)
    counts = values.whole("data.decoder_seq_length", "trainer.max_steps")
    if checks.shapes(cfg) is None or counts is None or min(counts) < 1 or not values.num_microbatches:
        return False
    lora = values["peft.target_modules"], values["peft.dim"]
    if values["peft"] is not None and not (isinstance(lora[0], list) and type(lora[1]) is int):
        return False
    freezes = [f"model.config.freeze_{part}" for part in ("language_model", "vision_model", "vision_projection")]
    if values["peft"] is not None:
        freezes += ["peft.freeze_language_model", "peft.freeze_vision_model"]
    if not all(isinstance(values[key], bool) for key in freezes):
        return False
    sizes_fit = (checks.tensor_parallel_divides, checks.text_sizes, checks.vision_sizes, checks.lora_targets)
    return not any(problem for check in sizes_fit for problem in check(values))


def facts(cfg: DictConfig) -> Any:
    """The summary (RunFacts) of a config that `can_be_counted`."""
    from vlmsft.checks import Facts, shapes
    from vlmsft.runtime.summary import RunFacts

    values, known = Facts(cfg, None), shapes(cfg)
    assert known is not None and values.world_size is not None and values.data_parallel_size is not None
    text, vision = known
    on_cpu = values["trainer.accelerator"] == "cpu"
    return RunFacts(
        model=str(values["model_name"]),
        parameters=parameters(cfg, text, vision),
        precision=str(values["precision"]),
        tensor_model_parallel_size=values["strategy.tensor_model_parallel_size"],
        data_parallel_size=values.data_parallel_size,
        device="the CPU" if on_cpu else f"{values.world_size} GPUs",
        micro_batch_size=values["data.micro_batch_size"],
        global_batch_size=values["data.global_batch_size"],
        tokens_per_step=tokens_per_step(
            vision,
            global_batch_size=values["data.global_batch_size"],
            text_tokens=values["data.decoder_seq_length"],
        ),
        num_train_samples=num_samples(values),
        max_steps=values["trainer.max_steps"],
        val_check_interval=values["trainer.val_check_interval"],
        memory_gib_per_gpu=None if on_cpu else memory(cfg, text, vision, values.data_parallel_size).peak / GIB,
        run_dir=values["run_dir"],
    )


def frozen_parts(cfg: DictConfig) -> dict[str, bool]:
    """What model.config freezes, and what NeMo's LoRA does: its freeze_vision_model takes the projector as well."""
    config, peft = cfg.model.config, cfg.peft
    by_lora = {"text": False, "vision": False}
    if peft is not None:
        by_lora = {"text": peft.freeze_language_model, "vision": peft.freeze_vision_model}
    return {
        "tower": config.freeze_vision_model or by_lora["vision"],
        "projector": config.freeze_vision_projection or by_lora["vision"],
        "text": config.freeze_language_model or by_lora["text"],
    }


def parameters(cfg: DictConfig, text: TextShape, vision: VisionShape) -> dict[str, tuple[int, int]]:
    """{part: (total, trainable)}."""
    frozen = frozen_parts(cfg)
    counts = parameter_counts(text, vision)
    table = {part: (count.total, 0 if frozen[part] else count.total) for part, count in counts.items()}
    if cfg.peft is not None:
        size = lora_count(text, vision, cfg.peft.dim, list(cfg.peft.target_modules)).total
        table["LoRA"] = (size, size)
    return table


def memory(cfg: DictConfig, text: TextShape, vision: VisionShape, data_parallel_size: int) -> MemoryEstimate:
    """One GPU's bytes, at the longest text and one image of all tiles a sample."""
    frozen = frozen_parts(cfg)
    targets = [] if cfg.peft is None else list(cfg.peft.target_modules)
    return memory_estimate(
        text,
        vision,
        micro_batch_size=cfg.data.micro_batch_size,
        text_tokens=cfg.data.decoder_seq_length,
        tensor_model_parallel_size=cfg.strategy.tensor_model_parallel_size,
        data_parallel_size=data_parallel_size,
        bf16=str(cfg.precision) != "32",
        freeze_language_model=frozen["text"],
        freeze_vision_model=frozen["tower"],
        freeze_vision_projection=frozen["projector"],
        lora=NONE if cfg.peft is None else lora_count(text, vision, cfg.peft.dim, targets),
        lora_in_tower=lora_hits_tower(text, vision, targets),
    )


def num_samples(facts: Facts) -> int | None:
    """Training samples of the datasets that the config names; None where one can't be read."""
    from vlmsft.data.energon_shards import ShardFolder
    from vlmsft.data.records import RecordFile

    try:
        if facts.reads_shards:
            sizes = [len(ShardFolder.open(source.path, "train")) for source in facts.sources("data.path")]
        else:
            sizes = [len(RecordFile(source.path)) for source in facts.sources("data.train_path")]
    except UserError:
        return None
    return sum(sizes) if sizes else None


if __name__ == "__main__":
    main()
