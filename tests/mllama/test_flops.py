"""FLOPs from plain numbers against torch's FlopCounterMode on the real tiny model."""

from __future__ import annotations

import dataclasses

import pytest

from vlmsft.mllama.flops import Counts, count_batch, step_costs
from vlmsft.mllama.memory import Training
from vlmsft.mllama.sizes import TextShape, VisionShape, lora_modules

TEXT_11B = TextShape(32, 8, 4096, 14336, 32, 8, 128256)
VISION_11B = VisionShape(32, 8, 1280, 560, 14, 5, 4096)
IN_TEXT = [f"*.language_model.*.{name}" for name in ("linear_qkv", "linear_q", "linear_kv")]
FULL = Training()
FROZEN_TOWER = Training(tower=False)
NOTHING = Training(text=False, tower=False, projector=False)


def with_lora(targets, shapes=(TEXT_11B, VISION_11B)):
    return dataclasses.replace(NOTHING, lora_modules=lora_modules(*shapes, targets), lora_dim=8)


def sample(tiles=2, length=256):
    return count_batch(
        VISION_11B, text_tokens=[length], num_answers=length // 2, num_tiles=[tiles], visible_rows=[length - 5]
    )


def test_counts_of_a_batch():
    counts = count_batch(VISION_11B, text_tokens=[10, 20], num_answers=7, num_tiles=[1, 4], visible_rows=[3, 20])
    real, whole = 1601, 4 * 1608
    assert counts == Counts(
        text=30,
        cross_text=30,
        text_pairs=250,
        answers=7,
        tiles=5,
        seen=5 * real,
        computed=2 * whole,
        tower_pairs=(real * whole + (whole - real) * real) + (4 * real * whole + (whole - 4 * real) * 4 * real),
        cross_pairs=3 * real + 20 * 4 * real,
    )
    text_only = count_batch(VISION_11B, text_tokens=[10], num_answers=2, num_tiles=[], visible_rows=[])
    assert text_only == Counts(text=10, text_pairs=50, answers=2), "cross-attention is skipped"
    assert counts + text_only == Counts(*(a + b for a, b in zip(counts, text_only, strict=True)))
    assert (text_only * 2).text == 20


def test_a_sample_of_the_11b_with_lora():
    """Worked out by hand for one image of 2 real tiles and 256 text tokens, half of them answers; TFLOP.

    tower, forward only: linears of 6432 tokens in 40 layers 10.1, attention 6432 x 3202 + 3230 x 3202 pairs 6.3;
    text, forward and input gradients: 7.9e9 parameters of the layers, 128 logits; cross-attention's keys and values.
    """
    flops = step_costs(TEXT_11B, VISION_11B, with_lora(IN_TEXT)).of(sample())
    tower = 40 * 6432 * 2 * (4 * 1280**2 + 2 * 1280 * 5120) + 40 * 4 * 1280 * (6432 * 3202 + 3230 * 3202)
    projector = 3202 * 2 * 7680 * 4096
    layer = 2 * 4096 * 4096 + 3 * 4096 * 14336
    text = 2 * 2 * 256 * (40 * layer + 32 * 2 * 4096 * 1024) + 2 * 2 * 128 * 4096 * 128256
    keys = 8 * 2 * 3202 * 4096 * 2048
    attention = 3 * 2 * (32 * 4096 * 256**2 + 8 * 2 * 4096 * 251 * 3202)
    assert flops == pytest.approx(tower + projector + text + keys + attention, rel=0.01)
    assert flops / 1e12 == pytest.approx(27, abs=1)


def test_what_is_frozen_costs_no_weight_gradients():
    frozen, tower_frozen, full, adapters = (
        step_costs(TEXT_11B, VISION_11B, training).of(sample())
        for training in (NOTHING, FROZEN_TOWER, FULL, with_lora(IN_TEXT))
    )
    assert frozen < adapters < tower_frozen < full
    forward = step_costs(TEXT_11B, VISION_11B, NOTHING).of(sample())
    assert full == pytest.approx(3 * forward, rel=0.01), "forward, input gradients, weight gradients"


def test_what_is_computed_twice_counts_once():
    again = dataclasses.replace(FULL, recompute_text=True, recompute_tower=True)
    assert step_costs(TEXT_11B, VISION_11B, again) == step_costs(TEXT_11B, VISION_11B, FULL)


def test_more_tiles_cost_attention_and_keys_but_no_tower_layers():
    costs = step_costs(TEXT_11B, VISION_11B, with_lora(IN_TEXT))
    one, four = sample(tiles=1), sample(tiles=4)
    assert one.computed == four.computed and four.seen == 4 * one.seen
    assert costs.computed > 0 and costs.seen > 0


@pytest.mark.nemo
@pytest.mark.parametrize(
    ("targets", "frozen"),
    [
        (None, ()),
        (None, ("vision_model",)),
        (None, ("language_model",)),
        (None, ("vision_model", "vision_projection")),
        (["*.language_model.*.linear_qkv", "*.language_model.*.linear_q", "*.language_model.*.linear_kv"], None),
        (["linear_qkv", "linear_q", "linear_kv"], None),
        (["*.xattn_layers.*.linear_q"], None),
        (["*.language_model.*.linear_proj", "*.language_model.*.linear_fc1", "*.language_model.*.linear_fc2"], None),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", ["mixed tile counts", "several images"])
def test_as_torchs_counter_counts(megatron, targets, frozen, case):
    """Forward and backward. The counter sees padding and the masked half of causal attention as well."""
    from mllama_cases import CASES, build, inputs_of, make_batch
    from nemo.collections.vlm.peft import LoRA
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from vlmsft.mllama.step import answer_rows

    model = build(**{f"freeze_{part}": True for part in frozen or ()})
    if targets is not None:
        model.module.requires_grad_(False)
        model.walk(LoRA(target_modules=targets, dim=4, alpha=8).transform)
    config = model.module.config
    text, vision = TextShape.of(config.language_model_config), VisionShape.of(config.vision_model_config)
    training = Training(
        text=targets is None and "language_model" not in frozen,
        tower=targets is None and "vision_model" not in frozen,
        projector=targets is None and "vision_projection" not in frozen,
        lora_modules=lora_modules(text, vision, targets or []),
        lora_dim=4,
    )
    batch = make_batch(CASES[case])
    rows = answer_rows(batch["labels"])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the others are not counted on a CPU
        model.module(**inputs_of(batch, labels=True), answer_rows=rows).sum().backward()
    num_samples, length = batch["tokens"].shape
    counts = count_batch(
        vision,
        text_tokens=[length] * num_samples,
        num_answers=len(rows),
        num_tiles=batch["num_tiles"].tolist(),
        visible_rows=(batch["visible_until"] - batch["visible_from"]).tolist(),
    )
    counts = dataclasses.replace(counts, text_pairs=2 * counts.text_pairs)
    # Megatron's linears compute their input's gradient whenever they train; the first that trains needs none
    first = 0.0
    if training.tower:
        first = 2 * 3 * vision.patch_size**2 * (vision.tokens_per_tile - 1) * vision.hidden_size * counts.tiles
    elif training.projector:
        first = 2 * vision.projector_input_size * vision.text_hidden_size * counts.seen
    expected = step_costs(text, vision, training).of(counts) + first
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)
