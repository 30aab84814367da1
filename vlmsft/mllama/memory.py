"""Memory of one GPU that trains an MLlama: pure arithmetic, so that a plan needs neither torch nor a GPU.

One term per tensor that is there at the highest point of a step, in the manner of Korthikanti et al. 2022 ("Reducing
Activation Recomputation in Large Transformer Models", section 4). Which tensors these are was read from the code that
keeps them: vlmsft/mllama, TransformerEngine 2.9, Megatron-Core 0.15.3, NeMo's LoRA, torch's flash attention; and for
vlmsft/mllama/lean.py from what its compiled functions save (torch.autograd.graph.saved_tensors_hooks). No term is
fitted; benchmarks/memory_model.py compares them with a GPU.

"lean" below: layers as lean.py's functions. Between a layer's attention and its matrix products torch.compile computes
everything again in the backward pass, so that norms cost their input and the MLP its first product; TransformerEngine
keeps the output of a norm whose matrix trains or has an adapter, and Megatron queries and keys before their rotation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from vlmsft.mllama.sizes import (
    GIB,
    Count,
    TextShape,
    VisionShape,
    lora_matrices,
    parameter_counts,
    text_matrices,
    tower_matrices,
)

WORKSPACE_BYTES = 0.1 * GIB
"""cuBLAS' and TransformerEngine's workspaces, 32 MiB each on Hopper, which torch's allocator holds."""
CONTEXT_BYTES = 7.8 * GIB
"""In use beside torch's allocator: the CUDA context, the kernels' code, NCCL, what others hold of the GPU. Measured,
the same at 19 shapes (benchmarks/memory_model.py on an H100); of what it consists was not."""
FRAGMENTATION = 0.03
"""What torch's allocator holds beyond its peak, as a share of it: the median of the same 19 shapes, from 1 to 11 %."""
MASK = 0.5  # a dropout mask has a byte an element: half an element of 16 bits


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one GPU.

    weights, gradients, optimizer: there throughout
    activations: all else that torch's allocator holds at the highest point of a step
    build: the highest point until the first step, before activations and the optimizer's moments exist
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    build: float

    @property
    def training(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def peak(self) -> float:
        """As torch.cuda.max_memory_allocated() tells it."""
        return max(self.training, self.build)

    @property
    def overhead(self) -> float:
        """What is in use beside what torch counts as allocated: context, NCCL, the allocator's loss."""
        return CONTEXT_BYTES + FRAGMENTATION * self.peak

    @property
    def device(self) -> float:
        """What the GPU must have."""
        return self.peak + self.overhead


@dataclass(frozen=True)
class Batch:
    """A micro batch.

    text: text tokens, padding too
    answers: those of them that have a label: logits are computed for these only
    computed: tokens in the tower, which computes with all tiles of an image and pads each
    seen: tokens of the real tiles, which cross-attention sees
    """

    text: float
    answers: float
    computed: float
    seen: float


@dataclass(frozen=True)
class Layout:
    """How a rank holds its activations.

    tp: tensor-parallel size, which divides what lies between column- and row-parallel matrices
    whole: divisor of what lies outside them: 1, or tp with sequence parallelism
    element_bytes: of an activation
    lean: layers as functions; TransformerEngine's otherwise
    """

    tp: int
    whole: int
    element_bytes: int
    lean: bool


@dataclass(frozen=True)
class Training:
    """What trains, and what is computed twice.

    text, tower, projector: their own weights train
    lora_modules: the matrices with LoRA factors, by their names in sizes.lora_matrices; lora_dim: the factors' rank
    lora_dropout: it is more than 0
    recompute_text, recompute_tower: recompute_granularity=full
    """

    text: bool = True
    tower: bool = True
    projector: bool = True
    lora_modules: Sequence[str] = ()
    lora_dim: int = 0
    lora_dropout: bool = True
    recompute_text: bool = False
    recompute_tower: bool = False

    @property
    def through_tower(self) -> bool:
        """Whether the backward pass goes through the tower."""
        return self.tower or any(".vision_encoder." in name for name in self.lora_modules)

    @property
    def through_projector(self) -> bool:
        in_projector = any(".vision_projection." in name for name in self.lora_modules)
        return self.through_tower or self.projector or in_projector


def memory_estimate(
    text: TextShape,
    vision: VisionShape,
    training: Training,
    *,
    micro_batch_size: int,
    text_tokens: int,
    answer_tokens: int | None = None,
    images_per_sample: float = 1.0,
    tiles_per_image: float | None = None,
    tensor_model_parallel_size: int = 1,
    sequence_parallel: bool = False,
    data_parallel_size: int = 1,
    distributed_optimizer: bool = True,
    bf16: bool = True,
    lean_forward: bool = True,
    frozen_fp8: str | None = None,
) -> MemoryEstimate:
    """Estimate of one GPU's memory for full fine-tuning or LoRA, PP = CP = 1.

    text_tokens: padded text length of a micro batch's samples; answer_tokens: with a label (None = all)
    tiles_per_image: real tiles (None = max_num_tiles); the tower always computes with max_num_tiles of them
    lean_forward: layers as functions; TransformerEngine's otherwise
    frozen_fp8: model.config.frozen_fp8
    Formulas: `training_bytes`, `building_bytes` and `activation_bytes`.
    """
    tp = tensor_model_parallel_size
    counts, matrices = parameter_counts(text, vision), lora_matrices(text, vision)
    trains = {"text": training.text, "tower": training.tower, "projector": training.projector}
    lora = Count(training.lora_dim * sum(matrices[name] for name in training.lora_modules))
    held = sum(count.per_rank(tp) for count in counts.values()) + lora.per_rank(tp)
    trained = sum(count.per_rank(tp) for part, count in counts.items() if trains[part]) + lora.per_rank(tp)
    shards = data_parallel_size if distributed_optimizer else 1
    weights, gradients, optimizer = training_bytes(held, trained, bf16=bf16, optimizer_shards=shards)
    weights += fp8_bytes(text, vision, training, frozen_fp8)

    tiles = vision.max_num_tiles if tiles_per_image is None else tiles_per_image
    images = micro_batch_size * images_per_sample
    batch = Batch(
        text=micro_batch_size * text_tokens,
        answers=micro_batch_size * (text_tokens if answer_tokens is None else answer_tokens),
        computed=images * vision.max_num_tiles * vision.padded_tokens_per_tile,
        seen=images * tiles * vision.tokens_per_tile,
    )
    layout = Layout(
        tp=tp,
        whole=tp if sequence_parallel else 1,
        element_bytes=2 if bf16 else 4,
        lean=lean_forward,
    )
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=WORKSPACE_BYTES + activation_bytes(text, vision, batch, training, layout),
        build=building_bytes(text, training, held, trained, bf16=bf16, optimizer_shards=shards, tp=tp),
    )


def training_bytes(held: int, trained: int, *, bf16: bool, optimizer_shards: int) -> tuple[float, float, float]:
    """(weights, gradients, optimizer) of a rank that holds `held` parameters and trains `trained` of them.

    Per trained parameter, with d shards (Megatron-LM, docs/source/api-guide/dist_optimizer.md):
      bf16: weights 2 + fp32 main gradients 4 + (fp32 master weights, exp_avg, exp_avg_sq) 12 / d bytes
      fp32: weights 4 + gradients 4 + (exp_avg, exp_avg_sq) 8 / d bytes
    A frozen parameter costs its weight only. Gradients are in fp32, as NeMo's precision plugins set
    grad_reduce_in_fp32; of bf16 ones the optimizer's step would make an fp32 copy.
    """
    return (2 if bf16 else 4) * held, 4 * trained, (12 if bf16 else 8) * trained / optimizer_shards


def fp8_bytes(text: TextShape, vision: VisionShape, training: Training, which: str | None) -> int:
    """Of the frozen matrices' copies (fp8.FrozenMatrices), which the first forward pass makes; which: frozen_fp8.

    Their scales, less than a hundredth of that, are left out; the transposed copy that a backward product makes of one
    matrix (11B: 0.11 GiB); and what the tower's passes save: the text decoder's are the peak.
    """
    of_tower = tower_matrices(vision) if which is not None and not training.through_tower else 0
    return of_tower + (text_matrices(text) if which == "all" and not training.text else 0)


def building_bytes(
    text: TextShape, training: Training, held: int, trained: int, *, bf16: bool, optimizer_shards: int, tp: int
) -> float:
    """The higher of: Megatron's DDP makes its buffers; its optimizer makes fp32 master weights."""
    element = 2 if bf16 else 4
    # DDP moves what trains into a buffer beside the gradients': for a moment it is there twice
    moving = element * (held + trained) + 4 * trained
    if not bf16:  # no master weights
        return moving
    # each is a bf16 copy before it is converted: of the largest matrix, where it trains
    copied = element * text.vocab_size * text.hidden_size / tp * training.text
    return max(moving, element * held + 4 * trained + (4 * trained + copied) / optimizer_shards)


def activation_bytes(text: TextShape, vision: VisionShape, batch: Batch, training: Training, layout: Layout) -> float:
    """The highest of: the tower at work; the loss, forwards and backwards; the backward pass of a text layer."""
    tower_kept, tower_working = _tower_bytes(vision, batch, training, layout)
    text_kept, text_working = _text_bytes(text, batch, training, layout)
    forwards, backwards = _loss_bytes(text, batch, training, layout)
    # the projected image tokens are there until the model's forward returns, and longer where something keeps them
    image_tokens = batch.seen * text.hidden_size * layout.element_bytes
    if _keeps_image_tokens(training, layout.lean):
        text_kept, image_tokens = text_kept + image_tokens, 0
    after_forward = tower_kept + text_kept + max(image_tokens + forwards, backwards, text_working)
    return max(after_forward, tower_kept + tower_working)


def _keeps_image_tokens(training: Training, lean: bool) -> bool:
    """Whether the backward pass needs them: as linear_kv's input, or to compute a layer again.

    TransformerEngine's linear keeps its input, frozen or not. An adapter keeps a dropped-out copy (`_LoraInputs`).
    """
    adapted = any(name.endswith(".linear_kv") for name in training.lora_modules) and not training.lora_dropout
    return not lean or training.text or training.recompute_text or adapted


def _text_bytes(text: TextShape, batch: Batch, training: Training, layout: Layout) -> tuple[float, float]:
    """(kept for the backward pass, passing while a layer is computed backwards)."""
    tp, whole, element_bytes = layout.tp, layout.whole, layout.element_bytes
    h, f, k = text.hidden_size, text.ffn_hidden_size, text.key_size
    lora = _LoraInputs.of(training, text, layout.lean)
    self_layer, cross_layer = _self_layer(text, training, layout), _cross_layer(text, training, layout)
    # of each vision token: keys and values as the product gives them, keys behind their norm; values on their own
    # (lean), or keys before their norm (Megatron)
    keys = 4 * k / tp
    layers = batch.text * (text.num_layers * self_layer + text.num_cross_attention_layers * cross_layer)
    layers += batch.text * (lora.text_whole / whole + lora.text_split / tp)
    layers += batch.seen * (text.num_cross_attention_layers * keys + lora.image)
    final_norm = batch.text * h / whole
    # gradients of the MLP's two inner widths, of the layer's output and of what a norm gives and takes
    passing = batch.text * (3 * f / tp + 3 * h / whole)
    if training.through_projector:  # the sum of the image tokens' gradients, and the one to be added
        passing += batch.seen * 2 * h
    if not training.recompute_text:
        return (layers + final_norm) * element_bytes, passing * element_bytes
    # only the input of each self-attention layer, with the cross-attention layer before it; one of them at work
    inputs = batch.text * text.num_layers * h / whole
    per_layer = lora.per_layer(text)
    at_work = batch.text * (self_layer + cross_layer + per_layer.text_whole / whole + per_layer.text_split / tp)
    at_work += batch.seen * (keys + per_layer.image)
    return (inputs + final_norm) * element_bytes, (at_work + passing) * element_bytes


def _self_layer(text: TextShape, training: Training, layout: Layout) -> float:
    """Elements per text token that a self-attention layer keeps, LoRA's own aside."""
    h, f, q, k = text.hidden_size, text.ffn_hidden_size, text.query_size, text.key_size
    norms = 2 * h + 2 * h * training.text  # two norms' inputs; their outputs are inputs of linear_qkv and linear_fc1
    # queries and keys rotated, values, output, its log-sums
    attention = (q + 2 * k) + q + 2 * text.num_attention_heads
    if not layout.lean:  # the values are a view of queries, keys and values as one, which stay with them
        attention += q + k
    mlp = 2 * f  # gate and up
    weights = (q + f) * training.text  # inputs of linear_proj and linear_fc2
    return norms / layout.whole + (attention + mlp + weights) / layout.tp


def _cross_layer(text: TextShape, training: Training, layout: Layout) -> float:
    """Elements per text token that a cross-attention layer keeps, LoRA's own aside."""
    h, f, q = text.hidden_size, text.ffn_hidden_size, text.query_size
    norms = 2 * h + 2 * h * training.text
    attention = 3 * q + 2 * text.num_attention_heads  # queries before and after their norm, output, its log-sums
    mlp = 2 * f
    weights = (q + f) * training.text
    gated = 2 * h * training.text  # what the two gates multiply
    return (norms + gated) / layout.whole + (attention + mlp + weights) / layout.tp


def _loss_bytes(text: TextShape, batch: Batch, training: Training, layout: Layout) -> tuple[float, float]:
    """(at the end of the forward pass, at the start of the backward pass), of answers only.

    Forwards: logits in compute precision, and in fp32, where the softmax is computed in place. Backwards, Megatron's
    compiled calculate_gradients: the softmax, its difference from the labels (a copy, as torch.compile makes it), and
    the gradient in compute precision. Then the output matrix' own gradient beside the latter, if it trains.
    """
    element_bytes = layout.element_bytes
    logits = batch.answers * text.vocab_size / layout.tp
    forwards = logits * (element_bytes + 4) + batch.answers * text.hidden_size * element_bytes
    matrix = text.vocab_size * text.hidden_size / layout.tp * training.text
    return forwards, max(logits * (4 + 4 + element_bytes), (logits + matrix) * element_bytes)


def _tower_bytes(vision: VisionShape, batch: Batch, training: Training, layout: Layout) -> tuple[float, float]:
    """(kept for the backward pass, passing while the tower computes)."""
    tp, element_bytes = layout.tp, layout.element_bytes
    h, f = vision.hidden_size, vision.ffn_size
    lora = _LoraInputs.of(training, vision, lean=False)
    num_layers = vision.num_layers + vision.num_global_layers
    # forward: the residual, a norm's output, the MLP's inner width before and after GELU; intermediate features
    passing = batch.computed * (2 * h + 2 * f / tp) + batch.seen * vision.num_intermediate_layers * h
    features = batch.seen * vision.projector_input_size * training.projector
    if not training.through_tower:
        return features * element_bytes, passing * element_bytes
    layer = _tower_layer(vision, training, tp)
    layers = batch.computed * (num_layers * layer + lora.tower_whole + lora.tower_split / tp)
    if not training.recompute_tower:
        return (features + layers) * element_bytes, passing * element_bytes
    inputs = batch.computed * num_layers * h
    per_layer = lora.per_layer(vision)
    at_work = batch.computed * (layer + per_layer.tower_whole + per_layer.tower_split / tp)
    return (features + inputs) * element_bytes, (passing + at_work) * element_bytes


def _tower_layer(vision: VisionShape, training: Training, tp: int) -> float:
    """Elements per tower token that a layer keeps, LoRA's own aside."""
    h, f = vision.hidden_size, vision.ffn_size
    norms = 2 * h  # inputs; the outputs are inputs of the matrices
    attention = 4 * h  # queries, keys and values as one; output
    mlp = f  # before GELU
    whole, split = 2 * h, h + f  # inputs of linear_qkv and linear_fc1; of linear_proj and linear_fc2
    return norms + (attention + mlp) / tp + training.tower * (whole + split / tp)


@dataclass(frozen=True)
class _LoraInputs:
    """Elements that LoRA's first factors keep of a token in all layers; those that follow a split matrix are split."""

    text_whole: float = 0
    text_split: float = 0
    image: float = 0
    tower_whole: float = 0
    tower_split: float = 0

    @classmethod
    def of(cls, training: Training, shape: TextShape | VisionShape, lean: bool) -> _LoraInputs:
        """Of the matrices that lie in the text decoder or in the tower, as the shape says."""
        in_text = isinstance(shape, TextShape)
        trains = training.text if in_text else training.tower  # then the matrix keeps its input itself
        h, f = shape.hidden_size, shape.ffn_hidden_size if in_text else shape.ffn_size
        q = shape.query_size if in_text else h
        # the dropped-out input and the mask. Without dropout: the input itself, if nothing else keeps it
        dropped = (1 + MASK) * training.lora_dropout
        # TransformerEngine keeps the norm's output that it hands to an adapter, dropped out or not
        norm_output = in_text and not lean and not trains
        sums: dict[str, float] = {one.name: 0.0 for one in fields(cls)}
        for module in training.lora_modules:
            name = module.rpartition(".")[2]
            if ".decoder." not in module and ".vision_encoder." not in module:
                continue  # output layer and projector: answers and image tokens only
            if (".decoder." in module) != in_text:
                continue
            side = "text" if in_text else "tower"
            if name == "linear_kv":  # no mask where the image tokens need no gradient
                sums["image"] += h * (1 + MASK * training.through_projector) * training.lora_dropout
            elif name in ("linear_proj", "linear_fc2"):
                width = q if name == "linear_proj" else f
                sums[f"{side}_split"] += width * (dropped or not trains)
            elif name in ("linear_qkv", "linear_q", "linear_fc1"):
                sums[f"{side}_whole"] += h * ((dropped + norm_output) or not trains)
        return cls(**sums)

    def per_layer(self, shape: TextShape | VisionShape) -> _LoraInputs:
        """The mean of a layer, with the cross-attention layer that may stand before it."""
        num_layers = shape.num_layers + (0 if isinstance(shape, TextShape) else shape.num_global_layers)
        num_cross = shape.num_cross_attention_layers if isinstance(shape, TextShape) else 0
        return _LoraInputs(
            text_whole=self.text_whole / num_layers,
            text_split=self.text_split / num_layers,
            image=self.image / num_cross if num_cross else 0,
            tower_whole=self.tower_whole / num_layers,
            tower_split=self.tower_split / num_layers,
        )
