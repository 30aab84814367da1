"""Losses and gradients of a model, and how far they are from another's: helpers of test_bf16.py and test_gpu.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """losses: of each label, in fp32; gradients: of their mean by all trainable parameters, one vector, in fp32"""

    losses: Tensor
    gradients: Tensor


@dataclass(frozen=True)
class Apart:
    """losses: root of the mean square of the differences; gradients: norm of the difference / norm of the exact ones"""

    losses: float
    gradients: float


def precision(dtype: torch.dtype) -> dict:
    return {"params_dtype": dtype, "bf16": dtype is torch.bfloat16, "autocast_dtype": dtype}


def outcome(model: torch.nn.Module, inputs: dict, labels: Tensor) -> Outcome:
    """inputs: without labels, which are (B, S) with -100 where there is none; the model's gradients are left empty"""
    model.zero_grad()
    losses = model(**inputs, labels=labels).float()[labels != -100]
    losses.mean().backward()
    trained = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
    gradients = torch.cat([p.grad.float().flatten() for _, p in trained])
    model.zero_grad()
    return Outcome(losses.detach(), gradients)


def apart(found: Outcome, exact: Outcome) -> Apart:
    losses = (found.losses - exact.losses).square().mean().sqrt()
    return Apart(float(losses), float((found.gradients - exact.gradients).norm() / exact.gradients.norm()))


def assert_equally_far(stock: Apart, ours: Apart, others: Apart) -> None:
    """Stock and ours in bf16 from fp32, each within twice the other; fp32 with other images much farther."""
    for of in ("losses", "gradients"):
        of_stock, of_ours, of_others = (getattr(found, of) for found in (stock, ours, others))
        assert of_ours < 2 * of_stock, of
        assert of_stock < 2 * of_ours, of
        assert of_others > 10 * max(of_stock, of_ours), of
