"""Sizes and parameters of an MLlama from plain numbers: pure arithmetic, so that a plan needs neither torch nor a GPU.

Counts are exact (a test builds the real modules); memory.py and flops.py build on them. Names are those of NeMo's
CrossAttentionTextConfig and CrossAttentionVisionConfig.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

GIB = 1024**3
# NeMo's learnable_embedding: the image token and seven reserved ones (NeMo mllama/model/language.py)
NUM_EXTRA_EMBEDDINGS = 8
# The tower pads each tile's tokens to a multiple of 8, as HF does (NeMo mllama/model/vision.py)
TOKEN_MULTIPLE = 8
FP8_PARTS = ("tower", "all")
"""Of whose frozen matrices model.config.frozen_fp8 makes copies; all: of tower and text decoder."""
# What torch._scaled_mm wants both sizes of a matrix to be a multiple of
FP8_MULTIPLE = 16
# transformers' supported aspect ratios for four tiles; id 0 stands for "no image"
NUM_ASPECT_RATIOS = 8


def _read(config: Any, field: Field) -> Any:
    return getattr(config, field.name) if field.default is MISSING else getattr(config, field.name, field.default)


@dataclass(frozen=True)
class TextShape:
    """The text decoder. `num_layers` counts the self-attention layers only, as NeMo does (11B: 32, and 8 cross)."""

    num_layers: int
    num_cross_attention_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    kv_channels: int | None = None  # head dim; hidden_size / num_attention_heads where None

    @classmethod
    def of(cls, config: Any) -> TextShape:
        """From NeMo's CrossAttentionTextConfig, or anything with its names as attributes."""
        return cls(**{field.name: _read(config, field) for field in fields(cls)})

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_size(self) -> int:
        return self.num_query_groups * self.head_dim


@dataclass(frozen=True)
class VisionShape:
    """The vision tower and its projector into the text's width."""

    num_layers: int
    num_global_layers: int
    hidden_size: int
    vision_chunk_size: int  # pixels of a tile's side
    patch_size: int
    num_intermediate_layers: int  # earlier hidden states that the projector sees beside the last one
    text_hidden_size: int
    ffn_hidden_size: int | None = None  # 4 x hidden_size where None, as Megatron-Core's TransformerConfig
    max_num_tiles: int = 4

    @classmethod
    def of(cls, config: Any) -> VisionShape:
        """From vlmsft's VisionConfig, or anything with its names as attributes."""
        values = {field.name: _read(config, field) for field in fields(cls) if field.name != "num_intermediate_layers"}
        return cls(num_intermediate_layers=len(config.intermediate_layers_indices), **values)

    @property
    def ffn_size(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def tokens_per_tile(self) -> int:
        """Patches and the class token."""
        return (self.vision_chunk_size // self.patch_size) ** 2 + 1

    @property
    def padded_tokens_per_tile(self) -> int:
        """What the tower computes with: (tokens_per_tile) up to the next multiple of 8."""
        return -(-self.tokens_per_tile // TOKEN_MULTIPLE) * TOKEN_MULTIPLE

    @property
    def projector_input_size(self) -> int:
        return (self.num_intermediate_layers + 1) * self.hidden_size


@dataclass(frozen=True)
class Count:
    """Parameters of one part. `sharded` ones are divided over tensor-parallel ranks, `replicated` ones are on each."""

    sharded: int
    replicated: int = 0

    @property
    def total(self) -> int:
        return self.sharded + self.replicated

    def per_rank(self, tensor_model_parallel_size: int) -> int:
        return self.sharded // tensor_model_parallel_size + self.replicated

    def __add__(self, other: Count) -> Count:
        return Count(self.sharded + other.sharded, self.replicated + other.replicated)

    def __mul__(self, times: int) -> Count:
        return Count(self.sharded * times, self.replicated * times)


NONE = Count(0)


# ------------------------------------------------------------------------------------------------------- parameters


def parameter_counts(text: TextShape, vision: VisionShape) -> dict[str, Count]:
    """{"tower": ..., "projector": ..., "text": ...}; 11B: 0.864e9, 0.031e9 and 9.775e9."""
    return {"tower": tower_count(vision), "projector": projector_count(vision), "text": text_count(text)}


def text_count(text: TextShape) -> Count:
    """Decoder with word embeddings and an output layer of their own, no biases, RMSNorm, gated (SwiGLU) MLPs."""
    h, f = text.hidden_size, text.ffn_hidden_size
    mlp = Count(h * 2 * f + f * h, h)  # fc1 holds gate and up; the norm before it
    attention = Count(h * (text.query_size + 2 * text.key_size) + text.query_size * h, h)
    # the same matrices, split into linear_q and linear_kv, with norms on queries and keys, and two gates
    cross_attention = Count(attention.sharded, h + 2 * text.head_dim + 2)
    embeddings = Count(2 * text.vocab_size * h + NUM_EXTRA_EMBEDDINGS * h, h)  # and the final norm
    layers = (attention + mlp) * text.num_layers
    return layers + (cross_attention + mlp) * text.num_cross_attention_layers + embeddings


def text_matrices(text: TextShape) -> int:
    """Numbers in the matrices of the text decoder's layers; 11B: 8.724e9."""
    h, f = text.hidden_size, text.ffn_hidden_size
    layer = 2 * h * (text.query_size + text.key_size) + 3 * h * f
    return layer * (text.num_layers + text.num_cross_attention_layers)


def tower_count(vision: VisionShape) -> Count:
    """ViT with LayerNorms and MLP biases, no attention biases; global layers have two gates more.

    The position and tile embeddings are plain torch parameters: each tensor-parallel rank holds them whole.
    """
    h, f = vision.hidden_size, vision.ffn_size
    # fc2's bias is added after the row-parallel sum, so each rank has it; fc1's is split with its outputs
    layer = Count(4 * h * h + 2 * h * f + f, h + 4 * h)
    gates = Count(0, 2 * vision.num_global_layers)
    patches = Count(3 * vision.patch_size**2 * h)
    tiles = (NUM_ASPECT_RATIOS + 1) * vision.max_num_tiles * h  # values per token position of the tile embeddings
    embeddings = Count(0, h + vision.tokens_per_tile * h + tiles * vision.tokens_per_tile + 1 + 2 * (tiles + 1))
    outer_norms = Count(0, 4 * h)
    return layer * (vision.num_layers + vision.num_global_layers) + gates + patches + embeddings + outer_norms


def tower_matrices(vision: VisionShape) -> int:
    """Numbers in the matrices of the tower's layers."""
    h = vision.hidden_size
    return (4 * h * h + 2 * h * vision.ffn_size) * (vision.num_layers + vision.num_global_layers)


def projector_count(vision: VisionShape) -> Count:
    return Count((vision.projector_input_size + 1) * vision.text_hidden_size)


def lora_matrices(text: TextShape, vision: VisionShape) -> dict[str, int]:
    """{module name: inputs + outputs} of every matrix that NeMo's LoRA can take; names as it sees them."""
    h, f = text.hidden_size, text.ffn_hidden_size
    decoder = "module.language_model.decoder"
    mlp = {"mlp.linear_fc1": h + 2 * f, "mlp.linear_fc2": f + h}  # fc1 holds gate and up
    self_attention = {"linear_qkv": h + text.query_size + 2 * text.key_size, "linear_proj": text.query_size + h}
    cross_attention = {
        "linear_q": h + text.query_size,
        "linear_kv": h + 2 * text.key_size,
        "linear_proj": text.query_size + h,
    }
    v, g = vision.hidden_size, vision.ffn_size
    tower = "module.vision_model.vision_encoder"
    tower_layer = {
        "self_attention.linear_qkv": v + 3 * v,
        "self_attention.linear_proj": v + v,
        "mlp.linear_fc1": v + g,
        "mlp.linear_fc2": g + v,
    }
    stacks = [
        (f"{decoder}.layers", range(text.num_layers), {**_below("self_attention", self_attention), **mlp}),
        (f"{decoder}.xattn_layers", cross_layers(text), {**_below("cross_attention", cross_attention), **mlp}),
        (f"{tower}.transformer.layers", range(vision.num_layers), tower_layer),
        (f"{tower}.global_transformer.layers", range(vision.num_global_layers), tower_layer),
    ]
    matrices = {
        "module.language_model.output_layer": h + text.vocab_size,
        "module.vision_projection.encoder": vision.projector_input_size + vision.text_hidden_size,
        f"{tower}.conv1._linear": 3 * vision.patch_size**2 + v,
    }
    for stack, indices, layer in stacks:
        matrices |= {f"{stack}.{index}.{name}": width for index in indices for name, width in layer.items()}
    return matrices


def _below(parent: str, names: dict[str, int]) -> dict[str, int]:
    return {f"{parent}.{name}": width for name, width in names.items()}


def cross_layers(text: TextShape) -> list[int]:
    """Self-attention layers that a cross-attention layer stands before: NeMo's _init_fusion_schedule."""
    number = text.num_cross_attention_layers
    return list(range(text.num_layers))[::-1][:: -(-text.num_layers // number)][:number][::-1] if number else []


def lora_hits(target: str, matrices: Iterable[str]) -> list[str]:
    """The names that one of LoRA's target_modules takes: NeMo's ModuleMatcher and wildcard_match."""
    pattern = re.compile("^" + target.replace("*", "(.*)") + "$")
    return [name for name in matrices if name.rpartition(".")[2] == target or pattern.match(name)]


def lora_modules(text: TextShape, vision: VisionShape, target_modules: Sequence[str]) -> list[str]:
    """The names of the matrices that LoRA's target_modules take, each once.

    Raises ValueError for a target that hits nothing: NeMo passes over it.
    """
    matrices = lora_matrices(text, vision)
    hits = [lora_hits(target, matrices) for target in target_modules]
    for target, names in zip(target_modules, hits, strict=True):
        if not names:
            raise ValueError(f"LoRA target {target!r} hits none of {', '.join(matrix_names(matrices))}")
    return list(dict.fromkeys(name for names in hits for name in names))


def lora_count(text: TextShape, vision: VisionShape, dim: int, target_modules: Sequence[str]) -> Count:
    """LoRA's factors: dim x (inputs + outputs) for each matrix that is hit; NeMo shards both of them.

    Raises ValueError for a target that hits nothing.
    """
    matrices = lora_matrices(text, vision)
    return Count(dim * sum(matrices[name] for name in lora_modules(text, vision, target_modules)))


def matrix_names(matrices: Iterable[str]) -> list[str]:
    """The last parts of the names, each once: linear_qkv, linear_proj, ..."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in matrices))


def tokens_per_step(vision: VisionShape, *, global_batch_size: int, text_tokens: int) -> dict[str, int]:
    """{"text", "vision"} tokens of one optimizer step, if every sample had text_tokens and one image of all tiles."""
    seen = global_batch_size * vision.max_num_tiles * vision.tokens_per_tile
    return {"text": global_batch_size * text_tokens, "vision": seen}
