"""NeMo's optimizer recipe with the values that it hides."""

from __future__ import annotations

from typing import Literal, cast

import nemo_run as run
from nemo.collections.llm.recipes.optim.adam import distributed_fused_adam_with_cosine_annealing
from nemo.lightning.pytorch.optim import MegatronOptimizerModule


def adam_with_cosine_annealing(
    precision: Literal["bf16-mixed", "16-mixed", "32"],
    max_lr: float,
    min_lr: float,
    warmup_steps: int,
    constant_steps: int,
    weight_decay: float,
    adam_beta1: float,
    adam_beta2: float,
    adam_eps: float,
    clip_grad: float,
) -> run.Config[MegatronOptimizerModule]:
    """distributed_fused_adam_with_cosine_annealing, which fixes weight_decay at 0.1 and adam_eps at 1e-5.

    No defaults: they stand in conf/optim/cosine.yaml.
    """
    module = distributed_fused_adam_with_cosine_annealing(
        precision=precision,
        warmup_steps=warmup_steps,
        constant_steps=constant_steps,
        adam_beta1=adam_beta1,
        adam_beta2=adam_beta2,
        max_lr=max_lr,
        min_lr=min_lr,
        clip_grad=clip_grad,
    )
    module.config.weight_decay = weight_decay
    module.config.adam_eps = adam_eps
    # NeMo's annotation names another class than the one that it configures
    return cast("run.Config[MegatronOptimizerModule]", module)
