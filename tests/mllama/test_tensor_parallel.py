"""Two tensor-parallel ranks compute what one process does, from the same weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mllama_cases import CASES, build, inputs_of, make_batch

HERE = Path(__file__).parent


@pytest.mark.nemo
def test_two_ranks_equal_one(megatron, tmp_path):
    model = build().module
    batch = make_batch(CASES["several images"])
    losses = model(**inputs_of(batch, labels=True))
    losses.sum().backward()
    with torch.no_grad():
        logits = model(**inputs_of(batch))
    expected = {
        "state": {name: p.detach() for name, p in model.named_parameters()},
        "batch": batch,
        "logits": logits,
        "losses": losses.detach(),
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "global_shapes": {
            key: tuple(getattr(value, "global_shape", ())) for key, value in model.sharded_state_dict().items()
        },
    }
    torch.save(expected, tmp_path / "expected.pt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}
    command = [sys.executable, str(HERE / "tensor_parallel_worker.py")]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=600)[0] for worker in workers]
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output[-3000:]
