"""What a composed config costs: parameters and one GPU's memory, from the arithmetic of vlmsft.mllama.sizes.

Imports neither torch nor NeMo.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlmsft.errors import Problem
from vlmsft.facts import TENSOR_PARALLEL, TEXT, VISION, Facts, shapes
from vlmsft.mllama import sizes
from vlmsft.mllama.memory import MemoryEstimate, Training, memory_estimate
from vlmsft.mllama.plain_values import TEXT_VALUES, TOWER_VALUES

FREEZES = [f"model.config.freeze_{part}" for part in ("language_model", "vision_model", "vision_projection")]
PEFT_FREEZES = ["peft.freeze_language_model", "peft.freeze_vision_model"]


def can_be_estimated(facts: Facts) -> bool:
    """Whether all that `memory` and `parameters` read is there and of the right type; not whether it fits."""
    known = shapes(facts)
    counts = facts.whole("data.decoder_seq_length", "data.micro_batch_size", TENSOR_PARALLEL)
    if known is None or counts is None or min(counts) < 1 or not facts.data_parallel_size:
        return False
    has_lora = facts["peft"] is not None
    if not all(isinstance(facts[key], bool) for key in FREEZES + PEFT_FREEZES * has_lora):
        return False
    if not has_lora:
        return True
    targets, dim, matrices = facts["peft.target_modules"], facts["peft.dim"], sizes.lora_matrices(*known)
    if not isinstance(targets, list) or type(dim) is not int or type(facts["peft.dropout"]) not in (int, float):
        return False
    return all(isinstance(target, str) and sizes.lora_hits(target, matrices) for target in targets)


def frozen_parts(facts: Facts) -> dict[str, bool]:
    """What model.config freezes, and what NeMo's LoRA does: its freeze_vision_model takes the projector as well."""
    text, tower, projector = (facts[key] for key in FREEZES)
    has_lora = facts["peft"] is not None
    text_by_lora, vision_by_lora = (has_lora and facts[key] for key in PEFT_FREEZES)
    return {
        "tower": tower or vision_by_lora,
        "projector": projector or vision_by_lora,
        "text": text or text_by_lora,
    }


def parameters(facts: Facts) -> dict[str, tuple[int, int]]:
    """{part: (total, trainable)} of a config that `can_be_estimated`."""
    text, vision = shapes_of(facts)
    frozen = frozen_parts(facts)
    counts = sizes.parameter_counts(text, vision)
    table = {part: (count.total, 0 if frozen[part] else count.total) for part, count in counts.items()}
    if facts["peft"] is not None:
        size = sizes.lora_count(text, vision, facts["peft.dim"], facts["peft.target_modules"]).total
        table["LoRA"] = (size, size)
    return table


def memory(facts: Facts) -> MemoryEstimate:
    """One GPU's bytes, at the longest text and one full image a sample, for a config that `can_be_estimated`."""
    assert facts.data_parallel_size is not None
    return memory_estimate(
        *shapes_of(facts),
        training(facts),
        micro_batch_size=facts["data.micro_batch_size"],
        text_tokens=facts["data.decoder_seq_length"],
        tensor_model_parallel_size=facts[TENSOR_PARALLEL],
        sequence_parallel=facts["strategy.sequence_parallel"] is True,
        data_parallel_size=facts.data_parallel_size,
        bf16=str(facts["precision"]) != "32",
        lean_forward=has_plain_layers(facts),
        frozen_fp8=facts["model.config.frozen_fp8"],
    )


def has_plain_layers(facts: Facts) -> bool:
    """Whether layers run as the functions of vlmsft.mllama.lean, as far as the config tells."""
    asked, tp = facts["model.config.lean_forward"], facts[TENSOR_PARALLEL]
    if asked is False or (asked is None and type(tp) is int and tp > 1):
        return False
    return next(needs_megatrons_layers(facts), None) is None


def needs_megatrons_layers(
    facts: Facts, asked: str = "model.config.lean_forward=true", instead: str = "model.config.lean_forward=null"
) -> Iterator[Problem]:
    """What of a config the functions of vlmsft.mllama.lean don't do, as problems of `asked`, which needs them.

    The built model may know more (lean.Checked): a callback's hooks, a PEFT method that is not NeMo's.
    """
    remedy = f"Or {instead}"
    tp, overlaps = facts[TENSOR_PARALLEL], "strategy.ddp.overlap_param_gather"
    if facts[overlaps] is True:
        yield Problem(overlaps, "true", f"false with {asked}", remedy)
    if type(tp) is int and tp > 1:
        if facts["strategy.sequence_parallel"] is True:
            yield Problem("strategy.sequence_parallel", "true", f"false with {asked}", remedy)
        if facts["peft"] is not None:
            yield Problem(TENSOR_PARALLEL, str(tp), f"1 where there are adapters, with {asked}", remedy)
    for part, plain in ((TEXT, TEXT_VALUES), (VISION, TOWER_VALUES)):
        for name, values in plain.items():
            found = facts[f"{part}.{name}"]
            if found is not None and found not in values:
                expected = " or ".join("null" if value is None else str(value).lower() for value in values)
                where = f"{part}.{name}"
                yield Problem(where, str(found), f"{expected} with {asked}", remedy)
    yield from _unknown_adapters(facts, asked, remedy)


def _unknown_adapters(facts: Facts, asked: str, remedy: str) -> Iterator[Problem]:
    kind, dropout = facts["peft._target_"], facts["peft.dropout"]
    if isinstance(kind, str) and kind.rpartition(".")[2] in ("DoRA", "CanonicalLoRA"):
        yield Problem("peft._target_", kind, f"NeMo's LoRA with {asked}", remedy)
    if facts["peft.dropout_position"] == "post" and dropout:
        yield Problem("peft.dropout_position", "post", f"pre with {asked}", remedy)


def training(facts: Facts) -> Training:
    """What trains in a config that `can_be_estimated`."""
    frozen, has_lora = frozen_parts(facts), facts["peft"] is not None
    return Training(
        text=not frozen["text"],
        tower=not frozen["tower"],
        projector=not frozen["projector"],
        lora_modules=sizes.lora_modules(*shapes_of(facts), facts["peft.target_modules"]) if has_lora else (),
        lora_dim=facts["peft.dim"] if has_lora else 0,
        lora_dropout=has_lora and facts["peft.dropout"] > 0,
        recompute_text=facts[f"{TEXT}.recompute_granularity"] == "full",
        recompute_tower=facts[f"{VISION}.recompute_granularity"] == "full",
    )


def shapes_of(facts: Facts) -> tuple[sizes.TextShape, sizes.VisionShape]:
    known = shapes(facts)
    assert known is not None
    return known
