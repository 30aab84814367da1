"""Two tensor-parallel ranks compute what one process does, from the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mllama_cases import CASES, TARGETS, Sample, build, inputs_of, make_batch, on_device, with_lora
from nemo_forks import Forked, environment, wait_for_all

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
    batches, device = {}, next(model.parameters()).device
    for name, samples in BATCHES.items():
        batch = on_device(make_batch(samples), device)
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
    from tensor_parallel_worker import main

    expected = {"full": computed_by_one(build().module), "lora": computed_by_one(with_lora(TARGETS).module)}
    torch.save(expected, tmp_path / "expected.pt")
    ranks = [Forked(main, rank, tmp_path, folder=tmp_path, environment=environment()) for rank in range(2)]
    wait_for_all(ranks, seconds=600)
