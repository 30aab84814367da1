"""Adapters of a LoRA checkpoint: added to the base, and as the folder that PEFT loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_cases import expected_tensors, hf_config, write_checkpoint, write_hf_folder
from peft import PeftModel

from vlmsft.checkpoints.lora import Merged, adapted_modules, merge, merged, peft_tensors, write_adapter
from vlmsft.checkpoints.nemo import NemoCheckpoint
from vlmsft.errors import UserError
from vlmsft.mllama.hf_mapping import to_hf
from vlmsft.mllama.hf_reference import load

DIM, ALPHA = 4, 8
TEXT, CROSS = "language_model.decoder.layers.{}", "language_model.decoder.xattn_layers.1"
TOWER = "vision_model.vision_encoder"
IN_SELF_LAYERS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
IN_CROSS_LAYERS = ("cross_attention.linear_q", "cross_attention.linear_kv", "cross_attention.linear_proj")
MODULES = [
    *(f"{TEXT.format(layer)}.{name}" for layer in range(2) for name in IN_SELF_LAYERS),
    *(f"{CROSS}.{name}" for name in (*IN_CROSS_LAYERS, "mlp.linear_fc1", "mlp.linear_fc2")),
    *(f"{TOWER}.transformer.layers.{layer}.{name}" for layer in range(3) for name in IN_SELF_LAYERS),
    *(f"{TOWER}.global_transformer.layers.0.{name}" for name in IN_SELF_LAYERS),
    f"{TOWER}.conv1._linear",
    "vision_model.vision_projection.encoder",
    "language_model.output_layer",
]
"""Every linear layer of the tiny model."""


def adapters(weights, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for module in MODULES:
        outputs, inputs = weights[f"{module}.weight"].shape
        yield f"{module}.adapter.linear_in.weight", torch.randn(DIM, inputs, generator=generator) / inputs**0.5
        yield f"{module}.adapter.linear_out.weight", torch.randn(outputs, DIM, generator=generator) / 5


def write_lora(path: Path, config, base: Path, tensors) -> Path:
    settings = {"_target_": "nemo.collections.vlm.peft.lora.LoRA", "dim": DIM, "alpha": ALPHA, "dropout": 0.05}
    write_checkpoint(path, config, tensors, {"model_transform": {**settings, "target_modules": ["linear_qkv"]}})
    (path / "weights" / "adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": str(base)}))
    return path


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def saved(request, tmp_path_factory):
    """(HF folder of the base, its tensors in our names, a LoRA checkpoint on every linear layer)."""
    folder = tmp_path_factory.mktemp("lora")
    config = hf_config()
    hf = write_hf_folder(folder / "hf", config, request.param)
    weights = expected_tensors(hf)
    base = write_checkpoint(folder / "base", config, weights.items())
    return hf, weights, NemoCheckpoint(write_lora(folder / "lora", config, base, adapters(weights)))


def test_merged_is_base_plus_delta(saved):
    _, weights, checkpoint = saved
    found, factors = merged(checkpoint), dict(adapters(weights))
    assert list(found) == list(checkpoint.base) and found.num_bytes == checkpoint.base.num_bytes
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        expected = weight
        if module in MODULES and name.endswith(".weight"):
            linear_in = factors[f"{module}.adapter.linear_in.weight"]
            linear_out = factors[f"{module}.adapter.linear_out.weight"]
            delta = ALPHA / DIM * linear_out.double() @ linear_in.double()
            assert float(delta.abs().max()) > 0.01
            expected = (weight.double() + delta).to(weight.dtype)
        assert found[name].dtype == weight.dtype == found.dtype(name)
        assert found[name].shape == weight.shape == found.shape(name)
        # fp32 sums: at most the last bit differs
        torch.testing.assert_close(found[name], expected, rtol=2 * torch.finfo(weight.dtype).eps, atol=1e-6)


def test_the_sum_is_rounded_once():
    weight, linear_in = torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(2, 1, dtype=torch.bfloat16)
    linear_out = torch.tensor([[2.0**-9, 2.0**-9]], dtype=torch.bfloat16)  # with the scale half a step at 1, each
    assert float(merge(weight, linear_in, linear_out, 2.0)) == 1 + 2.0**-7


def test_a_whole_model_stays_itself(saved):
    base = saved[2].base
    assert merged(base) is base


# in bf16 the rounding of merged weights would hide what is compared
@pytest.mark.parametrize("saved", [torch.float32], ids=["fp32"], indirect=True)
def test_peft_loads_the_adapter_and_gives_what_merged_weights_give(saved, tmp_path):
    hf, _, checkpoint = saved
    write_adapter(tmp_path, checkpoint, checkpoint.base.sizes, str(hf))
    inputs = model_inputs()
    base = load(str(hf), dtype="auto")
    with torch.no_grad():
        plain = base(**inputs).logits
        adapted = PeftModel.from_pretrained(load(str(hf), dtype="auto"), str(tmp_path)).eval()
        found = adapted(**inputs).logits
        base.load_state_dict(dict(to_hf(merged(checkpoint), checkpoint.base.sizes)))
        expected = base(**inputs).logits
    assert float((expected - plain).abs().max()) > 0.1
    assert float((found - expected).abs().max()) < 2e-5


def test_split_factors_give_the_split_weights_exactly(saved):
    """q, k and v of a fused layer: the same linear_in, and the rows of linear_out that the weight's rows go to."""
    _, _, checkpoint = saved
    sizes = checkpoint.base.sizes
    found = peft_tensors(checkpoint, sizes)
    module = f"{TEXT.format(1)}.self_attention.linear_qkv"
    whole = {f"{module}.weight": checkpoint[f"{module}.adapter.linear_out.weight"]}
    filled = {name: whole.get(name, tensor) for name, tensor in checkpoint.base.items()}
    rows = dict(to_hf(filled, sizes))
    layer = "model.language_model.layers.2.self_attn"  # after the cross-attention layer at 1
    for part in "qkv":
        name = f"{layer}.{part}_proj"
        assert torch.equal(found[f"base_model.model.{name}.lora_B.weight"], rows[f"{name}.weight"])
        linear_in = checkpoint[f"{module}.adapter.linear_in.weight"]
        assert torch.equal(found[f"base_model.model.{name}.lora_A.weight"], linear_in)


def model_inputs():
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.tensor([[1, 512, 7, 8, 9]]),
        "pixel_values": torch.randn(1, 1, 4, 3, 112, 112, generator=generator),
        "aspect_ratio_ids": torch.tensor([[6]]),
        "aspect_ratio_mask": torch.ones(1, 1, 4, dtype=torch.int64),
        "cross_attention_mask": torch.tensor([0, 1, 1, 1, 1]).view(1, 5, 1, 1).expand(1, 5, 1, 4),
    }


def test_targets_are_named_in_full(saved, tmp_path):
    write_adapter(tmp_path, saved[2], saved[2].base.sizes, "org/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (DIM, ALPHA, "org/base")
    assert len(config["target_modules"]) == 48
    assert "model.language_model.layers.1.cross_attn.q_proj" in config["target_modules"]


def test_modules(saved):
    assert set(adapted_modules(saved[2])) == set(MODULES)


def test_a_base_of_another_size_is_refused(tmp_path, saved):
    other = hf_config({**hf_config().text_config.to_dict(), "intermediate_size": 64})
    hf = write_hf_folder(tmp_path / "hf", other, torch.float32)
    base = write_checkpoint(tmp_path / "base", other, expected_tensors(hf).items())
    lora = Path(shutil.copytree(saved[2].path, tmp_path / "lora"))
    (lora / "weights" / "adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": str(base)}))
    with pytest.raises(UserError) as error:
        Merged(NemoCheckpoint(lora))
    assert len(error.value.problems) == 6  # fc1 and fc2 of two layers and a cross-attention layer
    assert "another model than the one that the adapters were trained on" in str(error.value)


def test_what_was_trained_beside_the_adapters(tmp_path, saved):
    _, weights, checkpoint = saved
    name = "vision_model.vision_projection.encoder.bias"
    bias = weights[name] + 1
    path = write_lora(tmp_path / "lora", hf_config(), checkpoint.base.path, [(name, bias), *adapters(weights)])
    both = NemoCheckpoint(path)
    assert torch.equal(merged(both)[name], bias)
    with pytest.raises(UserError, match="format=merged holds it"):
        write_adapter(tmp_path, both, both.base.sizes, "")
