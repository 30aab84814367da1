"""Parameter counts against the real modules."""

from __future__ import annotations

import dataclasses

import pytest

from vlmsft.mllama.sizes import (
    Count,
    TextShape,
    VisionShape,
    lora_count,
    lora_modules,
    parameter_counts,
    tokens_per_step,
)

TEXT_11B = TextShape(32, 8, 4096, 14336, 32, 8, 128256)
VISION_11B = VisionShape(32, 8, 1280, 560, 14, 5, 4096)
TEXT_90B = TextShape(80, 20, 8192, 28672, 64, 8, 128256)
VISION_90B = dataclasses.replace(VISION_11B, text_hidden_size=8192)
TEXT_TINY = TextShape(4, 2, 32, 64, 4, 2, 128)
VISION_TINY = VisionShape(3, 2, 48, 56, 14, 2, 32, ffn_hidden_size=96)
TEXT_TARGETS = [f"*.language_model.*.{name}" for name in ("linear_qkv", "linear_q", "linear_kv")]


def totals(text, vision):
    return {part: count.total for part, count in parameter_counts(text, vision).items()}


def test_11b():
    """Of Hugging Face's checkpoint: 10,670,220,835 values; NeMo holds the same ones."""
    counts = totals(TEXT_11B, VISION_11B)
    assert counts == {"tower": 863_567_379, "projector": 31_461_376, "text": 9_775_192_080}
    assert sum(counts.values()) == 10_670_220_835


def test_90b():
    assert sum(totals(TEXT_90B, VISION_90B).values()) / 1e9 == pytest.approx(88.6, abs=0.1)  # as the model card says


def test_lora():
    # 32 self-attention layers with (4096 in, 6144 out), 8 cross layers with (4096, 4096) and (4096, 2048)
    text_only = lora_count(TEXT_11B, VISION_11B, 8, TEXT_TARGETS).total
    assert text_only == 8 * (32 * 10240 + 8 * (8192 + 6144))
    # NeMo's own names hit the tower's 32 + 8 layers with (1280 in, 3840 out) as well
    with_tower = lora_count(TEXT_11B, VISION_11B, 8, ["linear_qkv", "linear_q", "linear_kv"]).total
    assert with_tower == text_only + 8 * 40 * 5120
    first_layer = lora_count(TEXT_11B, VISION_11B, 8, ["*.decoder.layers.0.*.linear_qkv"]).total
    assert first_layer == 8 * 10240
    twice = ["linear_qkv", "*.linear_qkv"]
    assert lora_count(TEXT_11B, VISION_11B, 8, twice) == lora_count(TEXT_11B, VISION_11B, 8, twice[:1])
    with pytest.raises(ValueError, match=r"'q_proj' hits none of .*linear_qkv"):
        lora_count(TEXT_11B, VISION_11B, 8, ["q_proj"])


def test_tensor_parallel_ranks_hold_shards_and_copies():
    assert Count(10, 3).per_rank(2) == 8


def test_lora_modules():
    in_text, everywhere = (lora_modules(TEXT_11B, VISION_11B, targets) for targets in (TEXT_TARGETS, ["linear_qkv"]))
    assert len(in_text) == 32 + 2 * 8 and not any("vision" in name for name in in_text)
    assert len(everywhere) == 32 + 40 and sum("vision_encoder" in name for name in everywhere) == 40


def test_tokens_per_step():
    tokens = tokens_per_step(VISION_11B, global_batch_size=128, text_tokens=2048)
    assert tokens == {"text": 262_144, "vision": 128 * 6404}


@pytest.mark.nemo
def test_counts_equal_the_real_modules():
    """Sharded and replicated parameters too: Megatron marks the sharded ones."""
    from vlmsft.runtime.summary import part_of

    model = build(tiny_config())
    found: dict[str, Count] = {}
    for name, parameter in model.named_parameters():
        sharded = getattr(parameter, "tensor_model_parallel", False)
        count = Count(parameter.numel()) if sharded else Count(0, parameter.numel())
        found[part_of(name)] = found.get(part_of(name), Count(0)) + count
    assert {part: count.total for part, count in found.items()} == totals(TEXT_TINY, VISION_TINY)
    assert found == parameter_counts(TEXT_TINY, VISION_TINY)


@pytest.mark.nemo
@pytest.mark.parametrize(
    "targets",
    [
        TEXT_TARGETS,
        ["linear_qkv", "linear_q", "linear_kv"],
        ["linear_proj", "linear_fc1", "linear_fc2"],
        ["*.decoder.layers.1.*.linear_fc1", "*.xattn_layers.*.linear_proj", "*.global_transformer.*.linear_fc2"],
        ["output_layer", "encoder", "_linear"],
    ],
    ids=lambda targets: " ".join(targets),
)
def test_lora_count_equals_nemos_adapters(targets):
    from nemo.collections.vlm.peft import LoRA

    root = torch_module_of(build(tiny_config()))
    for parameter in root.parameters():
        parameter.requires_grad_(False)
    root.walk(LoRA(target_modules=targets, dim=4, alpha=8).transform)
    adapters = [(name, p) for name, p in root.named_parameters() if ".adapter." in name]
    found = sum(p.numel() for _, p in adapters)
    assert found == lora_count(TEXT_TINY, VISION_TINY, 4, targets).total > 0
    assert all(p.tensor_model_parallel for _, p in adapters), "sharded, all of them"


def torch_module_of(model):
    """The model as `module` of a root that can be walked, as NeMo's Lightning module is one."""
    import torch
    from nemo.collections.llm import fn

    class Root(torch.nn.Module, fn.FNMixin):
        def __init__(self):
            super().__init__()
            self.module = model

    return Root()


def tiny_config():
    from vlmsft.mllama.config import MLlamaConfig, TextConfig, VisionConfig

    return MLlamaConfig(
        layers="torch",
        language_model_config=TextConfig(
            num_layers=TEXT_TINY.num_layers,
            num_cross_attention_layers=TEXT_TINY.num_cross_attention_layers,
            hidden_size=TEXT_TINY.hidden_size,
            ffn_hidden_size=TEXT_TINY.ffn_hidden_size,
            num_attention_heads=TEXT_TINY.num_attention_heads,
            num_query_groups=TEXT_TINY.num_query_groups,
            vocab_size=TEXT_TINY.vocab_size,
            use_cpu_initialization=True,
        ),
        vision_model_config=VisionConfig(
            num_layers=VISION_TINY.num_layers,
            num_global_layers=VISION_TINY.num_global_layers,
            hidden_size=VISION_TINY.hidden_size,
            ffn_hidden_size=VISION_TINY.ffn_hidden_size,
            num_attention_heads=4,
            vision_chunk_size=VISION_TINY.vision_chunk_size,
            patch_size=VISION_TINY.patch_size,
            intermediate_layers_indices=[0, 2],
            text_hidden_size=VISION_TINY.text_hidden_size,
            use_cpu_initialization=True,
        ),
        use_cpu_initialization=True,
    )


def build(config):
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from vlmsft.runtime import cpu

    cpu.activate()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    return config.configure_model(None)
