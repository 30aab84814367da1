"""One of two tensor-parallel ranks: compares its logits, losses and gradients with those of one process.

FOLDER/expected.pt holds what one process computed: see test_tensor_parallel.py.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from mllama_cases import TARGETS, build, inputs_of, with_lora

from vlmsft.runtime import cpu

WORLD_SIZE = 2
FUNCTIONS, COMPILED, MEGATRON = "functions", "compiled functions", "Megatron's classes"
FEW = ("several images", "text only")
RECOMPUTED = "functions that are computed again in the backward pass"
WAYS = {  # sequence parallelism, full or LoRA: how the layers run
    (False, "full"): (FUNCTIONS, RECOMPUTED, COMPILED, MEGATRON),
    (False, "lora"): (MEGATRON,),
    (True, "full"): (MEGATRON,),
    (True, "lora"): (MEGATRON,),
}


def shard(name: str, tensor: torch.Tensor, local: torch.Size, rank: int) -> torch.Tensor:
    """This rank's part of a whole parameter; a gated linear_fc1 holds a part of each of its two halves."""
    if tensor.shape == local:
        return tensor
    axis = next(i for i, (whole, part) in enumerate(zip(tensor.shape, local, strict=True)) if whole != part)
    if name.startswith("language_model.") and ".linear_fc1." in name and not name.endswith("linear_in.weight"):
        return torch.cat([half.chunk(WORLD_SIZE)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(WORLD_SIZE, dim=axis)[rank]


def compare(model: Any, state: dict[str, torch.Tensor], expected: dict[str, Any], rank: int, within: float) -> None:
    """One batch through the model, which gets the whole model's parameters `state`; within: of logits and losses."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(shard(name, state[name], p.shape, rank))
        logits = model(**inputs_of(expected["batch"]))
    model.zero_grad()
    losses = model(**inputs_of(expected["batch"], labels=True))
    losses.sum().backward()
    # Megatron does this at the end of each step
    from megatron.core.distributed.finalize_model_grads import _allreduce_non_tensor_model_parallel_grads

    model.ddp_config = SimpleNamespace(use_megatron_fsdp=False)
    _allreduce_non_tensor_model_parallel_grads([model], model.config)

    torch.testing.assert_close(logits, expected["logits"].chunk(WORLD_SIZE, dim=-1)[rank], atol=within, rtol=within)
    torch.testing.assert_close(losses, expected["losses"], atol=within, rtol=within)
    gradients = expected["gradients"]
    largest = max(float(g.norm()) for g in gradients.values())
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(gradients)
    for name, p in model.named_parameters():
        if name in gradients:
            whole = shard(name, gradients[name], p.shape, rank)
            difference = float((p.grad - whole).norm()) / max(float(whole.norm()), 1e-6 * largest)
            assert difference < 10 * within, (name, difference)


@contextlib.contextmanager
def running_as(way: str, model: Any) -> Iterator[None]:
    """Compiled: as on a GPU, but for the kernels."""
    from vlmsft.mllama import lean

    kept = lean._compiles, lean._compiled
    model.config.lean_forward = way != MEGATRON or None
    assert (model.megatron_because() is None) == (way != MEGATRON)
    for part in (model.config.language_model_config, model.config.vision_model_config):
        part.recompute_granularity = "full" if way == RECOMPUTED else None
    if way == COMPILED:
        lean._compiles = lambda like: True
        lean._compiled = functools.cache(functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    try:
        with torch._dynamo.config.patch(disable=way != COMPILED):
            yield
    finally:
        lean._compiles, lean._compiled = kept


def main(rank: int, folder: Path) -> None:
    torch._dynamo.config.disable = True
    cpu.activate()
    from megatron.core import parallel_state, tensor_parallel

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD_SIZE
    )
    parallel_state.initialize_model_parallel(WORLD_SIZE)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)

    expected = torch.load(folder / "expected.pt")
    for (sequence_parallel, part), ways in WAYS.items():
        parallel = {"tensor_model_parallel_size": WORLD_SIZE, "sequence_parallel": sequence_parallel}
        model = build(**parallel) if part == "full" else with_lora(TARGETS, **parallel)
        for way in ways:
            of_part = only(expected[part], FEW) if way in (COMPILED, RECOMPUTED) else expected[part]
            with running_as(way, model.module):
                compare_all(model.module, of_part, rank, f"{part}, {way}, {sequence_parallel=}")
        # same keys and global shapes as one process; only this rank's part differs
        sharded = model.module.sharded_state_dict()
        shapes = {key: tuple(getattr(value, "global_shape", ())) for key, value in sharded.items()}
        assert shapes == expected[part]["global_shapes"], part


def main_on_gpu(rank: int, folder: Path) -> None:
    """Without adapters and sequence parallelism. torch.compile's kernels sum in an order of their own."""
    from megatron.core import parallel_state, tensor_parallel

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD_SIZE
    )
    parallel_state.initialize_model_parallel(WORLD_SIZE)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    model = build(tensor_model_parallel_size=WORLD_SIZE, lean_forward=True).module.cuda()
    assert model.megatron_because() is None
    compare_all(model, torch.load(folder / "expected.pt"), rank, "on a GPU", within=1e-4)


def only(expected: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {**expected, "batches": {name: expected["batches"][name] for name in names}}


def compare_all(model: Any, expected: dict[str, Any], rank: int, what: str, within: float = 1e-5) -> None:
    batches = [(name, computed, None) for name, computed in expected["batches"].items()]
    # overlapped gradients: see test_gradient_order.py
    batches.append(("text only, overlapped", expected["batches"]["text only"], contextlib.nullcontext))
    for name, computed, no_sync_func in batches:
        model.config.no_sync_func = no_sync_func
        try:
            compare(model, expected["state"], computed, rank, within)
        except AssertionError as error:
            raise AssertionError(f"{what}, {name}: {error}") from error
