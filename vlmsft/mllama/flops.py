"""FLOPs of training an MLlama, from plain numbers: pure arithmetic, so that a plan needs neither torch nor a GPU.

Matrix products and attention only, a multiplication and an addition each. Model FLOPs are what the mathematics asks
for: forward, gradients of what trains and of what lies between it and the loss, nothing twice, causal attention for the
half that isn't masked. The tower's padded tiles are part of the model (its weights were trained with them), padded text
is not. What a GPU computes beside (layers a second time, gradients that no one needs) is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from vlmsft.mllama.memory import Training
from vlmsft.mllama.sizes import TextShape, VisionShape, cross_layers


@dataclass(frozen=True)
class Counts:
    """What the FLOPs of a batch are proportional to.

    text: tokens, without padding; cross_text: those of micro batches with an image (the others skip cross-attention)
    text_pairs: (query, key) pairs of causal self-attention, length^2 / 2 for each sample
    answers: text tokens with a label: logits are computed for these only
    tiles: real ones; seen: their tokens
    computed: tokens in the tower, which computes with all tiles of an image and pads each
    tower_pairs, cross_pairs: (query, key) pairs of the tower's attention and of cross-attention
    """

    text: float = 0.0
    cross_text: float = 0.0
    text_pairs: float = 0.0
    answers: float = 0.0
    tiles: float = 0.0
    seen: float = 0.0
    computed: float = 0.0
    tower_pairs: float = 0.0
    cross_pairs: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, times: float) -> Counts:
        return Counts(*(value * times for value in self))

    def __iter__(self):
        return (getattr(self, one.name) for one in fields(self))


class Costs(Counts):
    """FLOPs for each unit of Counts; made once for a model, a multiplication each for a batch."""

    def of(self, counts: Counts) -> float:
        return sum(cost * number for cost, number in zip(self, counts, strict=True))


def count_batch(
    vision: VisionShape,
    *,
    text_tokens: Sequence[float],
    num_answers: float,
    num_tiles: Sequence[float],
    visible_rows: Sequence[float],
) -> Counts:
    """Counts of a micro batch; means of many will do.

    text_tokens: of each sample, without padding
    num_tiles, visible_rows: of each image: its real tiles, the text rows that see it
    """
    per_tile, whole = vision.tokens_per_tile, vision.max_num_tiles * vision.padded_tokens_per_tile
    real = [tiles * per_tile for tiles in num_tiles]
    num_text = sum(text_tokens)
    return Counts(
        text=num_text,
        cross_text=num_text if real else 0,
        text_pairs=sum(length**2 for length in text_tokens) / 2,
        answers=num_answers,
        tiles=sum(num_tiles),
        seen=sum(real),
        computed=len(real) * whole,
        # real tokens see all, padding sees the real ones
        tower_pairs=sum(tokens * whole + (whole - tokens) * tokens for tokens in real),
        cross_pairs=sum(rows * tokens for rows, tokens in zip(visible_rows, real, strict=True)),
    )


def step_costs(text: TextShape, vision: VisionShape, training: Training) -> Costs:
    """Model FLOPs of a forward and a backward pass, of all tensor-parallel ranks together."""
    walk = _Walk(training)
    image = walk.tower(vision)
    image = walk.linear(
        "seen",
        "module.vision_projection.encoder",
        vision.projector_input_size,
        vision.text_hidden_size,
        image,
        training.projector,
    )
    walk.text(text, image)
    return Costs(**walk.model)


@dataclass
class _Walk:
    """Goes through the model in the order of the forward pass, and knows which tensors need a gradient."""

    training: Training
    model: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lora = set(self.training.lora_modules)

    def _add(self, unit: str, flops: float) -> None:
        self.model[unit] = self.model.get(unit, 0.0) + flops

    def linear(self, unit: str, name: str, num_in: int, num_out: int, needs_gradient: bool, trains: bool) -> bool:
        """A matrix, with its adapter if it has one. Returns whether its output needs a gradient."""
        flops = 2 * num_in * num_out
        self._add(unit, flops * (1 + needs_gradient + trains))
        if name not in self.lora:
            return needs_gradient or trains
        first, second = 2 * num_in * self.training.lora_dim, 2 * self.training.lora_dim * num_out
        self._add(unit, first * (2 + needs_gradient) + second * 3)
        return True

    def attention(self, unit: str, width: int, needs_query: bool, needs_key: bool, needs_value: bool) -> bool:
        """Two products forward; backward one for the scores' gradient, and one for each of the three that needs it."""
        product = 2 * width
        needs_scores = needs_query or needs_key
        needs = needs_scores + needs_query + needs_key + needs_value
        self._add(unit, (2 + needs) * product)
        return bool(needs)

    def tower(self, vision: VisionShape) -> bool:
        """Patches to features."""
        h, f, trains = vision.hidden_size, vision.ffn_size, self.training.tower
        name = "module.vision_model.vision_encoder"
        patch = 3 * vision.patch_size**2
        needs = self.linear("tiles", f"{name}.conv1._linear", patch * (vision.tokens_per_tile - 1), h, False, trains)
        for stack, number in (("transformer", vision.num_layers), ("global_transformer", vision.num_global_layers)):
            for i in range(number):
                layer = f"{name}.{stack}.layers.{i}"
                qkv = self.linear("computed", f"{layer}.self_attention.linear_qkv", h, 3 * h, needs, trains)
                out = self.attention("tower_pairs", h, qkv, qkv, qkv)
                needs |= self.linear("computed", f"{layer}.self_attention.linear_proj", h, h, out, trains)
                inner = self.linear("computed", f"{layer}.mlp.linear_fc1", h, f, needs, trains)
                needs |= self.linear("computed", f"{layer}.mlp.linear_fc2", f, h, inner, trains)
        return needs

    def text(self, text: TextShape, image: bool) -> None:
        """Text and image tokens to logits; image: whether the image tokens need a gradient."""
        trains, needs = self.training.text, self.training.text  # embeddings train with the rest
        decoder = "module.language_model.decoder"
        with_cross = set(cross_layers(text))
        for i in range(text.num_layers):
            if i in with_cross:
                needs = self._cross_layer(text, f"{decoder}.xattn_layers.{i}", needs, image, trains)
            needs = self._self_layer(text, f"{decoder}.layers.{i}", needs, trains)
        name = "module.language_model.output_layer"
        self.linear("answers", name, text.hidden_size, text.vocab_size, needs, trains)

    def _self_layer(self, text: TextShape, name: str, needs: bool, trains: bool) -> bool:
        h, q, k = text.hidden_size, text.query_size, text.key_size
        qkv = self.linear("text", f"{name}.self_attention.linear_qkv", h, q + 2 * k, needs, trains)
        out = self.attention("text_pairs", q, qkv, qkv, qkv)
        needs |= self.linear("text", f"{name}.self_attention.linear_proj", q, h, out, trains)
        return self._mlp(text, "text", name, needs, trains)

    def _cross_layer(self, text: TextShape, name: str, needs: bool, image: bool, trains: bool) -> bool:
        h, q, k = text.hidden_size, text.query_size, text.key_size
        name_of = f"{name}.cross_attention"
        query = self.linear("cross_text", f"{name_of}.linear_q", h, q, needs, trains)
        keys = self.linear("seen", f"{name_of}.linear_kv", h, 2 * k, image, trains)
        out = self.attention("cross_pairs", q, query, keys, keys)
        needs |= self.linear("cross_text", f"{name_of}.linear_proj", q, h, out, trains)
        return self._mlp(text, "cross_text", name, needs, trains)

    def _mlp(self, text: TextShape, unit: str, name: str, needs: bool, trains: bool) -> bool:
        h, f = text.hidden_size, text.ffn_hidden_size
        inner = self.linear(unit, f"{name}.mlp.linear_fc1", h, 2 * f, needs, trains)
        return self.linear(unit, f"{name}.mlp.linear_fc2", f, h, inner, trains) or needs
