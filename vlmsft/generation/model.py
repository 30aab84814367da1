"""A model to generate with, from a Hugging Face folder or from a vlmsft checkpoint; no NeMo, no conversion on disk.

Both end up as the repaired MllamaForConditionalGeneration of vlmsft.mllama.hf_reference. It is built without memory and
its weights are put in tensor by tensor, so loading takes the weights once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.modeling_mllama import MllamaRotaryEmbedding

from vlmsft.checkpoints.find import resolve_checkpoint
from vlmsft.checkpoints.hf_config import SpecialIds, hf_config
from vlmsft.checkpoints.hf_folder import HFFolder
from vlmsft.checkpoints.lora import merged
from vlmsft.checkpoints.nemo import NemoCheckpoint
from vlmsft.data.encode import IGNORE, SampleEncoder
from vlmsft.data.records import Turn
from vlmsft.errors import Problem, UserError
from vlmsft.mllama.hf_mapping import to_hf
from vlmsft.mllama.hf_reference import repair

END_TOKENS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
"""Llama 3's: whichever of them comes, the answer is over."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class LoadedModel:
    """What generation needs.

    model: the repaired model in evaluation mode
    encoder: renders prompts and cuts images as in training
    end_token_ids: tokens that end an answer
    source: the folder that the weights came from
    """

    model: MllamaForConditionalGeneration
    encoder: SampleEncoder
    end_token_ids: frozenset[int]
    source: Path

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype


def load_model(
    source: str | os.PathLike[str], device: str = "auto", dtype: str = "auto", processor: str | None = None
) -> LoadedModel:
    """The model of `source`: a Hugging Face folder, or a vlmsft checkpoint, run folder or run name; adapters merged.

    device: auto (a GPU where there is one), cpu, cuda or cuda:N
    dtype: auto (the stored output layer's), bfloat16, float16 or float32
    processor: folder or hub id; None = the source's own
    Raises UserError where there is no such model, device or processor, or where weights are missing or don't fit.
    """
    place = resolve_device(device)
    kind = resolve_dtype(dtype)
    folder = resolve_source(source)
    if is_hf_folder(folder):
        model, own_processor = _from_hf_folder(folder, place, kind), str(folder)
    else:
        model, own_processor = _from_checkpoint(folder, place, kind)
    return wrap(model, processor or own_processor, folder)


def resolve_source(source: str | os.PathLike[str]) -> Path:
    """The Hugging Face or checkpoint folder that `source` stands for. Raises UserError where there is none."""
    folder = Path(source).expanduser()
    return folder if is_hf_folder(folder) else resolve_checkpoint(str(folder))


def is_hf_folder(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def wrap(model: MllamaForConditionalGeneration, processor: str, source: str | os.PathLike[str]) -> LoadedModel:
    """A model in memory as a LoadedModel; it is repaired in place, and forgets its generation defaults.

    HF's `generate` fills what is at its default from the model's generation_config, even where a GenerationConfig is
    passed: Llama's own says temperature 0.6, so that temperature=1.0 would be taken for 0.6.
    """
    encoder = SampleEncoder(processor, NO_LIMIT)
    tokens = end_token_ids(encoder, model.generation_config)
    model.generation_config = GenerationConfig()
    _check_vocabulary(model, encoder, processor)
    return LoadedModel(repair(model).eval(), encoder, tokens, Path(source))


def resolve_device(device: str) -> torch.device:
    """Raises UserError for a device that this machine doesn't have."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UserError(Problem("device", repr(device), "auto, cpu, cuda or cuda:N")) from None
    count = torch.cuda.device_count()
    if place.type == "cuda" and (place.index or 0) >= count:
        raise UserError(Problem("device", device, f"one of this machine's {count} GPUs", "device=cpu works everywhere"))
    return place


def resolve_dtype(dtype: str) -> torch.dtype | None:
    """None for auto. Raises UserError for another name than DTYPES'."""
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(Problem("dtype", repr(dtype), f"auto, {', '.join(DTYPES)}"))
    return DTYPES.get(dtype)


def end_token_ids(encoder: SampleEncoder, generation_config: Any) -> frozenset[int]:
    """The token that ends a turn in training, the tokenizer's end of sequence, END_TOKENS and the model's own."""
    turns = [Turn("user", ("Q",)), Turn("assistant", ("A",))]
    labels = encoder.encode_text(turns).labels
    tokenizer = encoder.processor.tokenizer
    found = {int(labels[labels != IGNORE][-1]), tokenizer.eos_token_id}
    found |= {tokenizer.convert_tokens_to_ids(token) for token in END_TOKENS if token in tokenizer.get_vocab()}
    own = generation_config.eos_token_id
    found |= set(own) if isinstance(own, (list, tuple)) else {own}
    return frozenset(token for token in found if token is not None)


def build(
    config: MllamaConfig, weights: Iterable[tuple[str, Tensor]], device: torch.device, dtype: torch.dtype
) -> MllamaForConditionalGeneration:
    """The model with `weights` (names in memory), each on `device` and in `dtype` before the next is read.

    Raises UserError with every weight that is missing, unknown or of another shape.
    """
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    problems, missing = [], set(parameters)
    for name, tensor in weights:
        if name not in parameters or parameters[name].shape != tensor.shape:
            expected = str(list(parameters[name].shape)) if name in parameters else "no such parameter"
            problems.append(Problem(name, f"a tensor {list(tensor.shape)}", expected))
            continue
        _put(model, name, tensor.to(device=device, dtype=dtype))
        missing.discard(name)
    problems += [Problem(name, "no tensor", str(list(parameters[name].shape))) for name in sorted(missing)]
    if problems:
        raise UserError(problems)
    _fill_buffers(model, device)
    return model


def _put(model: torch.nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, torch.nn.Parameter(tensor, requires_grad=False))


def _fill_buffers(model: MllamaForConditionalGeneration, device: torch.device) -> None:
    """What no checkpoint holds: rotary frequencies, made anew in float32."""
    text = model.model.language_model
    text.rotary_emb = MllamaRotaryEmbedding(model.config.text_config, device=device)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not left, f"buffers without values: {left}"


def _check_vocabulary(model: MllamaForConditionalGeneration, encoder: SampleEncoder, processor: str) -> None:
    image_token, expected = encoder.image_token_id, model.config.text_config.vocab_size
    if image_token != expected:
        found = f"{processor}, whose image token has id {image_token}"
        raise UserError(
            Problem("processor", found, f"id {expected}, the first after the model's text tokens", "Name the right one")
        )


def _from_hf_folder(folder: Path, device: torch.device, dtype: torch.dtype | None) -> MllamaForConditionalGeneration:
    weights = HFFolder(folder)
    weights.check()
    config = MllamaConfig.from_dict(weights.config)
    model = build(config, weights.items(), device, dtype or weights.dtypes["lm_head.weight"])
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _from_checkpoint(
    folder: Path, device: torch.device, dtype: torch.dtype | None
) -> tuple[MllamaForConditionalGeneration, str]:
    checkpoint = NemoCheckpoint(folder)
    whole = merged(checkpoint)
    special = SpecialIds.of_tokenizer(AutoTokenizer.from_pretrained(checkpoint.processor))
    dtype = dtype or whole.dtype("language_model.output_layer.weight")
    values = hf_config(checkpoint.model_config, special, str(dtype).removeprefix("torch."), where=str(folder))
    model = build(MllamaConfig.from_dict(values), to_hf(whole, checkpoint.sizes), device, dtype)
    return model, checkpoint.processor
