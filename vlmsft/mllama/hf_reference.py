"""Hugging Face's Mllama with two repairs: the numeric reference, the export gate's and the generator's model.

transformers 4.57.6 differs from Meta's and NeMo's model, which the weights were trained with, in two places:
- 4.55 and newer hand the projector the tower's intermediate states taken AFTER the layers that
  intermediate_layers_indices names; the weights were trained with those BEFORE them.
- a text row that sees no image is masked in the feed-forward branch of a cross-attention layer only; its attention
  branch attends to every image instead of adding nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers import MllamaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mllama.modeling_mllama import (
    MllamaCrossAttentionDecoderLayer,
    MllamaVisionEncoder,
)

Model = TypeVar("Model", bound=torch.nn.Module)


class StatesBeforeLayers(MllamaVisionEncoder):
    """MllamaVisionEncoder whose hidden_states[i] is the input of layer i."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutput:
        """(images, tokens, hidden) -> last_hidden_state of that shape, hidden_states one such per layer."""
        states = []
        for layer in self.layers:
            states.append(hidden_states)
            hidden_states = layer(hidden_state=hidden_states, attention_mask=attention_mask)
        last = cast(torch.FloatTensor, hidden_states)  # HF's annotation leaves out bfloat16 and the GPU
        return BaseModelOutput(last_hidden_state=last, hidden_states=tuple(states))


class BothBranchesMasked(MllamaCrossAttentionDecoderLayer):
    """MllamaCrossAttentionDecoderLayer that adds nothing to rows which see no image."""

    def forward(
        self,
        hidden_states: Tensor,
        cross_attention_states: Tensor | None,
        cross_attention_mask: Tensor | None,
        attention_mask: Tensor | None,
        full_text_row_masked_out_mask: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, S, H) -> the same shape; full_text_row_masked_out_mask (B, 1, S, 1) is 0 for a row that sees no image."""
        # HF's annotation has no None, a pair of masks and a tuple as the result; its code has what stands here
        forward = cast(Callable[..., Tensor], super().forward)
        output = forward(
            hidden_states,
            cross_attention_states=cross_attention_states,
            cross_attention_mask=cross_attention_mask,
            attention_mask=attention_mask,
            full_text_row_masked_out_mask=full_text_row_masked_out_mask,
            **kwargs,
        )
        if full_text_row_masked_out_mask is None:
            return output
        return torch.where(full_text_row_masked_out_mask[:, 0].bool(), output, hidden_states)


def repair(model: Model) -> Model:
    """Put both repairs into a Mllama model, in place; weights, config and saved form stay as they are. Safe twice."""
    for module in model.modules():
        if isinstance(module, MllamaCrossAttentionDecoderLayer):
            module.__class__ = BothBranchesMasked
        elif isinstance(module, MllamaVisionEncoder):
            module.__class__ = StatesBeforeLayers
    return model


def load(folder: str, **kwargs: Any) -> MllamaForConditionalGeneration:
    """MllamaForConditionalGeneration.from_pretrained(folder, **kwargs) with both repairs, in evaluation mode."""
    return repair(MllamaForConditionalGeneration.from_pretrained(folder, **kwargs)).eval()
