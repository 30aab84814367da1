"""MLlama for training: tower, projector and text decoder behind NeMo's MLlamaModel."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from nemo.collections.vlm.mllama.model.base import MLlamaBaseModel
from nemo.collections.vlm.mllama.model.base import MLlamaModel as NeMoMLlamaModel
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction
from torch import Tensor, nn

from vlmsft.data.blend import SET_KEY, SET_NAMES_KEY
from vlmsft.errors import Problem, UserError
from vlmsft.mllama import fp8, lean
from vlmsft.mllama.attention import CrossPlan, plan_cross_attention, unseen_plan
from vlmsft.mllama.config import MLlamaConfig
from vlmsft.mllama.layers import find_norm_linears, tell_wrapped_norms
from vlmsft.mllama.vision import CHANNELS

if TYPE_CHECKING:
    from vlmsft.mllama.text import TextModel
    from vlmsft.mllama.vision import VisionModel

logger = logging.getLogger(__name__)

GATES = ("gate_attn", "gate_ffn", "gate", "gated_positional_embedding_gate")
"""Last parts of the names of all gates: cross-attention, global layers, tile and position embeddings."""


class MLlamaBase(MLlamaBaseModel):
    """NeMo's MLlamaBaseModel (its names, its checkpoint layout) with a forward that takes real tiles only."""

    config: MLlamaConfig
    language_model: TextModel
    vision_model: VisionModel

    def __init__(self, config: MLlamaConfig, tokenizer=None):
        super().__init__(config=config, tokenizer=tokenizer)
        vision = config.vision_model_config
        assert vision is not None  # or there would be no tower
        self.patch_size = vision.patch_size
        self.aspect_ratios = vision.supported_aspect_ratios
        self.tokens_per_tile = (self.image_res // self.patch_size) ** 2 + 1
        self._init_gates(config.gate_init)
        self._freeze(config)
        self._norm_linears = find_norm_linears(self)
        self._checked: lean.Checked | None = None
        self._frozen_matrices: fp8.FrozenMatrices | None = None
        self._has_run = False
        self._megatron_because: str | None = None

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
        answer_rows: Tensor | None = None,
    ) -> Tensor:
        """Losses (B, S) when labels are given, logits (B, S, vocab_size / TP) otherwise.

        tokens, position_ids, labels: (B, S) on the model's device. Positions count from 0 whatever is given, as NeMo's.
        tiles: (T, 3, H, W) uint8 on the model's device, the real tiles of all I images in order
        image_sample, num_tiles, aspect_ratio_ids: (I,) on the host: the sample an image belongs to, its real tiles,
            HF's id of their arrangement
        visible_from, visible_until: (I,) on the host: the text rows [from, until) that see the image
        answer_rows: (N,) on the model's device: see TextModel.forward
        Without images, or where no row sees one, the tower and the cross-attention layers are skipped (they would add
        exactly nothing) and their trainable parameters get a gradient of zero; see _without_images for the exception.
        """
        self._choose_forward()
        if tiles is None or num_tiles is None or aspect_ratio_ids is None or len(tiles) == 0:
            return self._without_images(tokens, labels, answer_rows)
        counts = num_tiles.tolist()
        self._check_tiles(counts, aspect_ratio_ids.tolist(), len(tiles))
        plan = self._plan(tokens, counts, image_sample, visible_from, visible_until)
        if not plan.sees_images:
            return self._without_images(tokens, labels, answer_rows)
        image_tokens = self.vision_model(tiles, counts, aspect_ratio_ids)
        return self.language_model(tokens, labels, image_tokens, plan, answer_rows=answer_rows)

    def megatron_because(self) -> str | None:
        """What makes the next forward use Megatron's classes; None where the layers run as lean.py's functions."""
        if self.config.lean_forward is False:
            return "lean_forward is false"
        if self.config.lean_forward is None and self.config.tensor_model_parallel_size > 1:
            return "tensor_model_parallel_size is more than 1 and lean_forward not true"
        self._checked = self._checked or lean.Checked(self)
        return self._checked.why_not()

    def _choose_forward(self) -> None:
        """At each forward: LoRA comes after the model was built, and hooks come and go."""
        reason = self.megatron_because()
        if reason and self.config.lean_forward:
            problem = Problem("model.config.lean_forward", "true", f"null or false where {reason}")
            raise UserError(problem, state="stopped at a forward pass")
        if self.config.frozen_fp8 is not None:
            self._quantise(self.config.frozen_fp8, reason)
        if self._has_run and reason != self._megatron_because:  # the summary at the start tells the first
            what = f"Megatron's classes: {reason}" if reason else "plain functions"
            logger.info("from now on layers run as %s", what)
        self._has_run, self._megatron_because = True, reason
        for part in (self.language_model.decoder, self.vision_model.vision_encoder):
            part.is_lean = reason is None
        if reason:
            tell_wrapped_norms(self._norm_linears)

    def _quantise(self, which: str, megatron_because: str | None) -> None:
        if megatron_because:
            expected = "null where layers run as Megatron's classes"
            raise UserError(Problem(fp8.KEY, f"{which}, but {megatron_because}", expected))
        if self._frozen_matrices is None:
            tower, decoder = self.vision_model.vision_encoder, self.language_model.decoder
            self._frozen_matrices = fp8.FrozenMatrices(which, tower, decoder)
        self._frozen_matrices.update()

    def _without_images(self, tokens: Tensor, labels: Tensor | None, answer_rows: Tensor | None) -> Tensor:
        """Where ranks communicate layer by layer, a rank without images has to go through the layers as the others do:
        on a tile that no row sees, whose gradients are all zero."""
        if not self._communicates_by_layer:
            idle = self._image_parameters()
            return self.language_model(tokens, labels, idle_parameters=idle, answer_rows=answer_rows)
        tile = tokens.new_zeros(1, CHANNELS, self.image_res, self.image_res, dtype=torch.uint8)
        image_tokens = self.vision_model(tile, [1], torch.tensor([1]), is_seen=False)
        num_samples, length = tokens.shape
        plan = unseen_plan(num_samples, self.language_model.num_rows(length), len(image_tokens))
        return self.language_model(tokens, labels, image_tokens, plan, answer_rows=answer_rows)

    @property
    def _communicates_by_layer(self) -> bool:
        """Whether Megatron's DDP sends gradients in the backward pass (NeMo sets no_sync_func for overlap_grad_reduce)
        or fetches weights in the forward pass (overlap_param_gather hooks every module)."""
        return self.config.no_sync_func is not None or bool(self._forward_pre_hooks)

    def _plan(self, tokens: Tensor, counts: list[int], *host: Tensor | None) -> CrossPlan:
        image_sample, visible_from, visible_until = (tensor.tolist() for tensor in host if tensor is not None)
        return plan_cross_attention(
            num_samples=tokens.shape[0],
            num_rows=self.language_model.num_rows(tokens.shape[1]),
            image_sample=image_sample,
            image_tokens=[count * self.tokens_per_tile for count in counts],
            visible_from=visible_from,
            visible_until=visible_until,
        )

    def _check_tiles(self, counts: list[int], aspect_ratio_ids: list[int], num_tiles: int) -> None:
        expected = [math.prod(self.aspect_ratios[i - 1]) for i in aspect_ratio_ids]
        if counts != expected or sum(counts) != num_tiles:
            raise ValueError(
                f"a batch with {num_tiles} tiles says num_tiles {counts}, and its aspect ratio ids {aspect_ratio_ids} "
                f"stand for {expected} tiles"
            )

    def _image_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters that only images reach, adapters included."""
        modules = (self.vision_model, self.language_model.decoder.xattn_layers)
        return [p for module in modules for p in module.parameters() if p.requires_grad]


class ValidationLoss(MaskedTokenLossReduction):
    """NeMo's mean loss of a global batch, how many tokens it is the mean of, and both for each named validation set.

    num_tokens: of the last global batch
    sets: (mean loss, tokens) of it by validation set, where the data has named ones
    """

    def __init__(self):
        super().__init__(validation_step=True)
        self.num_tokens: Tensor | int = 0
        self.sets: dict[str, tuple[Tensor, Tensor]] = {}
        self._set_names: tuple[str, ...] = ()

    def forward(self, batch: dict[str, Any], forward_out: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss_sum, num_tokens, reduced = super().forward(batch, forward_out)
        self._set_names = batch.get(SET_NAMES_KEY, ())
        if self._set_names:
            mask = batch["loss_mask"].float()
            of_samples = torch.stack([(forward_out.float() * mask).sum(dim=1), mask.sum(dim=1)], dim=1)
            of_sets = of_samples.new_zeros(len(self._set_names), 2)
            numbers = batch[SET_KEY].to(of_sets.device, non_blocking=True)
            reduced["set_sums"] = of_sets.index_add_(0, numbers, of_samples)
        return loss_sum, num_tokens, reduced

    def reduce(self, losses_reduced_per_micro_batch: list[dict[str, Tensor]]) -> Tensor:
        """The mean over the global batch, 0 if it has no answer token; num_tokens and sets are set. A collective."""
        from megatron.core import parallel_state

        pairs = torch.stack([self._pairs(micro_batch) for micro_batch in losses_reduced_per_micro_batch])
        totals = pairs.sum(dim=0)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        assert isinstance(group, torch.distributed.ProcessGroup)  # every rank is in a data-parallel group
        torch.distributed.all_reduce(totals, group=group)
        (mean, self.num_tokens), *of_sets = ((loss_sum / tokens.clamp(min=1), tokens) for loss_sum, tokens in totals)
        self.sets = dict(zip(self._set_names, of_sets, strict=True))
        return mean

    def _pairs(self, micro_batch: dict[str, Tensor]) -> Tensor:
        """(1 + validation sets, 2): sum of losses and number of tokens, of all samples and of each set's."""
        whole = micro_batch["loss_sum_and_ub_size"].view(1, 2)
        return torch.cat([whole, micro_batch["set_sums"]]) if self._set_names else whole


class MLlamaModel(NeMoMLlamaModel):
    """NeMo's MLlamaModel for an MLlamaConfig; forward takes vlmsft's micro batch (see MLlamaBase.forward).

    val_loss is the mean over all answer tokens of the validation sets, val_loss_<name> that of a set with a name. NeMo
    logs the mean of each global batch and leaves it to Lightning to average these, whatever their tokens: 8 samples at
    the end count as much as the 20 before, and other batch sizes give another val_loss.
    """

    def forward(self, tokens: Tensor, position_ids: Tensor | None = None, labels: Tensor | None = None, **images):
        """Losses (B, S) when labels are given, logits (B, S, vocab_size / TP) otherwise."""
        return self.module(tokens=tokens, position_ids=position_ids, labels=labels, **images)

    @property
    def validation_loss_reduction(self) -> ValidationLoss:
        if self._validation_loss_reduction is None:
            self._validation_loss_reduction = ValidationLoss()
        return self._validation_loss_reduction

    def log(self, name: str, value: Any, *args, **kwargs) -> None:
        """Lightning's, with each val_loss weighted by its tokens (NeMo's strategy logs it and has no place to say)."""
        if name == "val_loss":
            kwargs["batch_size"] = self.validation_loss_reduction.num_tokens
            for set_name, (loss, num_tokens) in self.validation_loss_reduction.sets.items():
                weighted: Any = {"on_epoch": True, "batch_size": num_tokens}  # a tensor, which Lightning's type denies
                super().log(f"val_loss_{set_name}", loss, **weighted)
        super().log(name, value, *args, **kwargs)
