"""Numerics beside NeMo's stock model: losses and LoRA gradients in bf16, each against fp32 on the same weights."""

from __future__ import annotations

import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from memory_model import add_lora, set_up
from omegaconf import DictConfig
from torch import Tensor
from train_gpu_cases import MAIN, TEXT, TOWER, Case, Phase, Samples, compose, free_memory, peak_gib

NUM_TILES = (2, 1, 4, 3)  # of the samples' images
TEXT_TOKENS = 128
EXACT, OTHER = "fp32", "fp32, other images"
PLAIN = {"layers": "torch", "lean_forward": False}  # Megatron's classes on torch's matrices, which don't round to TF32
WITHOUT_DROPOUT = "peft.dropout=0.0"
Write = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Outcome:
    """Mean loss of the labels, the loss of each, and the gradients of LoRA's matrices as one vector; on the host."""

    loss: float
    losses: Tensor
    gradients: Tensor


def compare(write: Write, on_gpu: bool) -> None:
    """The whole model, one after the other: NeMo's stock classes in bf16; vlmsft's in bf16 as it trains; with the
    tower's matrices in fp8, and with the text decoder's as well; in fp32 with torch's layers; that with other images.
    Weights are drawn anew for each, by their names, and rounded to bf16. What fails is left out."""
    set_up(on_gpu)
    cfg = compose(MAIN[-1], on_gpu, WITHOUT_DROPOUT, *([] if on_gpu else tiny_overrides()))
    sizes = cfg.model.config
    side, low = sizes[TOWER].vision_chunk_size, torch.bfloat16
    samples = Samples.random(NUM_TILES, TEXT_TOKENS, sizes[TEXT].vocab_size, side, seed=0)
    others = samples.with_other_images(seed=1)
    exactly = {**precision(torch.float32), **PLAIN}
    models = (
        (lambda: build_stock(cfg, low, on_gpu), stock_inputs, {"NeMo's stock model, bf16": samples}),
        (lambda: build_ours(cfg, on_gpu, **precision(low)), ours_inputs, {"vlmsft, bf16": samples}),
        (
            lambda: build_ours(cfg, on_gpu, **precision(low), frozen_fp8="tower"),
            ours_inputs,
            {"vlmsft, bf16, the tower in fp8": samples},
        ),
        (
            lambda: build_ours(cfg, on_gpu, **precision(low), frozen_fp8="all"),
            ours_inputs,
            {"vlmsft, bf16, tower and text in fp8": samples},
        ),
        (lambda: build_ours(cfg, on_gpu, **exactly), ours_inputs, {EXACT: samples, OTHER: others}),
    )
    found: dict[str, Outcome] = {}
    for build, inputs_of, cases in models:
        try:
            with built(build, cfg, on_gpu) as model:
                for name, batch in cases.items():
                    found[name] = outcome_of(model, inputs_of(batch), batch)
                    print(f"{name}: loss {found[name].loss}, peak {peak_gib(on_gpu)} GiB", flush=True)
        except Exception:  # whatever stops one model tells nothing about the others
            traceback.print_exc()
        free_memory(on_gpu)
    for name, outcome in found.items():
        write(line(name, outcome, found.get(EXACT)))


def line(name: str, found: Outcome, exact: Outcome | None) -> dict[str, Any]:
    """Differences from `exact`: of the mean loss; of the labels' losses, root of the mean square; of the gradients,
    norm of the difference / norm."""
    differences = {"loss_difference": None, "label_difference": None, "gradient_difference": None}
    if exact is not None and exact is not found:
        differences = {
            "loss_difference": abs(found.loss - exact.loss),
            "label_difference": float((found.losses - exact.losses).square().mean().sqrt()),
            "gradient_difference": float((found.gradients - exact.gradients).norm() / exact.gradients.norm()),
        }
    return {"model": name, "loss": found.loss, **differences}


# --- models -----------------------------------------------------------------------------------------------------------


@contextmanager
def built(build: Callable[[], Any], cfg: DictConfig, on_gpu: bool) -> Iterator[Any]:
    """With LoRA, weights drawn; gone at the end, which the caller's `model` must not outlive."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    model = build()
    add_lora(model, cfg.peft)
    model.to("cuda" if on_gpu else "cpu").train()
    draw_weights(model)
    try:
        yield model
    finally:
        model.to("meta")  # whoever still refers to it
        for module in model.modules():
            vars(module).pop("quantised", None)  # no parameter, so it stayed
        free_memory(on_gpu)


def precision(dtype: torch.dtype) -> dict[str, Any]:
    return {"params_dtype": dtype, "bf16": dtype is torch.bfloat16, "autocast_dtype": dtype}


def build_ours(cfg: DictConfig, on_gpu: bool, **settings: Any) -> Any:
    import fiddle as fdl

    from vlmsft.recipe import translate

    config: Any = fdl.build(translate(cfg.model.config))
    for name, value in {**settings, "use_cpu_initialization": not on_gpu}.items():
        setattr(config, name, value)
    return config.configure_model()


def build_stock(cfg: DictConfig, dtype: torch.dtype, on_gpu: bool) -> Any:
    """NeMo's classes with the sizes of its recipe; without a GPU the tests' substitutes for TransformerEngine's."""
    if not on_gpu:
        return build_stock_on_cpu(dtype)
    from nemo.collections.vlm.mllama.model import base

    class Tokenizer:
        vocab_size = cfg.model.config[TEXT].vocab_size

    common = precision(dtype)
    text, vision = (
        base.CrossAttentionTextConfig(**common),
        base.CrossAttentionVisionConfig(vision_chunk_size=560, **common),
    )
    config = base.MLlamaModelConfig(language_model_config=text, vision_model_config=vision, **common)
    return config.configure_model(Tokenizer())


def build_stock_on_cpu(dtype: torch.dtype) -> Any:
    find_tests()
    import mllama_cases
    import mllama_stock
    import pytest

    from vlmsft.mllama.layers import find_norm_linears, layer_kit, tell_wrapped_norms

    layer_kit("torch")  # lets NeMo's LoRA work without TransformerEngine
    torch._dynamo.config.disable = True
    parts = ({**part, **precision(dtype)} for part in (mllama_cases.TEXT, mllama_cases.VISION))
    model = mllama_stock.build_stock(*parts, pytest.MonkeyPatch()).to(dtype)
    norms = find_norm_linears(model)  # LoRA takes their output; TransformerEngine's linears hand it out by themselves
    model.register_forward_pre_hook(lambda *_: tell_wrapped_norms(norms))
    return model


def find_tests() -> None:
    """The tests' tiny model can be imported then."""
    tests = str(Path(__file__).resolve().parents[1] / "tests" / "mllama")
    if tests not in sys.path:
        sys.path.append(tests)


def tiny_overrides() -> list[str]:
    """The sizes of the tests' tiny model, of which there is a stock one on the CPU."""
    find_tests()
    from mllama_cases import TEXT as text
    from mllama_cases import VISION as vision

    parts = ((TEXT, text), (TOWER, {**vision, "patch_size": 14}))
    return [f"model.config.{part}.{name}={value}" for part, sizes in parts for name, value in sizes.items()]


@torch.no_grad()
def draw_weights(model: torch.nn.Module) -> None:
    """Of each parameter by its name, so that every class of model gets the same: matrices of 1 / sqrt(inputs); what
    adds to the residual stream and an adapter's second matrix smaller; gates from 0.2 to 0.8.

    An adapter's output is multiplied by alpha / dim, 4 here. With a second matrix of 1 / sqrt(inputs) it drowns the
    layer's own queries and keys: their products have a standard deviation of 17, attention takes the largest one, and
    bf16 decides which that is. Measured on a CPU, as many layers 128 wide: labels' losses in bf16 were as far from
    fp32's (0.84) as with other images (0.84), gradients 1.07. As it is: 0.018, 0.30 and 0.02.
    """
    for name, parameter in model.named_parameters():
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))

        def normal(std: float, mean: float, parameter: Tensor = parameter, generator=generator) -> Tensor:
            return torch.randn(parameter.shape, generator=generator, device=parameter.device) * std + mean

        last = name.rsplit(".", 1)[-1]
        if "gate" in last:
            values = 0.2 + 0.6 * torch.rand(parameter.shape, generator=generator, device=parameter.device)
        elif "norm" in name or "ln_p" in name:
            values = normal(0.1, 0.0 if last.endswith("bias") else 1.0)
        elif parameter.ndim == 1:
            values = normal(0.1, 0.0)
        elif "embed" in name:
            values = normal(0.5, 0.0)
        else:
            values = normal(matrix_scale(name) / parameter.shape[1] ** 0.5, 0.0)
        parameter.copy_(values.to(torch.bfloat16))


def matrix_scale(name: str) -> float:
    if "adapter.linear_out" in name:
        return 0.1
    return 0.3 if "linear_proj.weight" in name or "linear_fc2.weight" in name else 1.0


# --- inputs and outcomes ----------------------------------------------------------------------------------------------


def ours_inputs(samples: Samples) -> dict[str, Any]:
    from vlmsft.mllama.step import data_step

    batch = data_step(iter([samples.for_vlmsft()]))
    names = {"loss_mask", "num_text_tokens", "num_truncated_tokens", "data_wait_seconds"}
    return {name: value for name, value in batch.items() if name not in names}


def stock_inputs(samples: Samples) -> dict[str, Any]:
    """What NeMo's mllama_data_step and mllama_forward_step make of the batch."""
    from nemo.collections.vlm.mllama.model.base import mllama_data_step, mllama_forward_step

    kept: dict[str, Any] = {}

    def keep(**inputs: Any) -> None:
        kept.update(inputs)

    mllama_forward_step(keep, mllama_data_step(iter([samples.for_nemo()])))
    return kept


def outcome_of(model: Any, inputs: dict[str, Any], samples: Samples) -> Outcome:
    mask = samples.text_part()["loss_mask"].to(inputs["tokens"].device)
    model.zero_grad()
    losses = model(**inputs).float()
    loss = (losses * mask).sum() / mask.sum()
    loss.backward()
    adapters = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
    gradients = torch.cat([p.grad.float().flatten().cpu() for _, p in adapters])
    found = Outcome(float(loss), losses.detach()[mask > 0].cpu(), gradients)
    model.zero_grad()
    return found


# --- NeMo without a GPU -----------------------------------------------------------------------------------------------


def check_nemo(case: Case, write: Write) -> None:
    """Makes NeMo's recipe without running it, and hands its batch of the case's shapes to NeMo's stock model."""
    import fiddle as fdl
    import nemo_run as run
    import train_gpu_nemo

    set_up(on_gpu=False)
    cfg = compose(case, False, *tiny_overrides())
    with tempfile.TemporaryDirectory() as folder:
        recipe = train_gpu_nemo.nemo_recipe(case, folder, on_gpu=False)
        prepared = train_gpu_nemo.Prepared(case, cfg, on_gpu=False)
        recipe.data = run.Config(train_gpu_nemo.PreparedData, prepared=prepared)
        recipe.trainer.max_steps = 1
        recipe.trainer.accelerator = "cpu"
        fdl.build(recipe)
    model = build_stock(cfg, torch.float32, on_gpu=False)
    for phase in case.phases:
        write({"system": "nemo", **asdict(phase), **stock_loss(model, prepared, phase)})


def stock_loss(model: Any, prepared: Any, phase: Phase) -> dict[str, Any]:
    from nemo.collections.vlm.mllama.model.base import mllama_data_step, mllama_forward_step

    prepared.turn_to(phase)
    batch = mllama_data_step(iter(prepared))
    losses = mllama_forward_step(model, batch)
    loss = (losses * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
    loss.backward()
    empty = {"build_gib": None, "note": "", "tflop_per_sample": 1.0}
    return {"outcome": "stock model on a CPU", "loss": float(loss), **empty}
