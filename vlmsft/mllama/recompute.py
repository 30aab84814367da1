"""Activation recomputation for layers whose trainable parameters may be adapters only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.utils.checkpoint import checkpoint


def recompute(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), keeping nothing for the backward pass but its arguments: it runs again there.

    torch's non-reentrant checkpoint, not Megatron's: that one gives no gradient to the parameters inside where no
    argument needs one, as in the first layer of a LoRA run. Megatron's random states are put back for the second run,
    so that dropout draws the same.
    """
    states = megatron_random._get_all_rng_states()
    return checkpoint(
        function,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), _rng_states(states)),
    )


@contextmanager
def _rng_states(states: tuple) -> Iterator[None]:
    with megatron_random._fork_rng():
        megatron_random._set_all_rng_states(*states)
        yield


def recomputes(config: Any) -> bool:
    """Whether a part of the model with this config recomputes its layers now."""
    return config.recompute_granularity == "full" and torch.is_grad_enabled()
