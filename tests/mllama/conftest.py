"""Tests below import NeMo once per process and run Megatron on one gloo process."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def megatron(tmp_path_factory):
    """Megatron's groups and random number tracker on the CPU, for this process."""
    import torch

    from vlmsft.runtime import cpu

    # NeMo's stock layers compile their activations at the first call: minutes here, and the same numbers
    torch._dynamo.config.disable = True
    cpu.activate()

    from megatron.core import parallel_state, tensor_parallel

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('store') / 'store'}", rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel(1)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
