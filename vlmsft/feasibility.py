"""What keeps a well-formed config from running: sizes that don't divide each other, and memory that no GPU has.

For a single run these are errors beside those of vlmsft.checks; a point of a sweep that has one is marked infeasible,
with the reason, and the other points run. Arithmetic on the config: neither torch nor NeMo.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from omegaconf import DictConfig

from vlmsft import estimates
from vlmsft.errors import Problem
from vlmsft.facts import TENSOR_PARALLEL, TEXT, VISION, Facts
from vlmsft.mllama import sizes


def infeasible(cfg: DictConfig, world_size: int | None = None) -> list[Problem]:
    """Why a config composed from conf/train.yaml can't run although each of its values is a proper one; [] if it can.

    world_size: number of processes that torchrun or srun started; None = trainer.num_nodes x trainer.devices
    A value that is absent or not set yet is no problem here: each check runs when all that it looks at is known.
    """
    facts = Facts(cfg, world_size)
    return [problem for check in CHECKS for problem in check(facts)]


# --- parallelism ------------------------------------------------------------------------------------------------------


def untested_parallelism(facts: Facts) -> Iterator[Problem]:
    allowed = {
        "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "encoder_pipeline_model_parallel_size": 0,
        "virtual_pipeline_model_parallel_size": None,
    }
    for name, only in allowed.items():
        found = facts[f"strategy.{name}"]
        if found not in (only, None):
            remedy = "No test covers it yet: more GPUs go into tensor_model_parallel_size or data parallelism"
            yield Problem(f"strategy.{name}", str(found), "null" if only is None else str(only).lower(), remedy)


def sequence_parallel_has_ranks(facts: Facts) -> Iterator[Problem]:
    if facts["strategy.sequence_parallel"] is True and facts[TENSOR_PARALLEL] == 1:
        expected = f"false with {TENSOR_PARALLEL} 1: it splits the text over the GPUs that share a layer"
        yield Problem("strategy.sequence_parallel", "True", expected)


def tensor_parallel_divides(facts: Facts) -> Iterator[Problem]:
    size = facts[TENSOR_PARALLEL]
    if type(size) is not int or size < 1:
        return
    split = [
        f"{TEXT}.num_attention_heads",
        f"{TEXT}.num_query_groups",
        f"{TEXT}.hidden_size",
        f"{TEXT}.ffn_hidden_size",
        f"{TEXT}.vocab_size",
        f"{VISION}.num_attention_heads",
        f"{VISION}.hidden_size",
        f"{VISION}.text_hidden_size",
    ]
    values = {key: facts[key] for key in split}
    values["the extra embeddings"] = sizes.NUM_EXTRA_EMBEDDINGS
    broken = [f"{key} {value}" for key, value in values.items() if type(value) is int and value % size]
    if broken:
        yield Problem(TENSOR_PARALLEL, str(size), f"a divisor of {', '.join(broken)}")


def tensor_parallel_fits_processes(facts: Facts) -> Iterator[Problem]:
    size = facts[TENSOR_PARALLEL]
    if type(size) is not int or size < 1 or facts.world_size is None:
        return
    if facts.world_size % size:
        expected = f"trainer.num_nodes x trainer.devices as a multiple of {TENSOR_PARALLEL} {size}"
        yield Problem("trainer.devices", f"{facts.world_size} processes in all", expected)


# --- batches ----------------------------------------------------------------------------------------------------------


def batch_divides(facts: Facts) -> Iterator[Problem]:
    sizes = facts.whole("data.global_batch_size", "data.micro_batch_size")
    if sizes is None or min(sizes) < 1 or facts.data_parallel_size is None:
        return
    share = sizes[1] * facts.data_parallel_size
    if sizes[0] % share:
        expected = (
            f"a multiple of {share} = data.micro_batch_size {sizes[1]} x data-parallel size {facts.data_parallel_size}"
        )
        remedy = f"For example {max(share, sizes[0] // share * share)}"
        yield Problem("data.global_batch_size", str(sizes[0]), expected, remedy)


def validation_batches_divide(facts: Facts) -> Iterator[Problem]:
    limit, num_microbatches = facts["trainer.limit_val_batches"], facts.num_microbatches
    if type(limit) is int and num_microbatches and limit % num_microbatches:
        expected = f"a multiple of {num_microbatches}, the micro batches that a rank computes in a step; or 1.0 for all"
        remedy = f"For example {-(-limit // num_microbatches) * num_microbatches}"
        yield Problem("trainer.limit_val_batches", str(limit), expected, remedy)


# --- sizes ------------------------------------------------------------------------------------------------------------


def text_sizes(facts: Facts) -> Iterator[Problem]:
    for multiple, unit in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_query_groups")):
        yield from _multiple_of(facts, f"{TEXT}.{multiple}", f"{TEXT}.{unit}")
    layers = facts.whole(f"{TEXT}.num_cross_attention_layers", f"{TEXT}.num_layers")
    if layers is not None and layers[0] > layers[1]:
        where = f"{TEXT}.num_cross_attention_layers"
        yield Problem(where, str(layers[0]), f"at most {TEXT}.num_layers {layers[1]}")
    lengths = facts.whole("data.decoder_seq_length", f"{TEXT}.seq_length")
    if lengths is not None and lengths[0] > lengths[1]:
        yield Problem("data.decoder_seq_length", str(lengths[0]), f"at most {TEXT}.seq_length {lengths[1]}")


def vision_sizes(facts: Facts) -> Iterator[Problem]:
    yield from _multiple_of(facts, f"{VISION}.hidden_size", f"{VISION}.num_attention_heads")
    yield from _multiple_of(facts, f"{VISION}.vision_chunk_size", f"{VISION}.patch_size")
    for one, other in (
        (f"{VISION}.text_hidden_size", f"{TEXT}.hidden_size"),
        (f"{VISION}.max_num_tiles", f"{VISION}.vision_max_num_chunks"),
    ):
        values = facts.whole(one, other)
        if values is not None and values[0] != values[1]:
            yield Problem(one, str(values[0]), f"{values[1]}, as {other}")
    indices, num_layers = facts[f"{VISION}.intermediate_layers_indices"], facts[f"{VISION}.num_layers"]
    if isinstance(indices, list) and type(num_layers) is int:
        wrong = [index for index in indices if type(index) is int and not 0 <= index < num_layers]
        if wrong or indices != sorted(set(indices)):
            expected = f"increasing numbers below {VISION}.num_layers {num_layers}"
            yield Problem(f"{VISION}.intermediate_layers_indices", str(indices), expected)
    sizes = facts.whole(
        "data.seq_length", f"{VISION}.vision_chunk_size", f"{VISION}.patch_size", f"{VISION}.max_num_tiles"
    )
    if sizes is not None and sizes[2] > 0:
        tokens = ((sizes[1] // sizes[2]) ** 2 + 1) * sizes[3]
        if sizes[0] != tokens:
            expected = f"{tokens}, the vision tokens of an image: {sizes[3]} tiles of {tokens // sizes[3]}"
            yield Problem("data.seq_length", str(sizes[0]), expected)


def _multiple_of(facts: Facts, multiple: str, unit: str) -> Iterator[Problem]:
    values = facts.whole(multiple, unit)
    if values is not None and (values[1] < 1 or values[0] % values[1]):
        yield Problem(multiple, str(values[0]), f"a multiple of {unit} {values[1]}")


# --- memory -----------------------------------------------------------------------------------------------------------


def memory_fits(facts: Facts) -> Iterator[Problem]:
    """The estimate for the longest text and full images against gpu_memory_gib; not on the CPU."""
    limit = facts["gpu_memory_gib"]
    if type(limit) not in (int, float) or facts["trainer.accelerator"] == "cpu" or not sizes_are_known(facts):
        return
    estimate = estimates.memory(facts)
    if estimate.device <= limit * sizes.GIB:
        return
    expected = f"at most gpu_memory_gib {limit:g}"
    remedy = (
        "peft=lora, a larger strategy.tensor_model_parallel_size, more GPUs, recompute_granularity=full, or a smaller "
        "data.micro_batch_size or data.decoder_seq_length"
    )
    yield Problem("gpu_memory_gib", f"about {estimate.device / sizes.GIB:.0f} GiB a GPU", expected, remedy)


def sizes_are_known(facts: Facts) -> bool:
    """Whether memory and FLOPs can be estimated: all sizes are there and fit each other."""
    fit = (tensor_parallel_divides, tensor_parallel_fits_processes, text_sizes, vision_sizes)
    return estimates.can_be_estimated(facts) and not any(problem for check in fit for problem in check(facts))


CHECKS: tuple[Callable[[Facts], Iterator[Problem]], ...] = (
    untested_parallelism,
    sequence_parallel_has_ranks,
    tensor_parallel_divides,
    tensor_parallel_fits_processes,
    batch_divides,
    validation_batches_divide,
    text_sizes,
    vision_sizes,
    memory_fits,
)
