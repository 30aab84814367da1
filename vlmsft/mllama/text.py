"""MLlama's text decoder: Llama's self-attention layers with gated cross-attention layers in front of some of them."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from nemo.collections.vlm.mllama.model.language import (
    CrossAttentionTransformerBlock,
    DummyCrossAttentionTransformerLayer,
)
from torch import Tensor, nn

from vlmsft.mllama import lean
from vlmsft.mllama.attention import CrossPlan, random_per_rank
from vlmsft.mllama.layers import CrossLayer, LayerKit, cross_layer_spec, text_layer_spec, whole_rows
from vlmsft.mllama.recompute import recompute, recomputes
from vlmsft.mllama.sizes import NUM_EXTRA_EMBEDDINGS


class SeenImages(NamedTuple):
    """What the cross-attention layers see.

    tokens: (N, 1, H), of all images; plan: which rows see which of them
    row_mask: (S, B, 1), 1 for rows that see an image; own_row_mask: of this rank's rows
    """

    tokens: Tensor
    plan: CrossPlan
    row_mask: Tensor
    own_row_mask: Tensor


class TextBlock(CrossAttentionTransformerBlock):
    """NeMo's CrossAttentionTransformerBlock (its names, its checkpoint layout) over the layers of a LayerKit."""

    layers: nn.ModuleList
    xattn_layers: nn.ModuleList
    final_layernorm: nn.Module

    def __init__(self, config, kit: LayerKit, pre_process: bool, post_process: bool):
        submodules = TransformerBlockSubmodules(
            layer_specs=[text_layer_spec(kit)] * config.num_layers, layer_norm=ModuleSpec(module=kit.norm)
        )
        # past NeMo's own constructor, which names TransformerEngine's classes
        TransformerBlock.__init__(
            self, config=config, spec=submodules, pre_process=pre_process, post_process=post_process
        )
        self.fusion_schedule = list(config.fusion_schedule)
        self.is_lean = False  # see lean.py; the model decides at each forward
        self.xattn_layers = nn.ModuleList(
            cast(nn.Module, build_module(cross_layer_spec(kit), config=config, layer_number=i + 1))
            if i in self.fusion_schedule
            else DummyCrossAttentionTransformerLayer(config=config)
            for i in range(config.num_layers)
        )

    def forward(
        self, hidden_states: Tensor, rotary_pos_emb: Tensor, image_tokens: Tensor | None, plan: CrossPlan | None
    ) -> Tensor:
        """One pass through all layers.

        hidden_states: (S, B, H) text embeddings; with sequence parallelism (S / TP, B, H), this rank's rows
        image_tokens: (N, 1, H) projected tokens of the real tiles of all images; None skips the cross-attention layers,
            which is exact where no row sees an image
        plan: which rows see which of them
        Returns the same shape as hidden_states, normalised.
        """
        images = self._images(hidden_states, image_tokens, plan)
        if self.is_lean:
            run = partial(self._lean_layer, images, *lean.rotation(rotary_pos_emb, hidden_states.shape[1]))
        else:
            run = partial(self._megatron_layer, images, rotary_pos_emb)
        for i in range(len(self.layers)):
            hidden_states = recompute(run, i, hidden_states) if recomputes(self.config) else run(i, hidden_states)
        return self.final_layernorm(hidden_states)

    def _images(self, hidden_states: Tensor, tokens: Tensor | None, plan: CrossPlan | None) -> SeenImages | None:
        if tokens is None or plan is None:
            return None
        row_mask = own_row_mask = plan.row_mask(hidden_states)
        if self.config.sequence_parallel:
            own_row_mask = tensor_parallel.scatter_to_sequence_parallel_region(row_mask)
        return SeenImages(tokens, plan, row_mask, own_row_mask)

    def _lean_layer(self, images: SeenImages | None, cos: Tensor, sin: Tensor, i: int, hidden_states: Tensor) -> Tensor:
        if images is not None and i in self.fusion_schedule:
            hidden_states = lean.cross_layer(
                self.xattn_layers[i], hidden_states, images.tokens, images.plan, images.row_mask
            )
        return lean.self_layer(self.layers[i], hidden_states, cos, sin)

    def _megatron_layer(
        self, images: SeenImages | None, rotary_pos_emb: Tensor, i: int, hidden_states: Tensor
    ) -> Tensor:
        cross_layer, key_value = cast(CrossLayer, self.xattn_layers[i]), None
        if images is not None and i in self.fusion_schedule:
            # all ranks hold all image tokens: dropout is the same on each
            key_value = cross_layer.cross_attention.get_key_value_tensors(images.tokens)
        with random_per_rank() if self.config.sequence_parallel else nullcontext():
            if images is not None and key_value is not None:
                hidden_states = cross_layer(hidden_states, key_value, images.plan, images.row_mask, images.own_row_mask)
            hidden_states, _ = self.layers[i](
                hidden_states=hidden_states, attention_mask=None, rotary_pos_emb=rotary_pos_emb
            )
        return hidden_states


class TextModel(GPTModel):
    """Embeddings, TextBlock and output layer, named as NeMo's CrossAttentionTextModel."""

    decoder: TextBlock

    def __init__(self, config, kit: LayerKit, vocab_size: int, pre_process: bool = True, post_process: bool = True):
        # with sequence parallelism all ranks hold all rows here, and a part of them in the block only: special tokens
        # come from a table of their own, and answers stand anywhere
        super().__init__(
            whole_rows(config),
            # no layers here: the block is replaced below, and building it twice takes twice the memory.
            # GPTModel hands this on to TransformerBlock, which takes both kinds of specs
            transformer_layer_spec=cast(ModuleSpec, TransformerBlockSubmodules(layer_specs=[])),
            vocab_size=vocab_size,
            max_sequence_length=config.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            fp16_lm_cross_entropy=config.fp16_lm_cross_entropy,
            parallel_output=config.parallel_output,
            share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
            position_embedding_type=config.position_embedding_type,
            rotary_percent=config.rotary_percent,
            rotary_base=config.rotary_base,
            seq_len_interpolation_factor=config.seq_len_interpolation_factor,
        )
        self.compiled_loss = kit.compiled
        self.decoder = TextBlock(config, kit, pre_process, post_process)
        self.row_multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
        self.learnable_embedding = tensor_parallel.VocabParallelEmbedding(
            num_embeddings=NUM_EXTRA_EMBEDDINGS,
            embedding_dim=config.hidden_size,
            init_method=config.init_method,
            reduce_scatter_embeddings=False,
            config=config,
        )

    def num_rows(self, length: int) -> int:
        """Text rows of the decoder for texts of this length: with sequence parallelism each rank has equally many."""
        return -(-length // self.row_multiple) * self.row_multiple

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, S) ids below vocab_size + 8 -> (S, B, H): the last eight come from `learnable_embedding`."""
        is_special = tokens >= self.vocab_size
        words = self.embedding(tokens.clamp(max=self.vocab_size - 1), None)
        special = self.learnable_embedding((tokens - self.vocab_size).clamp(min=0)).transpose(0, 1)
        return torch.where(is_special.t().unsqueeze(-1), special.to(words.dtype), words)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        image_tokens: Tensor | None = None,
        plan: CrossPlan | None = None,
        idle_parameters: list[nn.Parameter] | None = None,
        answer_rows: Tensor | None = None,
    ) -> Tensor:
        """Losses (B, S) in fp32 when labels are given, logits (B, S, vocab_size / TP) otherwise.

        tokens, labels: (B, S); labels of -100 give a loss of 0
        image_tokens, plan: as in TextBlock; the plan covers num_rows(S) rows
        idle_parameters: trainable parameters that this batch leaves out; they get a gradient of zero
        answer_rows: (N,) positions in the flattened (B, S) labels that hold all labels other than -100: logits are
            computed for these only. None computes them for every position
        """
        hidden_states = self._decode(touch(self.embed(tokens), idle_parameters or []), image_tokens, plan)
        if labels is None:
            return self._logits(hidden_states).transpose(0, 1).contiguous()
        if answer_rows is None or len(answer_rows) == 0:  # no answer: all positions, so that every parameter has a part
            return self._losses(labels, hidden_states)
        rows = hidden_states.transpose(0, 1).flatten(0, 1)[answer_rows].unsqueeze(1)
        losses = self._losses(labels.flatten()[answer_rows].unsqueeze(0), rows)
        return losses.new_zeros(labels.numel()).index_copy(0, answer_rows, losses.flatten()).view_as(labels)

    def _decode(self, hidden_states: Tensor, image_tokens: Tensor | None, plan: CrossPlan | None) -> Tensor:
        """(S, B, H) embeddings -> (S, B, H), through the block."""
        length = hidden_states.shape[0]
        rotary_pos_emb = self.rotary_pos_emb(self.num_rows(length))
        if self.row_multiple == 1:
            return self.decoder(hidden_states, rotary_pos_emb, image_tokens, plan)
        # rows of zeros behind the text: no row sees them
        hidden_states = F.pad(hidden_states, (0, 0, 0, 0, 0, self.num_rows(length) - length))
        hidden_states = tensor_parallel.scatter_to_sequence_parallel_region(hidden_states)
        hidden_states = self.decoder(hidden_states, rotary_pos_emb, image_tokens, plan)
        # the output layer adds up its gradient over the ranks (of answers only): here each takes its rows of the sum
        whole = tensor_parallel.gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        return whole[:length]

    def _logits(self, hidden_states: Tensor) -> Tensor:
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden_states, weight=weight)
        return logits

    def _losses(self, labels: Tensor, hidden_states: Tensor) -> Tensor:
        """labels (B, S), hidden_states (S, B, H) -> (B, S)."""
        logits, known = self._logits(hidden_states), labels.clamp(min=0)
        if self.compiled_loss:
            losses = self.compute_language_model_loss(known, logits)
        else:
            losses = tensor_parallel.vocab_parallel_cross_entropy(logits, known.t().contiguous()).t().contiguous()
        # a position without a label is masked here too: 0 * inf in the caller's mask would be NaN
        return losses.masked_fill(labels < 0, 0.0)


def touch(hidden_states: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """hidden_states, unchanged, in a graph that gives each of `parameters` a gradient of zero.

    Data-parallel ranks wait for a gradient of every trainable parameter: a rank whose micro batch has no image would
    never report those of the tower and of the cross-attention layers.
    """
    if not parameters:
        return hidden_states
    one_of_each = torch.stack([parameter.reshape(-1)[0].to(hidden_states.dtype) for parameter in parameters])
    return hidden_states + 0 * one_of_each.sum()
