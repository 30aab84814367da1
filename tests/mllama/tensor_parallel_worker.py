"""One of two tensor-parallel ranks: compares its logits, losses and gradients with those of one process.

Usage: python tensor_parallel_worker.py RANK FOLDER
FOLDER/expected.pt holds the whole model's state dict, a batch, and what one process computed from them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from mllama_cases import build, inputs_of

from vlmsft.runtime import cpu

WORLD_SIZE = 2


def shard(name: str, tensor: torch.Tensor, local: torch.Size, rank: int) -> torch.Tensor:
    """This rank's part of a whole parameter; a gated linear_fc1 holds a part of each of its two halves."""
    if tensor.shape == local:
        return tensor
    axis = next(i for i, (whole, part) in enumerate(zip(tensor.shape, local, strict=True)) if whole != part)
    if name.startswith("language_model.") and "linear_fc1.weight" in name:
        return torch.cat([half.chunk(WORLD_SIZE)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(WORLD_SIZE, dim=axis)[rank]


def main(rank: int, folder: Path) -> None:
    torch._dynamo.config.disable = True
    cpu.activate()
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed.finalize_model_grads import _allreduce_non_tensor_model_parallel_grads

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD_SIZE
    )
    parallel_state.initialize_model_parallel(WORLD_SIZE)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)

    expected = torch.load(folder / "expected.pt")
    model = build(tensor_model_parallel_size=WORLD_SIZE).module
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(shard(name, expected["state"][name], p.shape, rank))

    batch = expected["batch"]
    with torch.no_grad():
        logits = model(**inputs_of(batch))
    losses = model(**inputs_of(batch, labels=True))
    losses.sum().backward()
    # Megatron does this at the end of each step
    model.ddp_config = SimpleNamespace(use_megatron_fsdp=False)
    _allreduce_non_tensor_model_parallel_grads([model], model.config)

    torch.testing.assert_close(logits, expected["logits"].chunk(WORLD_SIZE, dim=-1)[rank], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses, expected["losses"], atol=1e-5, rtol=1e-5)
    largest = max(float(g.norm()) for g in expected["gradients"].values())
    for name, p in model.named_parameters():
        whole = shard(name, expected["gradients"][name], p.shape, rank)
        difference = float((p.grad - whole).norm()) / max(float(whole.norm()), 1e-6 * largest)
        assert difference < 1e-4, (name, difference)
    # same keys and global shapes as one process; only this rank's part differs
    shapes = {key: tuple(getattr(value, "global_shape", ())) for key, value in model.sharded_state_dict().items()}
    assert shapes == expected["global_shapes"]


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
