"""HF's parameters <-> ours: exact, complete, and independent of the direction."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from mllama_cases import TEXT, VISION, hf_config, hf_model

from vlmsft.mllama.hf_mapping import RULES, Sizes, deinterleave, file_name, interleave, memory_name, to_hf, to_ours


@pytest.fixture(scope="module")
def hf():
    return hf_model()


def test_round_trip_is_exact_to_the_bit(hf):
    sizes = Sizes.from_hf(hf.config)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in hf.state_dict().items()}
    back = dict(to_hf(dict(to_ours(state, sizes)), sizes))
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name


def test_every_hf_tensor_is_read_exactly_once(hf):
    class Counting(dict):
        def __getitem__(self, name):
            reads[name] = reads.get(name, 0) + 1
            return super().__getitem__(name)

    reads: dict[str, int] = {}
    list(to_ours(Counting(hf.state_dict()), Sizes.from_hf(hf.config)))
    assert reads == dict.fromkeys(hf.state_dict(), 1)


def test_cross_attention_layers_keep_their_place():
    """HF's layers 1 and 4 of 6 are the cross-attention layers in front of our self-attention layers 1 and 3."""
    assert Sizes.from_hf(hf_config()).cross_layers == (1, 3)


def test_11b_layer_numbers():
    config = hf_config()
    config.text_config.num_hidden_layers = 40
    config.text_config.cross_attention_layers = [3, 8, 13, 18, 23, 28, 33, 38]
    assert Sizes.from_hf(config).cross_layers == (3, 7, 11, 15, 19, 23, 27, 31)
    assert Sizes.from_hf(config).num_layers == 32


def test_qkv_rows_go_group_by_group():
    query, key, value = (
        torch.arange(8.0).view(8, 1),
        100 + torch.arange(4.0).view(4, 1),
        200 + torch.arange(4.0).view(4, 1),
    )
    joined = interleave(2, (query, key, value))  # 2 groups, 2 heads each, head dim 2
    assert joined.flatten().tolist() == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]
    parts = deinterleave(2, (2, 1, 1), joined)
    assert all(torch.equal(a, b) for a, b in zip(parts, (query, key, value), strict=True))


def test_a_missing_tensor_is_named(hf):
    state = dict(hf.state_dict())
    del state["model.multi_modal_projector.bias"]
    with pytest.raises(KeyError, match=r"model\.multi_modal_projector\.bias"):
        dict(to_ours(state, Sizes.from_hf(hf.config)))


def test_file_names_are_those_that_transformers_writes(hf, tmp_path):
    from safetensors import safe_open

    hf.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        in_file = set(file.keys())
    assert {file_name(name) for name in hf.state_dict()} == in_file
    assert {memory_name(name) for name in in_file} == set(hf.state_dict())
    assert {memory_name(name) for name in hf.state_dict()} == set(hf.state_dict())


def test_rules_name_each_tensor_once():
    for side in ("hf", "ours"):
        names = [(rule.layers, name) for rule in RULES for name in getattr(rule, side)]
        assert len(names) == len(set(names))


@pytest.mark.nemo
def test_sizes_from_our_config_equal_those_from_hf():
    from vlmsft.mllama.config import MLlamaConfig, TextConfig, VisionConfig

    config = MLlamaConfig(language_model_config=TextConfig(**TEXT), vision_model_config=VisionConfig(**VISION))
    assert dataclasses.asdict(Sizes.from_config(config)) == dataclasses.asdict(Sizes.from_hf(hf_config()))
