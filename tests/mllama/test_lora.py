"""NeMo's LoRA on the portable layers: an adapter gives what merged weights give, text-only batches touch it."""

from __future__ import annotations

import pytest
import torch
from mllama_cases import CASES, TARGETS, Sample, build, inputs_of, make_batch, with_lora

pytestmark = [pytest.mark.nemo, pytest.mark.usefixtures("megatron")]


def merged(model):
    """A model without adapters whose weights hold them."""
    from nemo.collections.llm.peft.lora import LoRALinear

    plain = build()
    weights = plain.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            adapter = module.adapter
            scale = adapter.alpha / adapter.dim
            weights[f"{name}.weight"] += scale * adapter.linear_out.weight @ adapter.linear_in.weight
    plain.load_state_dict(weights)
    return plain


@pytest.mark.parametrize("target", TARGETS)
@torch.no_grad()
def test_adapter_equals_merged_weights(target):
    model = with_lora([target])
    batch = inputs_of(make_batch(CASES["mixed tile counts"]))
    logits, expected = model(**batch), merged(model)(**batch)
    assert float((expected - build()(**batch)).abs().max()) > 0.1  # the adapters do something
    assert float((logits - expected).abs().max()) < 1e-4


def test_wildcards_confine_adapters_to_the_text_decoder():
    model = with_lora(["*.language_model.*.linear_qkv"])
    adapters = [name for name, _ in model.named_parameters() if ".adapter." in name]
    assert len(adapters) == 2 * 4
    assert all("language_model" in name for name in adapters)


def test_only_adapters_get_gradients_and_text_only_batches_touch_them_all():
    model = with_lora(TARGETS)
    for samples in (CASES["several images"], (Sample(12), Sample(9))):
        model.zero_grad()
        model(**inputs_of(make_batch(samples), labels=True)).sum().backward()
        for name, p in model.named_parameters():
            assert (p.grad is not None) == (".adapter." in name), name


def test_gradients_flow_through_the_norm_once_only():
    """The adapter's gradient on a fused norm and linear equals that of merged weights, taken by the chain rule."""
    model = with_lora(["linear_fc1"])
    plain = merged(model)
    batch = inputs_of(make_batch(CASES["two tiles"]), labels=True)
    model(**batch).sum().backward()
    plain(**batch).sum().backward()
    name = "module.language_model.decoder.layers.1.mlp.linear_fc1"
    wrapped, weight = model.get_submodule(name), plain.get_submodule(name).weight
    expected = 2.0 * weight.grad @ wrapped.adapter.linear_in.weight.T
    assert torch.allclose(wrapped.adapter.linear_out.weight.grad, expected, rtol=1e-3, atol=1e-4)


def test_taking_the_adapters_off_restores_the_plain_output():
    model = with_lora(["linear_fc1"])
    batch = inputs_of(make_batch(CASES["one tile"]))
    model(**batch)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "to_wrap"):
                setattr(parent, name, child.to_wrap)
    assert torch.equal(model(**batch), build()(**batch))
