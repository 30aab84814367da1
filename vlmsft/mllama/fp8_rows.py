"""What makes the activations of a frozen tower and rounds them to fp8, each in one pass over the rows.

A Triton kernel on a GPU, torch's functions elsewhere. torch.compile's kernels of the latter take two to four times as
long at the tower's widths (on an H100, torch 2.11: docs/one_gpu.md).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from vlmsft.mllama.fp8 import Rounded, quantise


class Norm(NamedTuple):
    """A layer norm's parameters."""

    weight: Tensor
    bias: Tensor
    eps: float


def norm_quantise(rows: Tensor, norm: Norm) -> Rounded:
    """(N, H), normalised and rounded."""
    if _has_kernel(rows):
        return _kernel(rows, norm=norm)[0]
    return quantise(_layer_norm(rows, norm))


def add_norm_quantise(rows: Tensor, branch: Tensor, gate: Tensor | None, norm: Norm) -> tuple[Rounded, Tensor]:
    """rows + gate.tanh() * branch, (N, H) all: normalised and rounded, and as it is."""
    factor = None if gate is None else gate.tanh()
    if _has_kernel(rows):
        return _kernel(rows, branch=branch, factor=factor, norm=norm)
    summed = (rows.float() + (branch if factor is None else factor.float() * branch.float())).to(rows.dtype)
    return quantise(_layer_norm(summed, norm)), summed


def gelu_quantise(rows: Tensor, bias: Tensor, tanh: bool) -> Rounded:
    """GELU of rows + bias, rounded; tanh: the approximation."""
    approximate = "tanh" if tanh else "none"
    if _has_kernel(rows):
        return _kernel(rows, gelu_bias=bias, gelu=approximate)[0]
    return quantise(F.gelu(rows.float() + bias.float(), approximate=approximate))


def quantise_rows(rows: Tensor) -> Rounded:
    return _kernel(rows)[0] if _has_kernel(rows) else quantise(rows)


def _layer_norm(rows: Tensor, norm: Norm) -> Tensor:
    return F.layer_norm(rows.float(), norm.weight.shape, norm.weight.float(), norm.bias.float(), norm.eps)


def _has_kernel(rows: Tensor) -> bool:
    return rows.is_cuda


def _kernel(rows: Tensor, **what: Any) -> tuple[Rounded, Tensor]:
    # here, since torch for a CPU comes without Triton
    from vlmsft.mllama.fp8_kernels import run

    return run(rows, **what)
