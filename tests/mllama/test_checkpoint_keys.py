"""Distributed checkpoints: same keys, shapes and shards as NeMo's stock model on TransformerEngine's layers."""

from __future__ import annotations

import pytest
import torch
from mllama_cases import TEXT, VISION, build

pytestmark = [pytest.mark.nemo, pytest.mark.usefixtures("megatron")]


@pytest.fixture(scope="module")
def ours(megatron):
    return build().module


def describe(value):
    """What a checkpoint stores under a key: global shape, this rank's part, and the name in the file."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

    if isinstance(value, ShardedTensor):
        return ("tensor", value.key, value.global_shape, value.global_offset, value.axis_fragmentations)
    if isinstance(value, ShardedTensorFactory):
        return ("factory", value.key, [describe(part) for part in value.build()])
    assert isinstance(value, ShardedObject)
    return ("object", value.key, value.global_shape, value.global_offset)


def test_same_as_the_stock_model(ours, monkeypatch):
    from mllama_stock import build_stock

    stock = build_stock(TEXT, VISION, monkeypatch)
    found = {key: describe(value) for key, value in ours.sharded_state_dict().items()}
    expected = {key: describe(value) for key, value in stock.sharded_state_dict().items()}
    assert found == expected


# From TransformerEngine 2.9 (every module writes _extra_state, norms too) and megatron-core 0.15.3 (its core attention
# writes nothing, GPTModel drops output_layer's _extra_state). tests/mllama/test_gpu.py compares with the real classes.
NORM_LINEAR = ("layer_norm_weight", "weight", "_extra_state")
LINEAR = ("weight", "_extra_state")
BIASED = ("weight", "bias", "_extra_state")
WITH_TRANSFORMER_ENGINE = {
    "language_model.decoder.layers.0.": {
        "self_attention.linear_qkv": NORM_LINEAR,
        "self_attention.linear_proj": LINEAR,
        "mlp.linear_fc1": NORM_LINEAR,
        "mlp.linear_fc2": LINEAR,
    },
    "language_model.decoder.xattn_layers.1.": {
        "cross_attention.linear_q": NORM_LINEAR,
        "cross_attention.linear_kv": LINEAR,
        "cross_attention.linear_proj": LINEAR,
        "cross_attention.q_layernorm": LINEAR,
        "cross_attention.k_layernorm": LINEAR,
        "mlp.linear_fc1": NORM_LINEAR,
        "mlp.linear_fc2": LINEAR,
        "": ("gate_attn", "gate_ffn"),
    },
    "language_model.decoder.final_layernorm": {"": LINEAR},
    "language_model.output_layer": {"": ("weight",)},
    "vision_model.vision_encoder.transformer.layers.3.": {
        "input_layernorm": BIASED,
        "self_attention.linear_qkv": LINEAR,
        "self_attention.linear_proj": LINEAR,
        "pre_mlp_layernorm": BIASED,
        "mlp.linear_fc1": BIASED,
        "mlp.linear_fc2": BIASED,
    },
    "vision_model.vision_encoder.conv1.": {"_linear": LINEAR},
    "vision_model.vision_encoder.ln_": {"pre": BIASED, "post": BIASED},
    "vision_model.vision_projection.": {"encoder": BIASED},
}


@pytest.mark.parametrize("prefix", WITH_TRANSFORMER_ENGINE)
def test_keys_are_those_of_transformer_engine(ours, prefix):
    expected = {
        ".".join(part for part in (prefix.rstrip(".") if name == "" else prefix + name, key) if part)
        for name, keys in WITH_TRANSFORMER_ENGINE[prefix].items()
        for key in keys
    }
    assert {key for key in ours.sharded_state_dict() if key.startswith(prefix)} == expected


def test_transformer_engines_extra_state_is_accepted(ours):
    """An empty tensor where TransformerEngine runs without fp8, or nothing at all."""
    state = ours.state_dict()
    with_tensors = {
        key: torch.empty(0, dtype=torch.uint8) if key.endswith("_extra_state") else value
        for key, value in state.items()
    }
    ours.load_state_dict(with_tensors, strict=True)
    without = {key: value for key, value in state.items() if not key.endswith("_extra_state")}
    ours.load_state_dict(without, strict=True)
