"""config.json <-> our model's values: nothing is lost, and what can't be taken is named."""

from __future__ import annotations

import copy

import pytest
from checkpoint_cases import TEXT_OF_11B, VISION_OF_11B
from checkpoint_cases import hf_config as tiny_config

from vlmsft.checkpoints.hf_config import SpecialIds, architecture, generation_config, hf_config, model_values
from vlmsft.errors import UserError

SPECIAL = SpecialIds(0, (1, 2), 3)
META_11B = {
    "architectures": ["MllamaForConditionalGeneration"],
    "model_type": "mllama",
    "image_token_index": 128256,
    "text_config": {
        "model_type": "mllama_text_model",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "rope_theta": 500000.0,
        "eos_token_id": [128001, 128008, 128009],
    },
    "vision_config": {"model_type": "mllama_vision_model", "image_size": 560},
    "kept": "as it is",
}
UNUSUAL = {
    "text_config.rms_norm_eps": 1e-6,
    "text_config.rope_theta": 10000.0,
    "text_config.intermediate_size": 320,
    "text_config.rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 8.0,
        "original_max_position_embeddings": 4096,
    },
    "vision_config.norm_eps": 1e-6,
    "vision_config.intermediate_size": 96,
    "vision_config.num_global_layers": 2,
    "vision_config.intermediate_layers_indices": [0, 2],
    "vision_config.vision_output_dim": 192,
    "vision_config.max_num_tiles": 2,
    "vision_config.supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
}


def changed(changes, config=None):
    config = copy.deepcopy(config or tiny_config().to_dict())
    for path, value in changes.items():
        *parents, key = path.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[key] = value
    return config


@pytest.mark.parametrize(
    "config",
    [tiny_config().to_dict(), tiny_config(TEXT_OF_11B, VISION_OF_11B).to_dict(), META_11B, changed(UNUSUAL)],
    ids=["tiny", "11B's layers", "11B", "unusual values"],
)
@pytest.mark.parametrize("with_original", [False, True])
def test_there_and_back(config, with_original):
    back = hf_config(model_values(config), SPECIAL, "bfloat16", config if with_original else None)
    assert architecture(back) == architecture(config)


def test_values_of_the_11b_model_are_those_of_our_yaml():
    from omegaconf import OmegaConf

    from vlmsft.config_files import root

    yaml = OmegaConf.load(root() / "conf" / "model" / "mllama_11b.yaml").model.config
    values = model_values(META_11B)
    for part, found in values.items():
        for key in found.keys() & set(yaml[part]) - {"seq_length", "text_hidden_size"}:
            assert found[key] == yaml[part][key], key


@pytest.mark.parametrize("key", [key for key in UNUSUAL if not key.endswith(("_dim", "max_num_tiles"))])
def test_each_value_counts(key):
    """A value that both `architecture` and `model_values` passed over would make the round trip pass for nothing."""
    together = {"vision_config.intermediate_layers_indices": ["vision_config.vision_output_dim"]}
    other = changed({name: UNUSUAL[name] for name in (key, *together.get(key, []))})
    assert architecture(other) != architecture(tiny_config().to_dict())
    assert model_values(other) != model_values(tiny_config().to_dict())


def test_no_rope_scaling_is_a_factor_of_one():
    config = changed({"text_config.rope_scaling": None})
    assert model_values(config)["language_model_config"]["scale_factor"] == 1.0
    assert hf_config(model_values(config), SPECIAL, "float32")["text_config"]["rope_scaling"] == {
        "rope_type": "default"
    }


def test_all_that_our_model_cant_do_is_named_at_once():
    wrong = {
        "text_config.hidden_act": "gelu",
        "text_config.tie_word_embeddings": True,
        "text_config.dropout": 0.1,
        "text_config.rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "text_config.cross_attention_layers": [0],
        "vision_config.hidden_act": "gelu_pytorch_tanh",
        "vision_config.num_channels": 1,
        "vision_config.intermediate_layers_indices": [2, 1],
        "vision_config.vision_output_dim": 1,
        "vision_config.image_size": 100,
        "vision_config.supported_aspect_ratios": [[3, 3]],
        "image_token_index": 7,
        "quantization_config": {"bits": 4},
    }
    with pytest.raises(UserError) as error:
        model_values(changed(wrong))
    said = [problem.where for problem in error.value.problems]
    assert {where.removeprefix("config.json: ") for where in said} == wrong.keys()


def test_another_architecture():
    with pytest.raises(UserError, match=r"model_type 'llava' \(Llava\), expected 'mllama'"):
        model_values({"model_type": "llava", "architectures": ["Llava"]})


def test_half_a_rope_scaling():
    config = changed({"text_config.rope_scaling": {"rope_type": "llama3", "factor": 8.0}})
    with pytest.raises(UserError, match="Missing required keys in `rope_scaling`"):
        model_values(config)


def test_values_that_transformers_refuses():
    with pytest.raises(UserError, match="transformers says"):
        model_values(changed({"vision_config": [1]}))


def test_all_that_hf_cant_do_is_named_at_once():
    values = model_values(tiny_config().to_dict())
    wrong = {
        "language_model_config.normalization": "LayerNorm",
        "language_model_config.share_embeddings_and_output_weights": True,
        "language_model_config.activation_func": "torch.nn.functional.gelu",
        "language_model_config.kv_channels": 7,
        "vision_model_config.add_bias_linear": False,
        "vision_model_config.num_query_groups": 2,
    }
    with pytest.raises(UserError) as error:
        hf_config(changed(wrong, values), SPECIAL, "float32")
    assert {problem.where.removeprefix("model.config.") for problem in error.value.problems} == wrong.keys()


def test_original_keys_stay_and_the_architecture_is_ours():
    values = model_values(META_11B)
    values["language_model_config"]["rotary_base"] = 1000
    values["language_model_config"]["seq_length"] = 300
    config = hf_config(values, SPECIAL, "bfloat16", META_11B)
    assert config["kept"] == "as it is"
    assert config["text_config"]["eos_token_id"] == [128001, 128008, 128009]
    assert config["text_config"]["rope_theta"] == 1000
    assert "max_position_embeddings" not in config["text_config"]
    assert config["torch_dtype"] == "bfloat16"


def test_no_dtype_of_the_original_stays():
    """transformers 4.57 writes `dtype`, reads both, and takes it before torch_dtype."""
    from transformers import MllamaConfig

    original = tiny_config()
    original.dtype = original.text_config.dtype = original.vision_config.dtype = "float32"
    config = hf_config(model_values(original.to_dict()), SPECIAL, "bfloat16", original.to_dict())
    found = MllamaConfig.from_dict(config)
    assert {str(part.dtype) for part in (found, found.text_config, found.vision_config)} == {"torch.bfloat16"}


def test_stock_nemo_configs_have_nemos_fixed_values():
    values = model_values(META_11B)
    for key in ("patch_size", "intermediate_layers_indices"):
        del values["vision_model_config"][key]
    assert architecture(hf_config(values, SPECIAL, "bfloat16")) == architecture(META_11B)


def test_a_text_may_be_as_long_as_rope_scaling_stretches_the_model():
    values = model_values(tiny_config().to_dict())
    assert hf_config(values, SPECIAL, "float32")["text_config"]["max_position_embeddings"] == 65536


def test_special_ids_of_the_packaged_tokenizer():
    from transformers import AutoTokenizer

    from vlmsft.config_files import sample_set

    tokenizer = AutoTokenizer.from_pretrained(f"{sample_set()}/processor")
    special = SpecialIds.of_tokenizer(tokenizer)
    assert tokenizer.convert_ids_to_tokens(special.end_of_text) == ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    assert generation_config(special)["eos_token_id"] == list(special.end_of_text)
