"""On a GPU: TransformerEngine's layers, bf16, and NeMo's stock classes as they are.

Run with `pytest -m gpu tests/mllama/test_gpu.py -s` where torch, TransformerEngine 2.9 and NeMo 2.7.3 are installed.
The model has about 800M parameters: NeMo's tower is 1280 wide and at least 31 layers deep whatever the config says.
"""

from __future__ import annotations

import os

import pytest
import torch
from bf16_cases import apart, assert_equally_far, outcome, precision
from mllama_cases import CASES, TILE, inputs_of, make_batch, nemo_inputs, randomise, swap_images

pytestmark = pytest.mark.gpu

TEXT = {
    "num_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 512,
    "num_cross_attention_layers": 2,
    "vocab_size": 320,
    "seq_length": 128,
}
VISION = {"num_layers": 32, "num_global_layers": 8, "vision_chunk_size": TILE, "text_hidden_size": 256}
HOST = {"image_sample", "num_tiles", "aspect_ratio_ids", "visible_from", "visible_until"}


@pytest.fixture(scope="module", autouse=True)
def nccl():
    """Megatron's groups for one GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    from megatron.core import parallel_state, tensor_parallel

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29533")
    torch.distributed.init_process_group("nccl", rank=0, world_size=1, device_id=torch.device("cuda", 0))
    parallel_state.initialize_model_parallel(1)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def build_ours(dtype, layers):
    from vlmsft.mllama.config import MLlamaConfig, TextConfig, VisionConfig

    config = MLlamaConfig(
        layers=layers,
        language_model_config=TextConfig(**TEXT),
        vision_model_config=VisionConfig(**VISION),
        **precision(dtype),
    )
    return config.configure_model().cuda()


def build_stock():
    from nemo.collections.vlm.mllama.model import base

    class Tokenizer:
        vocab_size = TEXT["vocab_size"]

    common = precision(torch.bfloat16)
    config = base.MLlamaModelConfig(
        language_model_config=base.CrossAttentionTextConfig(**TEXT, **common),
        vision_model_config=base.CrossAttentionVisionConfig(**VISION, **common),
        **common,
    )
    return config.configure_model(Tokenizer()).cuda()


def copy_weights(source, target):
    state = {key: value for key, value in source.state_dict().items() if not key.endswith("_extra_state")}
    outcome = target.load_state_dict(state, strict=False)
    assert outcome.unexpected_keys == []
    assert [key for key in outcome.missing_keys if not key.endswith("_extra_state")] == []
    return target


@pytest.fixture(scope="module")
def reference(nccl):
    """Ours in fp32 on TransformerEngine's layers, random weights, open gates."""
    model = build_ours(torch.float32, "transformer_engine")
    randomise(model)
    return model


@pytest.fixture(scope="module")
def ours(reference):
    return copy_weights(reference, build_ours(torch.bfloat16, "transformer_engine"))


@pytest.fixture(scope="module")
def stock(reference):
    return copy_weights(reference, build_stock())


def on_gpu(batch):
    return {name: value if name in HOST else value.cuda() for name, value in batch.items()}


@torch.no_grad()
def logits_of(model, batch):
    return model(**inputs_of(on_gpu(batch))).float()


def stock_inputs(ours, batch):
    arguments = nemo_inputs(batch, ours.vision_model.normalise(batch["tiles"].cuda()).cpu())
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


@torch.no_grad()
def stock_logits(stock, ours, batch):
    return stock(**stock_inputs(ours, batch)).float()


@pytest.mark.parametrize("name", CASES)
def test_stock_and_ours_are_equally_far_from_fp32(reference, ours, stock, name):
    """bf16 rounds each model's own way, so the two are compared through ours in fp32."""
    batch = make_batch(CASES[name])
    exact = logits_of(reference, batch)
    noise = (logits_of(ours, batch) - exact).square().mean().sqrt()
    of_stock = (stock_logits(stock, ours, batch) - exact).square().mean().sqrt()
    other = (logits_of(reference, swap_images(batch)) - exact).square().mean().sqrt()
    print({"case": name, "ours": float(noise), "stock": float(of_stock), "other images": float(other)})
    assert other > 3 * noise
    assert of_stock < 2 * noise
    assert noise < 2 * of_stock


@pytest.mark.parametrize("name", ["mixed tile counts", "images in a row"])
def test_losses_and_gradients_of_stock_and_ours_are_equally_far_from_fp32(reference, ours, stock, name):
    """Gradients of all weights. As test_bf16.py on a CPU, whose stock model has none of TransformerEngine's layers."""
    batch = make_batch(CASES[name])
    labels, inputs = batch["labels"].cuda(), inputs_of(on_gpu(batch))
    exact = outcome(reference, inputs, labels)
    of_ours = apart(outcome(ours, inputs, labels), exact)
    of_stock = apart(outcome(stock, stock_inputs(ours, batch), labels), exact)
    others = apart(outcome(reference, inputs_of(on_gpu(swap_images(batch))), labels), exact)
    print({"case": name, "ours": of_ours, "stock": of_stock, "other images": others})
    assert ours.language_model.decoder.is_lean
    assert_equally_far(of_stock, of_ours, others)


@pytest.fixture(scope="module")
def portable(reference):
    return copy_weights(reference, build_ours(torch.float32, "torch"))


@pytest.mark.parametrize("name", ["mixed tile counts", "images in a row", "text-only beside images"])
def test_torch_layers_equal_transformer_engines(reference, portable, name):
    """fp32; TransformerEngine multiplies in TF32, hence the tolerance."""
    batch = make_batch(CASES[name])
    expected = logits_of(reference, batch)
    difference = (logits_of(portable, batch) - expected).square().mean().sqrt() / expected.std()
    print({"case": name, "relative difference": float(difference)})
    assert difference < 2e-2


def test_checkpoint_keys_are_the_stock_ones(ours, stock):
    def shapes(model):
        return {key: tuple(getattr(value, "global_shape", ())) for key, value in model.sharded_state_dict().items()}

    assert shapes(ours) == shapes(stock)
    assert shapes(build_ours(torch.bfloat16, "torch")) == shapes(stock)


def test_auto_takes_transformer_engine():
    from vlmsft.mllama.layers import resolve_layers

    assert resolve_layers("auto") == "transformer_engine"


@pytest.mark.parametrize("trained", ["all", "behind a frozen tower"])
def test_a_step_never_waits_for_the_gpu(ours, trained):
    batch = inputs_of(on_gpu(make_batch(CASES["images in a row"])), labels=True)
    ours.vision_model.vision_encoder.requires_grad_(trained == "all")
    for _ in range(3):  # kernels are compiled and constants copied at first
        ours(**batch).mean().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(**batch).mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        ours.zero_grad()
        ours.vision_model.vision_encoder.requires_grad_(True)


def test_lora_equals_merged_weights(reference):
    """NeMo's LoRA on TransformerEngine's fused norm and linear, in fp32."""
    from nemo.collections.llm.fn.base import walk
    from nemo.collections.llm.peft.lora import LoRALinear
    from nemo.collections.vlm.peft import LoRA

    model = copy_weights(reference, build_ours(torch.float32, "transformer_engine"))
    walk(model, LoRA(target_modules=["linear_fc1", "linear_q"], dim=4, alpha=8).transform)
    merged = copy_weights(reference, build_ours(torch.float32, "transformer_engine"))
    model.cuda()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, LoRALinear):
                for p in module.adapter.parameters():
                    p.normal_(std=0.1)
                delta = module.adapter.linear_out.weight @ module.adapter.linear_in.weight
                merged.get_parameter(f"{name}.weight").add_(2.0 * delta)
    batch = make_batch(CASES["mixed tile counts"])
    expected = logits_of(merged, batch)
    assert (expected - logits_of(reference, batch)).square().mean().sqrt() > 0.05 * expected.std()
    assert (logits_of(model, batch) - expected).square().mean().sqrt() < 2e-2 * expected.std()
