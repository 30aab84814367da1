"""The precision plugin of the trainer, chosen by one word."""

from __future__ import annotations

from typing import Literal

import nemo_run as run
import torch
from nemo.collections.llm.recipes.precision.mixed_precision import bf16_mixed, fp16_mixed
from nemo.lightning.pytorch.plugins import MegatronMixedPrecision


def fp32() -> run.Config[MegatronMixedPrecision]:
    """Everything in fp32: NeMo's recipes have no such plugin, its class has."""
    return run.Config(
        MegatronMixedPrecision,
        precision="32",
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        autocast_enabled=False,
        grad_reduce_in_fp32=True,
    )


PLUGINS = {"bf16-mixed": bf16_mixed, "16-mixed": fp16_mixed, "32": fp32}


def mixed_precision(precision: Literal["bf16-mixed", "16-mixed", "32"]) -> run.Config[MegatronMixedPrecision]:
    """NeMo's plugin for Lightning's name of a precision."""
    return PLUGINS[precision]()
