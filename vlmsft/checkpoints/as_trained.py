"""python -m vlmsft.checkpoints.as_trained CHECKPOINT FOLDER: a checkpoint's logits, computed by the model that trained.

The export gate's other side. It shares nothing with the export: the model is NeMo's and vlmsft's, its config is read
by NeMo, LoRA adapters stay beside the weights, and no name goes through hf_mapping. A process of its own, as it
turns this process's Megatron to the CPU; needs NeMo, which takes most of the time for a small model.

FOLDER/batches.pt holds the micro batches, FOLDER/logits.pt gets {"logits": [...], "approximate": [...]}: for each batch
(B, S, vocabulary) fp32. `approximate` has the tower's GELU approximated by tanh, as training on a GPU computes it; the
other logits have the exact one, as Hugging Face.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def main(checkpoint: Path, folder: Path) -> None:
    from vlmsft.runtime import cpu

    torch._dynamo.config.disable = True  # a few forwards only: compiling would take longer than they do
    cpu.activate()
    _start_megatron(folder)
    batches = torch.load(folder / "batches.pt")
    model = build(checkpoint)
    found: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for name, approximate in (("logits", False), ("approximate", True)):
            _set_gelu(model, approximate)
            found[name] = [model(**batch).float() for batch in batches]
    torch.save(found, folder / "logits.pt")


def build(checkpoint: Path) -> Any:
    """The checkpoint's MLlamaBase in evaluation mode, in the dtype of its weights, which are held once."""
    from vlmsft.checkpoints.nemo import NemoCheckpoint

    weights = NemoCheckpoint(checkpoint)
    base = weights.base or weights
    trained = _load_context(checkpoint)
    dtype = base.dtype("language_model.output_layer.weight")
    model = _empty_model(_load_context(base.path).config, dtype)
    if weights.is_adapter:
        model.walk(trained.model_transform.transform)
    state = {_name(name): p for name, p in model.module.named_parameters()}
    sources = {**dict.fromkeys(base, base), **dict.fromkeys(weights, weights)}
    if state.keys() != sources.keys():
        raise ValueError(f"model and checkpoint differ in {sorted(state.keys() ^ sources.keys())[:5]}")
    with torch.no_grad():
        for name, p in state.items():
            p.copy_(sources[name][name])
    return model.module.eval()


def _name(parameter: str) -> str:
    """Without the wrapper that LoRA puts round a layer."""
    return parameter.replace(".to_wrap.", ".")


def _load_context(checkpoint: Path) -> Any:
    from nemo.lightning.io import load_context

    return load_context(checkpoint / "context", subpath="model")


def _empty_model(found: Any, dtype: torch.dtype) -> Any:
    """An MLlamaModel with memory, but no values, for the weights of a config of ours or of NeMo's own."""
    from vlmsft.mllama.config import MLlamaConfig, TextConfig, VisionConfig
    from vlmsft.mllama.model import MLlamaModel

    settings = {
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "tensor_model_parallel_size": 1,
        "sequence_parallel": False,
    }
    text = _again(TextConfig, found.language_model_config, settings)
    vision = _again(VisionConfig, found.vision_model_config, settings)
    config = MLlamaConfig(layers="torch", language_model_config=text, vision_model_config=vision, **settings)
    model = MLlamaModel(config)
    model.configure_model()
    return model


def _again(cls: type, found: Any, settings: dict[str, Any]) -> Any:
    values = {
        field.name: getattr(found, field.name) for field in fields(cls) if field.init and hasattr(found, field.name)
    }
    return cls(**{**values, **settings})


def _set_gelu(model: Any, approximate: bool) -> None:
    for module in model.vision_model.modules():
        if hasattr(getattr(module, "config", None), "bias_activation_fusion"):
            module.config.bias_activation_fusion = approximate


def _start_megatron(folder: Path) -> None:
    from megatron.core import parallel_state, tensor_parallel

    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
