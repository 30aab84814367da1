"""LoRA checkpoints: weights with the adapters added to them, and adapters as the folder that PEFT loads.

An adapter is two matrices beside a linear layer: weight + alpha / dim * linear_out @ linear_in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmsft.checkpoints.hf_folder import save_tensors
from vlmsft.checkpoints.nemo import Lora, NemoCheckpoint
from vlmsft.errors import Problem, UserError
from vlmsft.mllama.hf_mapping import RULES, Rule, Sizes, layer_numbers

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_IN, _OUT = ".adapter.linear_in.weight", ".adapter.linear_out.weight"


class Merged(Mapping[str, Tensor]):
    """The base's tensors with the adapters added, each when it is asked for; names, shapes and dtypes are the base's.

    Summed in fp32 and rounded once, to the base's dtype. What a LoRA run trained beside its adapters stands for the
    base's tensor.
    """

    def __init__(self, adapters: NemoCheckpoint):
        """Raises UserError where the base is missing or isn't what the adapters were trained on."""
        base = adapters.base
        assert base is not None  # or there is nothing to merge
        self.base, self.adapters = base, adapters
        self.scale = adapters.lora.scale
        self.sizes = base.sizes
        problems = list(_misfits(adapters, base))
        if problems:
            raise UserError(problems)

    def __getitem__(self, name: str) -> Tensor:
        if name in self.adapters:
            return self.adapters[name].to(self.base.dtype(name))
        weight = self.base[name]
        module = name.removesuffix(".weight")
        if module + _IN not in self.adapters:
            return weight
        return merge(weight, self.adapters[module + _IN], self.adapters[module + _OUT], self.scale)

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)

    def __contains__(self, name: object) -> bool:
        return name in self.base

    def shape(self, name: str) -> torch.Size:
        """Of a tensor, without reading it."""
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor, without reading it."""
        return self.base.dtype(name)

    @property
    def num_bytes(self) -> int:
        """Of all tensors together."""
        return self.base.num_bytes


def merged(checkpoint: NemoCheckpoint) -> NemoCheckpoint | Merged:
    """The weights of a whole model: the checkpoint itself, or base and adapters of a LoRA checkpoint."""
    return Merged(checkpoint) if checkpoint.is_adapter else checkpoint


def merge(weight: Tensor, linear_in: Tensor, linear_out: Tensor, scale: float) -> Tensor:
    """weight (outputs, inputs) + scale * linear_out (outputs, dim) @ linear_in (dim, inputs), in weight's dtype."""
    return torch.addmm(weight.float(), linear_out.float(), linear_in.float(), alpha=scale).to(weight.dtype)


def adapted_modules(checkpoint: NemoCheckpoint) -> list[str]:
    """Names of the linear layers that have an adapter."""
    return [name.removesuffix(_IN) for name in checkpoint if name.endswith(_IN)]


def _misfits(adapters: NemoCheckpoint, base: NemoCheckpoint) -> Iterator[Problem]:
    for name in adapters:
        if not name.endswith((_IN, _OUT)) and name not in base:
            yield Problem(f"{adapters.path}: {name}", "no such tensor in the base", f"a tensor of {base.path}")
    for module in adapted_modules(adapters):
        weight = f"{module}.weight"
        if weight not in base:
            yield Problem(f"{adapters.path}: {module}", "no such layer in the base", f"a layer of {base.path}")
            continue
        outputs, inputs = base.shape(weight)
        found = (adapters.shape(module + _OUT)[0], adapters.shape(module + _IN)[1])
        if found != (outputs, inputs):
            remedy = f"The base at {base.path} is another model than the one that the adapters were trained on"
            yield Problem(f"{adapters.path}: {module}", f"an adapter for {found}", f"{(outputs, inputs)}", remedy)


# ---------------------------------------------------------------------------------------------------------------- PEFT


def peft_tensors(checkpoint: NemoCheckpoint, sizes: Sizes) -> dict[str, Tensor]:
    """{name in PEFT's file: tensor}, exactly: an adapter of a fused layer becomes one for each of HF's layers.

    HF's layers share linear_in, and each takes its own rows of linear_out, chosen by the rule that splits the weight.
    Raises UserError for what a PEFT adapter can't hold.
    """
    whole = [name for name in checkpoint if not name.endswith((_IN, _OUT))]
    if whole:
        remedy = "format=merged holds it"
        found = f"{len(whole)} tensors trained beside the adapters, such as {whole[0]}"
        raise UserError(Problem(str(checkpoint.path), found, "adapters only", remedy))
    modules = set(adapted_modules(checkpoint))
    tensors: dict[str, Tensor] = {}
    for rule, hf_weights, module in _linear_layers(sizes):
        if module not in modules:
            continue
        linear_in, linear_out = checkpoint[module + _IN], checkpoint[module + _OUT]
        for weight, rows in zip(hf_weights, _rows(rule, sizes, linear_out), strict=True):
            layer = f"base_model.model.{weight.removesuffix('.weight')}"
            is_convolution = "patch_embedding" in weight
            # copies: safetensors wants each tensor to own its memory
            tensors[f"{layer}.lora_A.weight"] = _patch(sizes, linear_in) if is_convolution else linear_in.clone()
            tensors[f"{layer}.lora_B.weight"] = rows[..., None, None].clone() if is_convolution else rows.clone()
        modules.remove(module)
    assert not modules, modules  # each linear layer has a rule
    return tensors


def write_adapter(folder: Path, checkpoint: NemoCheckpoint, sizes: Sizes, base_model: str) -> None:
    """adapter_config.json and adapter_model.safetensors, for PeftModel.from_pretrained on the base's HF model.

    base_model: HF folder or hub id that the config names as the base
    """
    tensors = peft_tensors(checkpoint, sizes)
    save_tensors(folder / ADAPTER_WEIGHTS, tensors)
    layers = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors}
    config = adapter_config(checkpoint.lora, sorted(layers), base_model)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def adapter_config(lora: Lora, layers: list[str], base_model: str) -> dict[str, Any]:
    """PEFT's config; `layers` by their full names, so that no other layer of the same last name is taken."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.dim,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": layers,
        "bias": "none",
        "inference_mode": True,
    }


def _linear_layers(sizes: Sizes) -> Iterator[tuple[Rule, list[str], str]]:
    """(rule, HF's weight names, our module) of each weight."""
    for rule in RULES:
        if len(rule.ours) != 1 or not rule.ours[0].endswith(".weight"):
            continue
        for hf_number, our_number in layer_numbers(rule.layers, sizes):
            names = [name.format(hf_number) for name in rule.hf]
            yield rule, names, rule.ours[0].format(our_number).removesuffix(".weight")


def _rows(rule: Rule, sizes: Sizes, linear_out: Tensor) -> tuple[Tensor, ...]:
    """linear_out's rows for each of HF's layers; the patch embedding's rule reshapes columns, which it has none of."""
    return (linear_out,) if "conv1" in rule.ours[0] else rule.to_hf(sizes, (linear_out,))


def _patch(sizes: Sizes, linear_in: Tensor) -> Tensor:
    return linear_in.unflatten(1, (-1, sizes.patch_size, sizes.patch_size)).clone()
