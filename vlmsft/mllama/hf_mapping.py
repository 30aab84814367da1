"""Hugging Face's MllamaForConditionalGeneration <-> vlmsft's (and NeMo's) parameters, as one table of rules.

Only names and reshapes, so both directions are exact to the bit and the round trip is the identity. Both work tensor by
tensor on any mapping (a dict, a lazily read safetensors file): no more than one rule's tensors are alive at a time.
Names are those of transformers >= 4.52 in memory ("model.language_model.layers.0. ...") and those of NeMo's MLlama at
tensor-parallel size 1, without a leading "module.".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmsft.mllama.sizes import NUM_EXTRA_EMBEDDINGS


@dataclass(frozen=True)
class Sizes:
    """What the rules must know of a model.

    num_layers: self-attention layers of the text decoder
    cross_layers: self-attention layers (numbered among themselves) that a cross-attention layer precedes
    num_heads, num_groups: of the text decoder; vision_heads: of the tower
    """

    num_layers: int
    cross_layers: tuple[int, ...]
    num_heads: int
    num_groups: int
    vision_layers: int
    vision_global_layers: int
    vision_heads: int
    patch_size: int

    @classmethod
    def from_hf(cls, config: Any) -> Sizes:
        """From a transformers MllamaConfig."""
        text, vision = config.text_config, config.vision_config
        return cls(
            num_layers=text.num_hidden_layers - len(text.cross_attention_layers),
            cross_layers=tuple(layer - i for i, layer in enumerate(sorted(text.cross_attention_layers))),
            num_heads=text.num_attention_heads,
            num_groups=text.num_key_value_heads,
            vision_layers=vision.num_hidden_layers,
            vision_global_layers=vision.num_global_layers,
            vision_heads=vision.attention_heads,
            patch_size=vision.patch_size,
        )

    @classmethod
    def from_config(cls, config: Any) -> Sizes:
        """From an MLlamaConfig."""
        text, vision = config.language_model_config, config.vision_model_config
        return cls(
            num_layers=text.num_layers,
            cross_layers=tuple(text._init_fusion_schedule(text.num_cross_attention_layers)),
            num_heads=text.num_attention_heads,
            num_groups=text.num_query_groups,
            vision_layers=vision.num_layers,
            vision_global_layers=vision.num_global_layers,
            vision_heads=vision.num_attention_heads,
            patch_size=vision.patch_size,
        )


Tensors = tuple[Tensor, ...]
Transform = Callable[[Sizes, Tensors], Tensors]


def _same(sizes: Sizes, tensors: Tensors) -> Tensors:
    return tensors


def _join_rows(sizes: Sizes, tensors: Tensors) -> Tensors:
    return (torch.cat(tensors),)


def _halve_rows(sizes: Sizes, tensors: Tensors) -> Tensors:
    return tensors[0].chunk(2)


def _split_embedding(sizes: Sizes, tensors: Tensors) -> Tensors:
    return tensors[0][:-NUM_EXTRA_EMBEDDINGS], tensors[0][-NUM_EXTRA_EMBEDDINGS:]


def _flatten_patch(sizes: Sizes, tensors: Tensors) -> Tensors:
    return (tensors[0].flatten(1),)


def _unflatten_patch(sizes: Sizes, tensors: Tensors) -> Tensors:
    return (tensors[0].unflatten(1, (-1, sizes.patch_size, sizes.patch_size)),)


def interleave(num_groups: int, tensors: Tensors) -> Tensor:
    """Projections (rows, hidden) -> one matrix whose rows go group by group: its queries, key, value."""
    return torch.cat([tensor.unflatten(0, (num_groups, -1)) for tensor in tensors], dim=1).flatten(0, 1)


def deinterleave(num_groups: int, parts: tuple[int, ...], tensor: Tensor) -> Tensors:
    """Undo `interleave`; parts: heads per group of each projection, e.g. (heads // groups, 1, 1)."""
    grouped = tensor.unflatten(0, (num_groups, sum(parts), -1))
    return tuple(part.flatten(0, 2) for part in grouped.split(parts, dim=1))


def _merge_qkv(sizes: Sizes, tensors: Tensors) -> Tensors:
    return (interleave(sizes.num_groups, tensors),)


def _split_qkv(sizes: Sizes, tensors: Tensors) -> Tensors:
    return deinterleave(sizes.num_groups, (sizes.num_heads // sizes.num_groups, 1, 1), tensors[0])


def _merge_kv(sizes: Sizes, tensors: Tensors) -> Tensors:
    return (interleave(sizes.num_groups, tensors),)


def _split_kv(sizes: Sizes, tensors: Tensors) -> Tensors:
    return deinterleave(sizes.num_groups, (1, 1), tensors[0])


def _merge_vision_qkv(sizes: Sizes, tensors: Tensors) -> Tensors:
    return (interleave(sizes.vision_heads, tensors),)


def _split_vision_qkv(sizes: Sizes, tensors: Tensors) -> Tensors:
    return deinterleave(sizes.vision_heads, (1, 1, 1), tensors[0])


@dataclass(frozen=True)
class Rule:
    """hf names <-> our names; "{}" stands for the layer number (see `layer_numbers` for what `layers` means)."""

    hf: tuple[str, ...]
    ours: tuple[str, ...]
    layers: str = "once"
    to_ours: Transform = _same
    to_hf: Transform = _same


def _rule(hf: str | tuple[str, ...], ours: str | tuple[str, ...], layers: str = "once", to_ours=_same, to_hf=_same):
    as_tuple = lambda names: (names,) if isinstance(names, str) else names  # noqa: E731
    return Rule(as_tuple(hf), as_tuple(ours), layers, to_ours, to_hf)


def _text_rules() -> list[Rule]:
    hf, ours = "model.language_model.layers.{}.", "language_model.decoder.layers.{}."
    qkv = tuple(f"{hf}self_attn.{name}_proj.weight" for name in "qkv")
    gate_up = (f"{hf}mlp.gate_proj.weight", f"{hf}mlp.up_proj.weight")
    rules = [
        _rule(qkv, f"{ours}self_attention.linear_qkv.weight", "self", _merge_qkv, _split_qkv),
        _rule(f"{hf}self_attn.o_proj.weight", f"{ours}self_attention.linear_proj.weight", "self"),
        _rule(f"{hf}input_layernorm.weight", f"{ours}self_attention.linear_qkv.layer_norm_weight", "self"),
    ]
    cross = "language_model.decoder.xattn_layers.{}."
    kv = (f"{hf}cross_attn.k_proj.weight", f"{hf}cross_attn.v_proj.weight")
    rules += [
        _rule(f"{hf}cross_attn.q_proj.weight", f"{cross}cross_attention.linear_q.weight", "cross"),
        _rule(kv, f"{cross}cross_attention.linear_kv.weight", "cross", _merge_kv, _split_kv),
        _rule(f"{hf}cross_attn.o_proj.weight", f"{cross}cross_attention.linear_proj.weight", "cross"),
        _rule(f"{hf}cross_attn.q_norm.weight", f"{cross}cross_attention.q_layernorm.weight", "cross"),
        _rule(f"{hf}cross_attn.k_norm.weight", f"{cross}cross_attention.k_layernorm.weight", "cross"),
        _rule(f"{hf}input_layernorm.weight", f"{cross}cross_attention.linear_q.layer_norm_weight", "cross"),
        _rule(f"{hf}cross_attn_attn_gate", f"{cross}gate_attn", "cross"),
        _rule(f"{hf}cross_attn_mlp_gate", f"{cross}gate_ffn", "cross"),
    ]
    for prefix, layers in ((ours, "self"), (cross, "cross")):
        rules += [
            _rule(gate_up, f"{prefix}mlp.linear_fc1.weight", layers, _join_rows, _halve_rows),
            _rule(f"{hf}post_attention_layernorm.weight", f"{prefix}mlp.linear_fc1.layer_norm_weight", layers),
            _rule(f"{hf}mlp.down_proj.weight", f"{prefix}mlp.linear_fc2.weight", layers),
        ]
    embeddings = ("language_model.embedding.word_embeddings.weight", "language_model.learnable_embedding.weight")
    return [
        *rules,
        _rule("model.language_model.embed_tokens.weight", embeddings, "once", _split_embedding, _join_rows),
        _rule("model.language_model.norm.weight", "language_model.decoder.final_layernorm.weight"),
        _rule("lm_head.weight", "language_model.output_layer.weight"),
    ]


def _tower_layer_rules(block: str, layers: str) -> list[Rule]:
    hf = f"model.vision_model.{block}.layers.{{}}."
    ours = f"vision_model.vision_encoder.{block}.layers.{{}}."
    qkv = tuple(f"{hf}self_attn.{name}_proj.weight" for name in "qkv")
    linear_qkv = f"{ours}self_attention.linear_qkv.weight"
    rules = [
        _rule(qkv, linear_qkv, layers, _merge_vision_qkv, _split_vision_qkv),
        _rule(f"{hf}self_attn.o_proj.weight", f"{ours}self_attention.linear_proj.weight", layers),
    ]
    names = {
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "pre_mlp_layernorm",
        "mlp.fc1": "mlp.linear_fc1",
        "mlp.fc2": "mlp.linear_fc2",
    }
    for hf_name, our_name in names.items():
        for kind in ("weight", "bias"):
            rules.append(_rule(f"{hf}{hf_name}.{kind}", f"{ours}{our_name}.{kind}", layers))
    if block == "global_transformer":
        rules += [_rule(f"{hf}{gate}", f"{ours}{gate}", layers) for gate in ("gate_attn", "gate_ffn")]
    return rules


def _vision_rules() -> list[Rule]:
    hf, ours = "model.vision_model.", "vision_model.vision_encoder."
    names = {
        "class_embedding": "class_embedding",
        "gated_positional_embedding.embedding": "positional_embedding",
        "gated_positional_embedding.tile_embedding.weight": "gated_tile_positional_embedding.weight",
        "gated_positional_embedding.gate": "gated_positional_embedding_gate",
        "pre_tile_positional_embedding.embedding.weight": "pre_tile_pos_embed.embedding.weight",
        "pre_tile_positional_embedding.gate": "pre_tile_pos_embed.gate",
        "post_tile_positional_embedding.embedding.weight": "post_tile_pos_embed.embedding.weight",
        "post_tile_positional_embedding.gate": "post_tile_pos_embed.gate",
        "layernorm_pre.weight": "ln_pre.weight",
        "layernorm_pre.bias": "ln_pre.bias",
        "layernorm_post.weight": "ln_post.weight",
        "layernorm_post.bias": "ln_post.bias",
    }
    return [
        *_tower_layer_rules("transformer", "tower"),
        *_tower_layer_rules("global_transformer", "global"),
        *(_rule(hf + hf_name, ours + our_name) for hf_name, our_name in names.items()),
        _rule(f"{hf}patch_embedding.weight", f"{ours}conv1._linear.weight", "once", _flatten_patch, _unflatten_patch),
        _rule("model.multi_modal_projector.weight", "vision_model.vision_projection.encoder.weight"),
        _rule("model.multi_modal_projector.bias", "vision_model.vision_projection.encoder.bias"),
    ]


RULES: tuple[Rule, ...] = (*_text_rules(), *_vision_rules())


def layer_numbers(kind: str, sizes: Sizes) -> list[tuple[int, int]]:
    """(HF's number, our number) of each layer that a rule applies to.

    HF counts text layers of both kinds together, a cross-attention layer standing before its self-attention layer; ours
    are two lists, and a cross-attention layer has the number of the self-attention layer that it precedes.
    """
    if kind == "once":
        return [(0, 0)]
    if kind == "tower":
        return [(i, i) for i in range(sizes.vision_layers)]
    if kind == "global":
        return [(i, i) for i in range(sizes.vision_global_layers)]
    if kind == "cross":
        return [(layer + i, layer) for i, layer in enumerate(sizes.cross_layers)]
    return [(i + sum(cross <= i for cross in sizes.cross_layers), i) for i in range(sizes.num_layers)]


def our_names(sizes: Sizes) -> list[str]:
    """Names of all our parameters, in the order of `to_ours`."""
    return [
        name.format(number) for rule in RULES for _, number in layer_numbers(rule.layers, sizes) for name in rule.ours
    ]


def hf_names(sizes: Sizes) -> list[str]:
    """HF's names of all parameters, in the order of `to_hf`."""
    return [
        name.format(number) for rule in RULES for number, _ in layer_numbers(rule.layers, sizes) for name in rule.hf
    ]


def to_ours(hf: Mapping[str, Tensor], sizes: Sizes) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor) of every parameter, read from HF's by name. Raises KeyError for one that `hf` lacks."""
    for rule in RULES:
        for hf_number, our_number in layer_numbers(rule.layers, sizes):
            tensors = rule.to_ours(sizes, tuple(hf[name.format(hf_number)] for name in rule.hf))
            yield from zip((name.format(our_number) for name in rule.ours), tensors, strict=True)


def to_hf(ours: Mapping[str, Tensor], sizes: Sizes) -> Iterator[tuple[str, Tensor]]:
    """(HF's name, tensor) of every parameter, read from ours by name. Raises KeyError for one that `ours` lacks."""
    for rule in RULES:
        for hf_number, our_number in layer_numbers(rule.layers, sizes):
            tensors = rule.to_hf(sizes, tuple(ours[name.format(our_number)] for name in rule.ours))
            yield from zip((name.format(hf_number) for name in rule.hf), tensors, strict=True)


# transformers keeps the layout of its first releases in files
_FILE_LAYOUT = (
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(vision_model|multi_modal_projector)\."), r"model.\1."),
)


def memory_name(name: str) -> str:
    """HF's name in memory for one in a file of any transformers version."""
    for pattern, replacement in _FILE_LAYOUT:
        name, count = pattern.subn(replacement, name)
        if count:
            return name
    return name


def file_name(name: str) -> str:
    """The name that transformers 4.57 writes into a file for one in memory; vLLM and older transformers read it."""
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    if name.startswith("lm_head."):
        return "language_model." + name
    return name.removeprefix("model.")
