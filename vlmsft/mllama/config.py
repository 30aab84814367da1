"""Configs of MLlama: NeMo's dataclasses plus what NeMo hard-codes.

NeMo's checkpoints keep constructor arguments only: an attribute set later is lost at export.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from nemo.collections.llm.gpt.model.llama import apply_rope_scaling
from nemo.collections.vlm.mllama.model.base import (
    CrossAttentionTextConfig,
    CrossAttentionVisionConfig,
    MLlamaModelConfig,
)

from vlmsft.mllama import step

# What NeMo's strategy, precision plugin and lazy initialisation set on the top config only
_FOLLOW_TOP = (
    "tensor_model_parallel_size",
    "params_dtype",
    "pipeline_dtype",
    "autocast_dtype",
    "enable_autocast",
    "fp16",
    "bf16",
    "use_cpu_initialization",
    "perform_initialization",
    "deterministic_mode",
    "calculate_per_token_loss",
)


def _recompute_each_layer(config: CrossAttentionTextConfig | CrossAttentionVisionConfig) -> None:
    """Complete recompute_granularity=full: MLlama's forward recomputes layer by layer."""
    if config.recompute_granularity == "full" and config.recompute_method is None:
        config.recompute_method, config.recompute_num_layers = "uniform", 1


@dataclass
class TextConfig(CrossAttentionTextConfig):
    """The text decoder. Fields are NeMo's; `layers` follows MLlamaConfig.layers."""

    layers: str = "auto"

    def __post_init__(self):
        _recompute_each_layer(self)
        super().__post_init__()

    def configure_model(self, tokenizer=None, pre_process=True, post_process=True, vp_stage=None):
        """Build the decoder (a TextModel); tokenizer is not used: vocab_size says how many embeddings there are."""
        from vlmsft.mllama.layers import layer_kit, resolve_layers
        from vlmsft.mllama.text import TextModel

        self.fusion_schedule = self._init_fusion_schedule(self.num_cross_attention_layers)
        self.apply_rope_fusion = resolve_layers(self.layers) == "transformer_engine"
        model = TextModel(self, layer_kit(self.layers), self.vocab_size, pre_process, post_process)
        model.rotary_pos_emb.inv_freq = apply_rope_scaling(
            model.rotary_pos_emb.inv_freq,
            factor=self.scale_factor,
            low_freq_factor=self.low_freq_factor,
            high_freq_factor=self.high_freq_factor,
            old_context_len=self.old_context_len,
        )
        return model


@dataclass
class VisionConfig(CrossAttentionVisionConfig):
    """The vision tower and projector.

    NeMo's fields (ffn_hidden_size is HF's intermediate_size, vision_chunk_size the side of a tile in pixels), and:
    patch_size: side of a patch in pixels
    intermediate_layers_indices: layers whose INPUT is handed to the projector beside the tower's output
    image_mean, image_std: of the RGB channels, in units of 0..1
    layers: follows MLlamaConfig.layers
    """

    patch_size: int = 14
    intermediate_layers_indices: list[int] = field(default_factory=lambda: [3, 7, 15, 23, 30])
    image_mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    image_std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])
    layers: str = "auto"

    def __post_init__(self):
        _recompute_each_layer(self)
        super().__post_init__()

    def configure_model(self):
        """Build the tower with its projector (a VisionModel)."""
        from vlmsft.mllama.layers import layer_kit
        from vlmsft.mllama.vision import VisionModel

        return VisionModel(self, layer_kit(self.layers))

    def problems(self) -> list[str]:
        """Sizes that don't fit each other."""
        found = []
        if self.vision_chunk_size % self.patch_size:
            found.append(f"vision_chunk_size {self.vision_chunk_size} is no multiple of patch_size {self.patch_size}")
        indices = list(self.intermediate_layers_indices)
        if indices != sorted(set(indices)) or not all(0 <= i < self.num_layers for i in indices):
            found.append(f"intermediate_layers_indices {indices} don't increase from 0 to {self.num_layers - 1}")
        if self.max_num_tiles != self.vision_max_num_chunks:
            found.append(
                f"max_num_tiles {self.max_num_tiles} is not vision_max_num_chunks {self.vision_max_num_chunks}"
            )
        return found


@dataclass
class MLlamaConfig(MLlamaModelConfig):
    """The whole model.

    layers: transformer_engine, torch, or auto (TransformerEngine with a CUDA GPU, torch elsewhere)
    lean_forward: layers as plain functions (vlmsft.mllama.lean) rather than through Megatron's classes; None: wherever
        nothing needs these, and not with tensor parallelism, where no GPU has measured them yet. True where something
        does: forward raises UserError with the reason
    frozen_fp8: tower: products with the matrices of its layers in fp8 (vlmsft.mllama.fp8) as long as nothing of it
        trains; all: with the text decoder's that don't train as well. In plain functions only, not with tensor
        parallelism
    freeze_language_model, freeze_vision_model, freeze_vision_projection: no gradients for the text decoder
        (cross-attention included), the tower, the projector
    gate_init: what a fresh model's gates hold. Meta's 0 lets a finished text model learn to see without forgetting; a
        model that is trained from nothing learns to look sooner with open gates.
    """

    language_model_config: TextConfig | None = None
    vision_model_config: VisionConfig | None = None
    layers: str = "auto"
    gate_init: float = 0.0
    lean_forward: bool | None = None
    frozen_fp8: str | None = None
    freeze_language_model: bool = False
    freeze_vision_model: bool = False
    freeze_vision_projection: bool = False

    forward_step_fn: Callable = step.forward_step
    data_step_fn: Callable = step.data_step

    def __post_init__(self):
        # NeMo copies these from the language config, also over what was asked for here, and calls this again later on
        per_token_loss = self.calculate_per_token_loss
        super().__post_init__()
        self.calculate_per_token_loss = per_token_loss
        # The q and k norms of cross-attention are replicated over tensor-parallel ranks, each of which sees its own
        # heads' gradient only. This makes Megatron sum them; without it, as in NeMo's config, the replicas drift apart.
        self.qk_layernorm = True

    def configure_model(self, tokenizer=None, vp_stage=None):
        """Build the model (an MLlamaBase).

        Raises ValueError for what this model doesn't do (pipeline and context parallelism, fp8, sequence parallelism
        without tensor parallelism or in the tower) and for sizes that don't fit each other; vlmsft.checks names the
        keys before a run comes this far. UserError for a frozen_fp8 that can't be.
        """
        from vlmsft.mllama import fp8
        from vlmsft.mllama.model import MLlamaBase

        text, vision = self.language_model_config, self.vision_model_config
        assert text is not None and vision is not None  # NeMo's defaults, which no model can be built from
        problems = self._unsupported() + vision.problems()
        if problems:
            raise ValueError("; ".join(problems))
        if self.frozen_fp8 is not None:
            fp8.require_possible(self.frozen_fp8, self.tensor_model_parallel_size)
        for part in (text, vision):
            part.layers = self.layers
            for name in _FOLLOW_TOP:
                setattr(part, name, getattr(self, name))
        text.sequence_parallel = self.sequence_parallel  # the tower's images are no multiple of the ranks
        return MLlamaBase(self, tokenizer)

    def _unsupported(self) -> list[str]:
        assert self.vision_model_config is not None
        wanted = {
            "pipeline_model_parallel_size": (self.pipeline_model_parallel_size, 1),
            "context_parallel_size": (self.context_parallel_size, 1),
            "fp8": (self.fp8, None),
            "vision_model_config.sequence_parallel": (self.vision_model_config.sequence_parallel, False),
        }
        if self.tensor_model_parallel_size == 1:
            wanted["sequence_parallel"] = (self.sequence_parallel, False)
        for name in ("language_model_config", "vision_model_config"):
            part = getattr(self, name)
            wanted[f"{name}.cpu_offloading"] = (part.cpu_offloading, False)
            wanted[f"{name}.fp8"] = (part.fp8, None)
        return [f"{name} must be {only}, not {found}" for name, (found, only) in wanted.items() if found != only]
