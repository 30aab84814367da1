"""MLlama's vision tower and projector: uint8 tiles in, one flat sequence of projected image tokens out.

NeMo's forward carries four tiles per image, padding tokens and all, through the tower and into the cross-attention.
This one computes the same numbers, but sorts each image's real tokens to the front once, so that attention needs no
bias (see attention.py) and everything behind the tower sees real tokens only. Missing tiles stay in the tower as zero
pixels after normalisation: real tokens attend to them, and the weights were trained so.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_tensor_model_parallel_region
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from nemo.collections.vlm.mllama.model.vision import PrecomputedTilePositionEmbedding
from torch import Tensor, nn

from vlmsft.mllama import lean
from vlmsft.mllama.attention import TowerGroup, TowerPlan
from vlmsft.mllama.layers import LayerKit, vision_layer_spec
from vlmsft.mllama.recompute import recompute, recomputes
from vlmsft.mllama.sizes import TOKEN_MULTIPLE

if TYPE_CHECKING:
    from vlmsft.mllama.config import VisionConfig

CHANNELS = 3


class PatchEmbedding(MegatronModule):
    """A convolution whose stride is its kernel, as a linear layer; parameter `_linear.weight`, as NeMo's."""

    def __init__(self, config, kit: LayerKit):
        super().__init__(config=config)
        self.patch_size = config.patch_size
        self._linear = kit.column_linear(
            CHANNELS * config.patch_size**2,
            config.hidden_size,
            bias=False,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="conv1",
        )

    def forward(self, tiles: Tensor) -> Tensor:
        """(T, 3, H, W) -> (T, patches, hidden)."""
        patches = F.unfold(tiles, self.patch_size, stride=self.patch_size).transpose(1, 2)
        # One matrix: for a batch of transposed ones cuBLAS may pick a kernel 100 times slower. By the module, whose
        # hook waits for its weight where Megatron gathers the optimizer's shards during the forward pass.
        rows, _ = self._linear(patches.flatten(0, 1))
        return gather_from_tensor_model_parallel_region(rows.unflatten(0, patches.shape[:2]))


class TokenOrder:
    """Which images stand next to each other in the tower, and which of an image's tokens come first.

    Images with the same number of real tiles are neighbours. Within an image: the tokens of its real tiles, then the
    padding tokens of those tiles, then the missing tiles.
    """

    def __init__(self, num_tiles: list[int], max_tiles: int, num_tokens: int):
        """num_tiles: real tiles of each image; num_tokens: tokens per tile, without padding."""
        self.max_tiles = max_tiles
        self.num_tokens = num_tokens
        self.padded_tokens = -(-num_tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
        self.images = sorted(range(len(num_tiles)), key=lambda i: num_tiles[i])
        self.groups: list[tuple[int, int, int]] = []  # first image, end image, real tiles
        for position, image in enumerate(self.images):
            tiles = num_tiles[image]
            first = self.groups.pop()[0] if self.groups and self.groups[-1][2] == tiles else position
            self.groups.append((first, position + 1, tiles))

    def plan(self) -> TowerPlan:
        """What TowerAttention needs to know."""
        groups = (TowerGroup(first, end, tiles * self.num_tokens) for first, end, tiles in self.groups)
        return TowerPlan(tuple(groups), self.max_tiles * self.padded_tokens)

    def sort(self, x: Tensor) -> Tensor:
        """(I, tiles, padded tokens, hidden), ordered as self.images -> (I * tiles * padded tokens, 1, hidden)."""
        groups = [self._sort_group(x[first:end], tiles) for first, end, tiles in self.groups]
        return torch.cat(groups).flatten(0, 1).unsqueeze(1)

    def _sort_group(self, x: Tensor, tiles: int) -> Tensor:
        parts = (x[:, :tiles, : self.num_tokens], x[:, :tiles, self.num_tokens :], x[:, tiles:])
        return torch.cat([part.flatten(1, 2) for part in parts], dim=1)

    def real(self, x: Tensor) -> Tensor:
        """(I * tiles * padded tokens, 1, hidden), sorted -> (real tokens, hidden) in the batch's image order."""
        per_image = x.squeeze(1).unflatten(0, (len(self.images), -1))
        by_image: dict[int, Tensor] = {}
        for first, end, tiles in self.groups:
            for position in range(first, end):
                by_image[self.images[position]] = per_image[position, : tiles * self.num_tokens]
        return torch.cat([by_image[i] for i in range(len(self.images))])


class FewTokens(TokenOrder):
    """The first few tokens of an image of one tile, which no text row sees: they pass through all that a seen image's
    tokens do, and cost next to nothing."""

    def __init__(self, max_tiles: int, num_tokens: int):
        super().__init__([1], max_tiles, num_tokens)

    def plan(self) -> TowerPlan:
        return TowerPlan((TowerGroup(0, 1, TOKEN_MULTIPLE),), TOKEN_MULTIPLE)

    def sort(self, x: Tensor) -> Tensor:
        return super().sort(x)[:TOKEN_MULTIPLE]

    def real(self, x: Tensor) -> Tensor:
        return x.squeeze(1)


class VisionEncoder(MegatronModule):
    """The tower, named as NeMo's VisionEncoder; width, depth, patch size and intermediate layers from the config."""

    config: VisionConfig

    def __init__(self, config, kit: LayerKit):
        super().__init__(config=config)
        width = config.hidden_size
        self.num_patches = (config.vision_chunk_size // config.patch_size) ** 2
        num_tokens = self.num_patches + 1
        self.conv1 = PatchEmbedding(config, kit)
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(num_tokens, width))
        self.ln_post = kit.norm(config=config, hidden_size=width)
        self.ln_pre = kit.norm(config=config, hidden_size=width)
        self.transformer = _block(config, kit)
        global_config = copy.deepcopy(config)
        global_config.num_layers = config.num_global_layers
        global_config.gated = True
        self.global_transformer = _block(global_config, kit)
        self.pre_tile_pos_embed = PrecomputedTilePositionEmbedding(config=config, gated=True)
        self.post_tile_pos_embed = PrecomputedTilePositionEmbedding(config=config, gated=True)
        self.gated_tile_positional_embedding = nn.Embedding(
            config.max_aspect_ratio_id + 1, config.max_num_tiles * num_tokens * width
        )
        self.gated_positional_embedding_gate = nn.Parameter(torch.zeros(1))
        self.is_lean = False  # see lean.py; the model decides at each forward

    def forward(self, pixels: Tensor, num_tiles: list[int], aspect_ratio_ids: Tensor, is_seen: bool = True) -> Tensor:
        """Features of the real tiles' tokens.

        pixels: (T, 3, H, W) normalised, real tiles only
        num_tiles: real tiles of each of the I images
        aspect_ratio_ids: (I,) on the host
        is_seen: False for a single tile that no text row sees, of which a few tokens are computed
        Returns (T * (patches + 1), hidden * (1 + intermediate layers)), image by image, tile by tile; where it is not
        seen (TOKEN_MULTIPLE, hidden * (1 + intermediate layers)).
        """
        max_tiles, num_tokens = self.config.vision_max_num_chunks, self.num_patches + 1
        order = TokenOrder(num_tiles, max_tiles, num_tokens) if is_seen else FewTokens(max_tiles, num_tokens)
        ids = aspect_ratio_ids[order.images].to(pixels.device, non_blocking=True)
        x = self._embed(self._place(self.conv1(pixels), num_tiles, order), ids)
        x = F.pad(self.ln_pre(x), (0, 0, 0, order.padded_tokens - order.num_tokens))
        x = order.sort(x)
        plan = order.plan()
        intermediate = []
        for i, layer in enumerate(self.transformer.layers):
            if i in self.config.intermediate_layers_indices:
                intermediate.append(order.real(x))
            x = self._run(layer, x, plan)
        x = self.ln_post(x) + order.sort(self._post_tile_embedding(ids, order))
        for layer in self.global_transformer.layers:
            x = self._run(layer, x, plan)
        # hidden-major: all intermediate values of a channel stand together
        stacked = torch.stack(intermediate, dim=-1).flatten(1)
        return torch.cat([order.real(x), stacked], dim=-1)

    def _run(self, layer: nn.Module, x: Tensor, plan: TowerPlan) -> Tensor:
        run = functools.partial(lean.tower_layer, layer) if self.is_lean else layer
        return recompute(run, x, plan) if recomputes(self.config) else run(x, plan)

    def _place(self, patches: Tensor, num_tiles: list[int], order: TokenOrder) -> Tensor:
        """(T, patches, hidden) -> (I, max tiles, patches, hidden) in the tower's image order.

        A missing tile's patches are zero: its pixels are, and the patch embedding has no bias.
        """
        per_image = patches.split(num_tiles)
        return torch.stack([F.pad(per_image[i], (0, 0, 0, 0, 0, order.max_tiles - num_tiles[i])) for i in order.images])

    def _embed(self, x: Tensor, ids: Tensor) -> Tensor:
        """Tile, class and position embeddings: (I, tiles, patches, hidden) -> (I, tiles, patches + 1, hidden)."""
        x = self.pre_tile_pos_embed(x, ids)
        images, tiles, _, width = x.shape
        class_token = self.class_embedding.to(x.dtype).expand(images, tiles, 1, width)
        x = torch.cat([class_token, x], dim=2)
        gate = self.gated_positional_embedding_gate.tanh()
        per_tile = self.gated_tile_positional_embedding(ids).view(images, tiles, -1, width)
        return x + self.positional_embedding * (1 - gate) + gate * per_tile

    def _post_tile_embedding(self, ids: Tensor, order: TokenOrder) -> Tensor:
        """(I, tiles, padded tokens, hidden): post_tile_pos_embed's addition alone, for every token."""
        shape = (len(ids), order.max_tiles, order.padded_tokens, self.config.hidden_size)
        nothing = self.class_embedding.new_zeros(())
        return self.post_tile_pos_embed(nothing, ids).expand(shape)


def _block(config, kit: LayerKit) -> TransformerBlock:
    submodules = TransformerBlockSubmodules(layer_specs=[vision_layer_spec(kit)] * config.num_layers)
    return TransformerBlock(config=config, spec=submodules, post_layer_norm=False)


class VisionModel(MegatronModule):
    """Normalisation, tower and projector, named as NeMo's CrossAttentionVisionModel."""

    config: VisionConfig

    def __init__(self, config, kit: LayerKit):
        super().__init__(config=config)
        self.vision_encoder = VisionEncoder(config, kit).to(config.params_dtype)
        projection_config = copy.deepcopy(config)
        projection_config.hidden_size = config.text_hidden_size
        self.vision_projection = MultimodalProjector(
            config=projection_config,
            submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear),
            projector_type="affine",
            input_size=config.hidden_size * (1 + len(config.intermediate_layers_indices)),
        )
        # as NeMo does: Megatron's projector drops the bias of a linear that returns it
        linear = self.vision_projection.encoder
        assert isinstance(linear, ColumnParallelLinear)
        linear.skip_bias_add = False
        self._statistics: tuple[Tensor, Tensor] | None = None

    def forward(self, tiles: Tensor, num_tiles: list[int], aspect_ratio_ids: Tensor, is_seen: bool = True) -> Tensor:
        """Projected tokens of the real tiles.

        tiles: (T, 3, H, W) uint8, not normalised, real tiles of the I images one after the other
        num_tiles: real tiles of each image; aspect_ratio_ids: (I,) on the host
        is_seen: as VisionEncoder's
        Returns (T * (patches + 1), 1, text hidden); where it is not seen (TOKEN_MULTIPLE, 1, text hidden).
        """
        tower_trains = any(parameter.requires_grad for parameter in self.vision_encoder.parameters())
        if not tower_trains and self.vision_encoder.training:
            self.vision_encoder.eval()  # a frozen tower gives the same features at every step, dropout or not
        with torch.set_grad_enabled(tower_trains and torch.is_grad_enabled()):
            features = self.vision_encoder(self.normalise(tiles), num_tiles, aspect_ratio_ids, is_seen)
        return self.vision_projection(features.unsqueeze(1))

    def normalise(self, tiles: Tensor) -> Tensor:
        """uint8 (T, 3, H, W) -> (x / 255 - mean) / std, in fp32 as HF's image processor, then in the tower's dtype."""
        if self._statistics is None or self._statistics[0].device != tiles.device:
            shape = (1, CHANNELS, 1, 1)
            mean, std = (
                torch.tensor(values, dtype=torch.float32, device=tiles.device).view(shape)
                for values in (self.config.image_mean, self.config.image_std)
            )
            # kept outside the buffers: a bf16 run would round those
            self._statistics = (mean, std)
        mean, std = self._statistics
        return ((tiles.float() / 255 - mean) / std).to(self.vision_encoder.class_embedding.dtype)

    def set_input_tensor(self, tensor) -> None:
        """The tower is always on the first pipeline stage: it has no input from another one."""
