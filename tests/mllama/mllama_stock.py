"""NeMo's stock MLlama on a CPU: its own forward code, with only these substitutions.

1. Layer classes: TransformerEngine's linears and norms -> vlmsft's portable ones (same parameter names), in NeMo's
   language.py and vision.py and as the final norm in Megatron's TransformerBlock.
2. Core attention: TEDotProductAttention -> `DenseAttention` below, which adds NeMo's dense bias to the scores.
3. Text layer spec: Megatron's TransformerEngine spec -> the same spec over the classes of 1 and 2.
4. Tower width, intermediate layers: read from the config; NeMo's constructor has 1280 and 3, 7, 15, 23, 30 in its code.
5. dtype: images are cast to params_dtype; NeMo's forward casts them to bf16.
6. Device: "cuda" is answered with the CPU by vlmsft.runtime.cpu.
7. torch.compile is off (tests' conftest), so Megatron's compiled activations run as written.
"""

from __future__ import annotations

import copy
import math

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import MegatronModule, transformer_block
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from nemo.collections.vlm.mllama.model import base, language, vision
from torch import nn

from vlmsft.mllama.layers import PortableNorm, PortableNormLinear


class DenseAttention(nn.Module):
    """softmax(q k^T / sqrt(d) + bias) v, every score in memory."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **kwargs):
        super().__init__()

    def forward(
        self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None, packed_seq_params=None
    ):
        groups = query.shape[2] // key.shape[2]
        key, value = (t.repeat_interleave(groups, dim=2) for t in (key, value))
        scores = torch.einsum("sbhd,tbhd->bhst", query, key) / math.sqrt(query.shape[-1])
        if attn_mask_type == AttnMaskType.causal:
            scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
        if attention_bias is not None:
            scores = scores + attention_bias
        weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)  # as TransformerEngine's
        return torch.einsum("bhst,tbhd->sbhd", weights, value).flatten(2)


def text_layer_spec(config) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=PortableNormLinear,
                    core_attention=DenseAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=PortableNormLinear, linear_fc2=RowParallelLinear)
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


class StockVisionModel(base.CrossAttentionVisionModel):
    """NeMo's class with a constructor that reads width and intermediate layers from the config (substitutions 4, 5)."""

    def __init__(self, config, indices):
        MegatronModule.__init__(self, config=config)
        self.vision_encoder = vision.VisionEncoder(
            config=config, image_size=config.vision_chunk_size, patch_size=14, return_intermediate=indices
        )
        projection_config = copy.deepcopy(config)
        projection_config.hidden_size = config.text_hidden_size
        self.vision_projection = base.MultimodalProjector(
            config=projection_config,
            submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=None),
            projector_type="affine",
            input_size=(len(indices) + 1) * config.hidden_size,
        )
        self.vision_projection.encoder.skip_bias_add = False

    def forward(self, images, aspect_ratio_ids):
        tokens = self.vision_encoder(images.to(self.config.params_dtype), aspect_ratio_ids)
        shape = tokens.shape
        tokens = self.vision_projection(tokens.reshape(-1, *shape[-2:]))
        return tokens.reshape(*shape[:-1], -1)


def build_stock(text: dict, vision_fields: dict, monkeypatch) -> base.MLlamaBaseModel:
    """NeMo's MLlamaBaseModel for the fields of a TextConfig and a VisionConfig."""
    classes = {
        "TELayerNormColumnParallelLinear": PortableNormLinear,
        "TEColumnParallelLinear": ColumnParallelLinear,
        "TERowParallelLinear": RowParallelLinear,
        "TENorm": PortableNorm,
        "LayerNormImpl": PortableNorm,
        "TEDotProductAttention": DenseAttention,
    }
    for module in (language, vision):
        for name, substitute in classes.items():
            monkeypatch.setattr(module, name, substitute, raising=False)
    monkeypatch.setattr(transformer_block, "LayerNormImpl", PortableNorm)

    fields = dict(vision_fields)
    indices = fields.pop("intermediate_layers_indices")
    vision_config = base.CrossAttentionVisionConfig(use_cpu_initialization=True, **fields)
    monkeypatch.setattr(
        base.CrossAttentionVisionConfig, "configure_model", lambda self: StockVisionModel(self, indices)
    )
    text_config = base.CrossAttentionTextConfig(
        use_cpu_initialization=True, transformer_layer_spec=text_layer_spec, **text
    )

    class Tokenizer:
        vocab_size = text["vocab_size"]

    return base.MLlamaModelConfig(
        language_model_config=text_config, vision_model_config=vision_config, use_cpu_initialization=True
    ).configure_model(Tokenizer())
