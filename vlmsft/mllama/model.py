"""MLlama for training: tower, projector and text decoder behind NeMo's MLlamaModel."""

from __future__ import annotations

import math

from nemo.collections.vlm.mllama.model.base import MLlamaBaseModel
from nemo.collections.vlm.mllama.model.base import MLlamaModel as NeMoMLlamaModel
from torch import Tensor, nn

from vlmsft.mllama.attention import CrossPlan, plan_cross_attention
from vlmsft.mllama.config import MLlamaConfig
from vlmsft.mllama.layers import find_norm_linears, tell_wrapped_norms

GATES = ("gate_attn", "gate_ffn", "gate", "gated_positional_embedding_gate")
"""Last parts of the names of all gates: cross-attention, global layers, tile and position embeddings."""


class MLlamaBase(MLlamaBaseModel):
    """NeMo's MLlamaBaseModel (its names, its checkpoint layout) with a forward that takes real tiles only."""

    def __init__(self, config: MLlamaConfig, tokenizer=None):
        super().__init__(config=config, tokenizer=tokenizer)
        self.patch_size = config.vision_model_config.patch_size
        self.tokens_per_tile = (self.image_res // self.patch_size) ** 2 + 1
        self._init_gates(config.gate_init)
        self._freeze(config)
        self._norm_linears = find_norm_linears(self)

    def _init_gates(self, value: float) -> None:
        for name, parameter in self.named_parameters():
            if name.rsplit(".", 1)[-1] in GATES:
                nn.init.constant_(parameter, value)

    def _freeze(self, config: MLlamaConfig) -> None:
        switches = {
            self.language_model: config.freeze_language_model,
            self.vision_model.vision_encoder: config.freeze_vision_model,
            self.vision_model.vision_projection: config.freeze_vision_projection,
        }
        for module, frozen in switches.items():
            if frozen:
                module.requires_grad_(False)

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        tiles: Tensor | None = None,
        image_sample: Tensor | None = None,
        num_tiles: Tensor | None = None,
        aspect_ratio_ids: Tensor | None = None,
        visible_from: Tensor | None = None,
        visible_until: Tensor | None = None,
    ) -> Tensor:
        """Losses (B, S) when labels are given, logits (B, S, vocab_size / TP) otherwise.

        tokens, position_ids, labels: (B, S) on the model's device. Positions count from 0 whatever is given, as NeMo's.
        tiles: (T, 3, H, W) uint8 on the model's device, the real tiles of all I images in order
        image_sample, num_tiles, aspect_ratio_ids: (I,) on the host: the sample an image belongs to, its real tiles,
            HF's id of their arrangement
        visible_from, visible_until: (I,) on the host: the text rows [from, until) that see the image
        Without images, or where no row sees one, the tower and the cross-attention layers are skipped (they would add
        exactly nothing) and their trainable parameters get a gradient of zero.
        """
        tell_wrapped_norms(self._norm_linears)
        if tiles is None or num_tiles is None or aspect_ratio_ids is None or len(tiles) == 0:
            return self.language_model(tokens, labels, idle_parameters=self._image_parameters())
        counts = num_tiles.tolist()
        self._check_tiles(counts, aspect_ratio_ids.tolist(), len(tiles))
        plan = self._plan(tokens, counts, image_sample, visible_from, visible_until)
        if not plan.sees_images:
            return self.language_model(tokens, labels, idle_parameters=self._image_parameters())
        image_tokens = self.vision_model(tiles, counts, aspect_ratio_ids)
        return self.language_model(tokens, labels, image_tokens, plan)

    def _plan(self, tokens: Tensor, counts: list[int], *host: Tensor | None) -> CrossPlan:
        image_sample, visible_from, visible_until = (tensor.tolist() for tensor in host if tensor is not None)
        return plan_cross_attention(
            num_samples=tokens.shape[0],
            num_rows=tokens.shape[1],
            image_sample=image_sample,
            image_tokens=[count * self.tokens_per_tile for count in counts],
            visible_from=visible_from,
            visible_until=visible_until,
        )

    def _check_tiles(self, counts: list[int], aspect_ratio_ids: list[int], num_tiles: int) -> None:
        ratios = self.config.vision_model_config.supported_aspect_ratios
        expected = [math.prod(ratios[i - 1]) for i in aspect_ratio_ids]
        if counts != expected or sum(counts) != num_tiles:
            raise ValueError(
                f"a batch with {num_tiles} tiles says num_tiles {counts}, and its aspect ratio ids {aspect_ratio_ids} "
                f"stand for {expected} tiles"
            )

    def _image_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters that only images reach, adapters included."""
        modules = (self.vision_model, self.language_model.decoder.xattn_layers)
        return [p for module in modules for p in module.parameters() if p.requires_grad]


class MLlamaModel(NeMoMLlamaModel):
    """NeMo's MLlamaModel for an MLlamaConfig; forward takes vlmsft's micro batch (see MLlamaBase.forward)."""

    def forward(self, tokens: Tensor, position_ids: Tensor | None = None, labels: Tensor | None = None, **images):
        """Losses (B, S) when labels are given, logits (B, S, vocab_size / TP) otherwise."""
        return self.module(tokens=tokens, position_ids=position_ids, labels=labels, **images)
