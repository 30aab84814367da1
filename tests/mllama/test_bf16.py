"""bf16 costs vlmsft's MLlama what it costs NeMo's stock one: losses and gradients of each against fp32.

bf16 rounds each forward its own way, so the two are compared through fp32 on the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import pytest
import torch
from bf16_cases import apart, assert_equally_far, outcome, precision
from mllama_cases import CASES, TEXT, VISION, build, inputs_of, make_batch, nemo_inputs, swap_images

pytestmark = pytest.mark.nemo

TARGETS = ["linear_qkv", "linear_q", "linear_kv"]  # of NeMo's recipe


@dataclass(frozen=True)
class Models:
    exact: torch.nn.Module
    ours: torch.nn.Module
    stock: torch.nn.Module


@pytest.fixture(scope="module", params=["all weights", "LoRA"])
def models(megatron, request) -> Iterator[Models]:
    """Ours in fp32; ours and NeMo's stock model in bf16; all with the same weights, which bf16 can hold."""
    from mllama_stock import build_stock

    from vlmsft.mllama.layers import find_norm_linears, layer_kit, tell_wrapped_norms

    layer_kit("torch")  # lets NeMo's LoRA work without TransformerEngine
    low = precision(torch.bfloat16)
    exact, ours = build().module, build(**low).module
    with pytest.MonkeyPatch.context() as monkeypatch:
        stock = build_stock({**TEXT, **low}, {**VISION, **low}, monkeypatch)
        norms = find_norm_linears(stock)  # LoRA takes their output; TransformerEngine's hand it out by themselves
        stock.register_forward_pre_hook(lambda *_: tell_wrapped_norms(norms))
        for model in (exact, ours, stock):
            if request.param == "LoRA":
                add_lora(model)
        draw_adapters(exact)
        for model in (exact, ours, stock):
            copy_weights(exact, model)
        yield Models(exact, ours.bfloat16(), stock.bfloat16())  # as Megatron's Float16Module does


def add_lora(model: torch.nn.Module) -> None:
    from nemo.collections.llm.fn.base import walk
    from nemo.collections.vlm.peft import LoRA

    model.requires_grad_(False)
    walk(model, LoRA(target_modules=TARGETS, dim=4, alpha=8).transform)


@torch.no_grad()
def draw_adapters(model: torch.nn.Module) -> None:
    """Small second matrices: larger than the layer's own queries and keys, theirs would make attention choose one row,
    and bf16 would choose another."""
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if ".adapter." in name:
            scale = 0.1 if "linear_out" in name else 1.0
            p.copy_(torch.randn(p.shape, generator=generator) * scale / p.shape[1] ** 0.5)


@torch.no_grad()
def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Rounded to bf16. By parameter: NeMo's LoRA names them otherwise in state_dict."""
    values, targets = dict(source.named_parameters()), dict(target.named_parameters())
    assert values.keys() == targets.keys()
    for name, p in targets.items():
        p.copy_(values[name].to(torch.bfloat16))


@pytest.mark.parametrize("name", ["four tiles", "mixed tile counts", "several images", "images in a row"])
def test_stock_and_ours_are_equally_far_from_fp32(models, name, record_property):
    batch = make_batch(CASES[name])
    labels, pixels = batch["labels"], models.ours.vision_model.normalise(batch["tiles"])
    exact = outcome(models.exact, inputs_of(batch), labels)
    ours = apart(outcome(models.ours, inputs_of(batch), labels), exact)
    stock = apart(outcome(models.stock, nemo_inputs(batch, pixels), labels), exact)
    others = apart(outcome(models.exact, inputs_of(swap_images(batch)), labels), exact)
    figures = {"ours": asdict(ours), "stock": asdict(stock), "others": asdict(others)}
    record_property("from fp32", figures)
    print({"case": name, **figures})
    assert models.ours.language_model.decoder.is_lean  # what trains by default
    assert pixels.dtype == torch.bfloat16
    assert_equally_far(stock, ours, others)
