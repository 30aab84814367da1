"""transformers' config.json of Mllama <-> the values of vlmsft's MLlamaConfig.

Each value is carried over or refused by name; none is dropped. Ours are plain values under the names of NeMo's
constructors (`language_model_config`, `vision_model_config`), so that neither direction imports NeMo.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from vlmsft.checkpoints.hf_folder import ARCHITECTURE, architecture_problems
from vlmsft.errors import Problem, UserError
from vlmsft.mllama.sizes import TextShape, cross_layers

# Under another name, otherwise the same
_TEXT_NAMES = {
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "rotary_base": "rope_theta",
    "layernorm_epsilon": "rms_norm_eps",
}
_VISION_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_global_layers": "num_global_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "attention_heads",
    "vision_chunk_size": "image_size",
    "max_num_tiles": "max_num_tiles",
    "patch_size": "patch_size",
    "intermediate_layers_indices": "intermediate_layers_indices",
    "supported_aspect_ratios": "supported_aspect_ratios",
    "layernorm_epsilon": "norm_eps",
}
_ROPE_NAMES = {
    "scale_factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "old_context_len": "original_max_position_embeddings",
}
_STOCK_VISION = {"patch_size": 14, "intermediate_layers_indices": [3, 7, 15, 23, 30]}
"""Built into NeMo's own tower; its config has no such fields."""
_NO_ROPE_SCALING = {"scale_factor": 1.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
"""A factor of 1 divides no frequency, whatever the others say."""

# HF's values that our model has built in
_HF_FIXED = {
    "text_config": {"hidden_act": "silu", "tie_word_embeddings": False, "dropout": 0},
    "vision_config": {"hidden_act": "gelu", "num_channels": 3},
}
# Our values (NeMo's fields) that HF's model has built in
_OURS_FIXED = {
    "language_model_config": {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "share_embeddings_and_output_weights": False,
        "layernorm_zero_centered_gamma": False,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "seq_len_interpolation_factor": None,
        "window_size": None,
        "softmax_scale": None,
        "num_moe_experts": None,
        "multi_latent_attention": False,
    },
    "vision_model_config": {
        "normalization": "LayerNorm",
        "gated_linear_unit": False,
        "add_bias_linear": True,
        "add_qkv_bias": False,
        "layernorm_zero_centered_gamma": False,
        "softmax_scale": None,
        "window_size": None,
    },
}
_ACTIVATIONS = {"language_model_config": "silu", "vision_model_config": "gelu"}


@dataclass(frozen=True)
class SpecialIds:
    """Ids that config.json names beside the architecture; end_of_text: of all tokens that end an answer."""

    begin_of_text: int
    end_of_text: tuple[int, ...]
    pad: int

    @classmethod
    def of_tokenizer(cls, tokenizer: Any) -> SpecialIds:
        """From a transformers tokenizer; the Llama 3 family ends a text, a message or a turn, each with its token."""
        vocabulary = tokenizer.get_vocab()
        named = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
        ends = {vocabulary[name] for name in named if name in vocabulary} | {tokenizer.eos_token_id}
        return cls(tokenizer.bos_token_id, tuple(sorted(ends)), tokenizer.pad_token_id)


def model_values(hf_config: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """MLlamaConfig's constructor values of a config.json: {"language_model_config": {...}, "vision_model_config": ...}.

    Keys that config.json leaves out have transformers' defaults. Raises UserError with every value that our model can't
    take; `where` stands in front of each.
    """
    problems = architecture_problems(hf_config, where)
    if problems:
        raise UserError(problems)
    text, vision, image_token = _filled(hf_config, where)
    problems = list(_hf_problems(hf_config, text, vision, image_token, where))
    if problems:
        raise UserError(problems)
    return {"language_model_config": _our_text(text), "vision_model_config": _our_vision(text, vision)}


def hf_config(
    model_config: Mapping[str, Any],
    special: SpecialIds,
    dtype: str,
    original: Mapping[str, Any] | None = None,
    where: str = "model.config",
) -> dict[str, Any]:
    """config.json for the values of an MLlamaConfig (NemoCheckpoint.model_config).

    dtype: of the weights, e.g. "bfloat16"
    original: the config.json that the model was imported from. Its keys stay, except those that say what the model is
    Raises UserError with every value that HF's Mllama can't take; `where` stands in front of each.
    """
    problems = list(_our_problems(model_config, where))
    if problems:
        raise UserError(problems)
    text, vision = model_config["language_model_config"], {**_STOCK_VISION, **model_config["vision_model_config"]}
    hf_text, hf_vision = _hf_text(text), _hf_vision(vision)
    base = _without_dtype(original or {"tie_word_embeddings": False})
    base_text = base.get("text_config", {"dropout": 0, "bos_token_id": special.begin_of_text, **_end_and_pad(special)})
    if original is None:
        hf_text["max_position_embeddings"] = _longest_text(text)
    return {
        **base,
        "architectures": [ARCHITECTURE],
        "model_type": "mllama",
        # the name that every release of transformers reads
        "torch_dtype": dtype,
        "image_token_index": text["vocab_size"],
        "text_config": {**base_text, **hf_text, "model_type": "mllama_text_model", "torch_dtype": dtype},
        "vision_config": {
            **base.get("vision_config", {}),
            **hf_vision,
            "model_type": "mllama_vision_model",
            "torch_dtype": dtype,
        },
    }


def _without_dtype(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without transformers' newer name for torch_dtype, at each level: it would be taken in its place."""
    plain = {key: value for key, value in config.items() if key != "dtype"}
    return {key: _without_dtype(value) if key.endswith("_config") else value for key, value in plain.items()}


def generation_config(special: SpecialIds) -> dict[str, Any]:
    """generation_config.json for a model that was not imported: greedy."""
    return {"bos_token_id": special.begin_of_text, "do_sample": False, **_end_and_pad(special)}


def architecture(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config.json that say what the model computes, transformers' defaults filled in; to compare two."""
    text, vision, image_token = _filled(hf_config, "config.json")
    text_keys = (*_TEXT_NAMES.values(), "num_hidden_layers", "cross_attention_layers", *_HF_FIXED["text_config"])
    vision_keys = (*_VISION_NAMES.values(), "vision_output_dim", *_HF_FIXED["vision_config"])
    flat = {f"text_config.{key}": text[key] for key in text_keys}
    flat |= {f"vision_config.{key}": vision[key] for key in vision_keys}
    flat |= {f"text_config.rope_scaling.{key}": value for key, value in _rope(text).items()}
    return {**flat, "image_token_index": image_token}


def _end_and_pad(special: SpecialIds) -> dict[str, Any]:
    return {"eos_token_id": list(special.end_of_text), "pad_token_id": special.pad}


def _filled(config: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    from transformers import MllamaConfig

    try:
        filled = MllamaConfig.from_dict(dict(config)).to_dict()
        return filled["text_config"], filled["vision_config"], filled["image_token_index"]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        remedy = f"transformers says: {error}"
        raise UserError(Problem(where, "values that it refuses", "a config of Mllama", remedy)) from None


# ------------------------------------------------------------------------------------------------- HF -> ours


def _our_text(text: Mapping[str, Any]) -> dict[str, Any]:
    num_cross = len(text["cross_attention_layers"])
    return {
        "num_layers": text["num_hidden_layers"] - num_cross,
        "num_cross_attention_layers": num_cross,
        "seq_length": text["max_position_embeddings"],
        **{ours: text[hf] for ours, hf in _TEXT_NAMES.items()},
        **_rope(text),
    }


def _our_vision(text: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{ours: vision[hf] for ours, hf in _VISION_NAMES.items()},
        "vision_max_num_chunks": vision["max_num_tiles"],
        "text_hidden_size": text["hidden_size"],
    }


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    scaling = text["rope_scaling"]
    if _rope_type(scaling) == "default":
        return dict(_NO_ROPE_SCALING)
    return {ours: scaling[hf] for ours, hf in _ROPE_NAMES.items()}


def _rope_type(scaling: Mapping[str, Any] | None) -> str:
    return "default" if scaling is None else str(scaling.get("rope_type", scaling.get("type")))


def _hf_problems(
    config: Mapping[str, Any], text: Mapping[str, Any], vision: Mapping[str, Any], image_token: int, where: str
) -> Iterator[Problem]:
    for part, values in (("text_config", text), ("vision_config", vision)):
        for key, only in _HF_FIXED[part].items():
            if values[key] != only:
                yield Problem(
                    f"{where}: {part}.{key}", repr(values[key]), f"{only!r}, which vlmsft's model has built in"
                )
    if config.get("quantization_config"):
        yield Problem(f"{where}: quantization_config", "quantised weights", "weights in bfloat16, float16 or float32")
    if _rope_type(text["rope_scaling"]) not in ("llama3", "default"):
        found = repr(_rope_type(text["rope_scaling"]))
        yield Problem(f"{where}: text_config.rope_scaling", f"rope_type {found}", "'llama3' or none")
    yield from _layer_problems(text, where)
    yield from _size_problems(text, vision, where)
    if image_token != text["vocab_size"]:
        expected = f"{text['vocab_size']}, the id after the last text token"
        yield Problem(f"{where}: image_token_index", str(image_token), expected)


def _layer_problems(text: Mapping[str, Any], where: str) -> Iterator[Problem]:
    cross = sorted(text["cross_attention_layers"])
    num_self = text["num_hidden_layers"] - len(cross)
    ours = _hf_cross_layers(num_self, len(cross))
    if cross != ours:
        expected = f"{ours}, where NeMo puts {len(cross)} cross-attention layers among {num_self} others"
        yield Problem(f"{where}: text_config.cross_attention_layers", str(cross), expected)


def _size_problems(text: Mapping[str, Any], vision: Mapping[str, Any], where: str) -> Iterator[Problem]:
    indices, depth = list(vision["intermediate_layers_indices"]), vision["num_hidden_layers"]
    if indices != sorted(set(indices)) or not all(0 <= index < depth for index in indices):
        key = f"{where}: vision_config.intermediate_layers_indices"
        yield Problem(key, str(indices), f"increasing numbers from 0 to {depth - 1}")
    width = vision["hidden_size"] * (1 + len(indices))
    if vision["vision_output_dim"] != width:
        expected = f"{width}: hidden_size for the tower's output and each of its {len(indices)} intermediate layers"
        yield Problem(f"{where}: vision_config.vision_output_dim", str(vision["vision_output_dim"]), expected)
    if vision["image_size"] % vision["patch_size"]:
        expected = f"a multiple of patch_size {vision['patch_size']}"
        yield Problem(f"{where}: vision_config.image_size", str(vision["image_size"]), expected)
    too_large = [ratio for ratio in vision["supported_aspect_ratios"] if math.prod(ratio) > vision["max_num_tiles"]]
    if too_large:
        expected = f"no more than max_num_tiles = {vision['max_num_tiles']} tiles each"
        yield Problem(f"{where}: vision_config.supported_aspect_ratios", str(too_large), expected)
    for part, values, key in (
        ("text_config", text, "num_attention_heads"),
        ("vision_config", vision, "attention_heads"),
    ):
        if values["hidden_size"] % values[key]:
            yield Problem(
                f"{where}: {part}.hidden_size", str(values["hidden_size"]), f"a multiple of {key} {values[key]}"
            )


# ------------------------------------------------------------------------------------------------- ours -> HF


def _hf_cross_layers(num_layers: int, num_cross_layers: int) -> list[int]:
    """Where NeMo puts cross-attention layers, in HF's numbers, which count layers of both kinds."""
    numbers = SimpleNamespace(num_layers=num_layers, num_cross_attention_layers=num_cross_layers)
    return [layer + i for i, layer in enumerate(cross_layers(cast(TextShape, numbers)))]


def _hf_text(text: Mapping[str, Any]) -> dict[str, Any]:
    num_self, num_cross = text["num_layers"], text["num_cross_attention_layers"]
    return {
        **{hf: text[ours] for ours, hf in _TEXT_NAMES.items()},
        "num_hidden_layers": num_self + num_cross,
        "cross_attention_layers": _hf_cross_layers(num_self, num_cross),
        "rope_scaling": _hf_rope(text),
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


def _longest_text(text: Mapping[str, Any]) -> int:
    """What rope scaling stretches the model to; seq_length is only what training used, and vLLM takes this as limit."""
    return max(text["seq_length"], int(text["scale_factor"] * text["old_context_len"]))


def _hf_rope(text: Mapping[str, Any]) -> dict[str, Any]:
    if text["scale_factor"] == 1:
        return {"rope_type": "default"}  # transformers' Mllama fails where there is none
    return {"rope_type": "llama3", **{hf: text[ours] for ours, hf in _ROPE_NAMES.items()}}


def _hf_vision(vision: Mapping[str, Any]) -> dict[str, Any]:
    values = {hf: vision[ours] for ours, hf in _VISION_NAMES.items()}
    values["intermediate_size"] = vision["ffn_hidden_size"] or 4 * vision["hidden_size"]  # Megatron's default
    return {
        **values,
        "intermediate_layers_indices": list(vision["intermediate_layers_indices"]),
        "supported_aspect_ratios": [list(ratio) for ratio in vision["supported_aspect_ratios"]],
        "vision_output_dim": vision["hidden_size"] * (1 + len(vision["intermediate_layers_indices"])),
        "hidden_act": "gelu",
        "num_channels": 3,
    }


def _our_problems(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    for part, fixed in _OURS_FIXED.items():
        values = config[part]
        for key, only in fixed.items():
            if key in values and values[key] != only:
                yield Problem(f"{where}.{part}.{key}", repr(values[key]), f"{only!r}, which HF's Mllama has built in")
        activation = _activation(values)
        if activation not in (None, _ACTIVATIONS[part]):
            expected = f"{_ACTIVATIONS[part]}, which HF's Mllama has built in"
            yield Problem(f"{where}.{part}.activation_func", str(activation), expected)
        head_dim = values["hidden_size"] // values["num_attention_heads"]
        if values.get("kv_channels") not in (None, head_dim):
            expected = f"{head_dim}: hidden_size / num_attention_heads, as HF's Mllama computes it"
            yield Problem(f"{where}.{part}.kv_channels", str(values["kv_channels"]), expected)
    vision = config["vision_model_config"]
    if vision.get("num_query_groups") not in (None, vision["num_attention_heads"]):
        expected = f"{vision['num_attention_heads']}: a key for each of the tower's heads"
        yield Problem(f"{where}.vision_model_config.num_query_groups", str(vision["num_query_groups"]), expected)


def _activation(values: Mapping[str, Any]) -> str | None:
    """'silu' for 'torch.nn.functional.silu'; None where it is NeMo's default."""
    function = values.get("activation_func")
    return None if function is None else str(function).rpartition(".")[2]
