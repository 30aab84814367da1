"""Values of Megatron's configs that the functions of lean.py are written for; no torch, so that a plan can ask."""

from __future__ import annotations

from typing import Any

_BOTH: dict[str, tuple[Any, ...]] = {
    "hidden_dropout": (0.0,),
    "attention_dropout": (0.0,),
    "recompute_granularity": (None, "full"),
    "layernorm_zero_centered_gamma": (False,),
    "activation_func_clamp_value": (None,),
    "apply_query_key_layer_scaling": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "fp32_residual_connection": (False,),
    "glu_linear_offset": (0.0,),
    "no_rope_freq": (None,),
    "rotary_interleaved": (False,),
    "softmax_scale": (None,),
}
TEXT_VALUES = {**_BOTH, "gated_linear_unit": (True,), "normalization": ("RMSNorm",), "rotary_percent": (1.0,)}
TOWER_VALUES = {**_BOTH, "gated_linear_unit": (False,), "normalization": ("LayerNorm",)}
