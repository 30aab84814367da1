"""Two tensor-parallel ranks compute what one process does, from the same weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mllama_cases import CASES, TARGETS, Sample, build, inputs_of, make_batch, with_lora

HERE = Path(__file__).parent


BATCHES = {
    # padded to 27, 23 and 23 rows, which two ranks don't share evenly, and to 24, which they do
    "several images": CASES["several images"],
    "mixed tile counts": CASES["mixed tile counts"],
    "text-only beside images": CASES["text-only beside images"],
    "an even number of rows": (Sample(21, ((2, 7),)), Sample(21, ((9, 1),))),
    "text only": (Sample(14), Sample(9)),
}


def computed_by_one(model) -> dict[str, Any]:
    """The model's parameters, the shapes in its checkpoint, and for each batch what a rank is to compute."""
    batches = {}
    for name, samples in BATCHES.items():
        batch = make_batch(samples)
        model.zero_grad()
        losses = model(**inputs_of(batch, labels=True))
        losses.sum().backward()
        with torch.no_grad():
            logits = model(**inputs_of(batch))
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        batches[name] = {"batch": batch, "logits": logits, "losses": losses.detach(), "gradients": gradients}
    sharded = model.sharded_state_dict()
    return {
        "state": {name: p.detach() for name, p in model.named_parameters()},
        "batches": batches,
        "global_shapes": {key: tuple(getattr(value, "global_shape", ())) for key, value in sharded.items()},
    }


@pytest.mark.nemo
def test_two_ranks_equal_one(megatron, tmp_path):
    """With and without sequence parallelism, full fine-tuning and LoRA."""
    expected = {"full": computed_by_one(build().module), "lora": computed_by_one(with_lora(TARGETS).module)}
    torch.save(expected, tmp_path / "expected.pt")
    # one thread a process: more of them wait for each other in every collective
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
    }
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
