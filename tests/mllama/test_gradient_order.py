"""Where Megatron overlaps the ranks' communication with the layers, all micro batches go through these in one order.

Its DDP sends a bucket of gradients when the last of them is there, and fetches a bucket of weights when a hook of a
module first asks for it: ranks that do so in another order send each other the wrong buckets, or wait forever.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from mllama_cases import CASES, TARGETS, Sample, build, inputs_of, make_batch, with_lora

pytestmark = [pytest.mark.nemo, pytest.mark.usefixtures("megatron")]

TEXT_ONLY = (Sample(12), Sample(9))
RECOMPUTED = {"recompute_granularity": "full"}
MODELS = {
    "full": build,
    "recomputed": lambda: build(text=RECOMPUTED, vision=RECOMPUTED),
    "frozen tower": lambda: build(freeze_vision_model=True),
    "frozen tower and projector": lambda: build(freeze_vision_model=True, freeze_vision_projection=True),
    "frozen text": lambda: build(freeze_language_model=True),
    "lora": lambda: with_lora(
        ["*language_model*.linear_qkv", "*language_model*.linear_q", "*language_model*.linear_kv"]
    ),
    "lora, tower too": lambda: with_lora(TARGETS),
}


def overlapped(model):
    """As NeMo leaves it where strategy.ddp has overlap_grad_reduce."""
    model.module.config.no_sync_func = contextlib.nullcontext
    return model


def unseen():
    """Images, and no row that sees one."""
    batch = make_batch(CASES["mixed tile counts"])
    return {**batch, "visible_until": batch["visible_from"].clone()}


def batches():
    named = {name: make_batch(samples) for name, samples in CASES.items()}
    return {**named, "text only": make_batch(TEXT_ONLY), "no row sees an image": unseen()}


def order_of_gradients(model, batch) -> list[str]:
    """Names of the parameters as their gradients are done with."""
    order: list[str] = []
    handles = [
        p.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    model.zero_grad()
    model(**inputs_of(batch, labels=True)).sum().backward()
    for handle in handles:
        handle.remove()
    return order


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("lean_forward", [True, False], ids=["functions", "Megatron's classes"])
def test_gradients_come_in_one_order(kind, lean_forward):
    model = overlapped(MODELS[kind]())
    model.module.config.lean_forward = lean_forward
    orders = {name: order_of_gradients(model, batch) for name, batch in batches().items()}
    expected = orders.pop("one tile")
    assert sorted(expected) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    for name, order in orders.items():
        assert order == expected, name


@pytest.mark.parametrize("lean_forward", [True, False], ids=["functions", "Megatron's classes"])
@pytest.mark.parametrize("kind", ["full", "lora, tower too"])
def test_a_tile_that_no_row_sees_changes_nothing(kind, lean_forward):
    """Losses and gradients are those of skipped layers, zeros included, to the last bit."""
    results = []
    for prepare in (lambda model: model, overlapped):
        model = prepare(MODELS[kind]())
        model.module.config.lean_forward = lean_forward
        losses = model(**inputs_of(make_batch(TEXT_ONLY), labels=True))
        losses.sum().backward()
        results.append((losses, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    (skipped, expected), (computed, gradients) = results
    assert torch.equal(computed, skipped)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name
    assert not any(gradient.any() for name, gradient in gradients.items() if "vision_model" in name or "xattn" in name)


@pytest.mark.parametrize("trains", [True, False], ids=["training", "validation"])
def test_modules_are_called_in_one_order(trains):
    model = overlapped(build())
    order: list[str] = []
    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    orders = {}
    for name, batch in batches().items():
        with torch.set_grad_enabled(trains):
            model(**inputs_of(batch, labels=True))
        orders[name] = list(order)
        order.clear()
    expected = orders.pop("one tile")
    assert len(expected) > 50
    for name, found in orders.items():
        assert found == expected, name
