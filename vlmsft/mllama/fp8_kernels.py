"""For a GPU, Triton kernels: fp8_rows' functions as one, and a copy of a rounded matrix transposed."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmsft.mllama.fp8 import E4M3, LARGEST, SMALLEST_ROW, Rounded

NUM_WARPS = 4  # measured against 8 on an H100
TILE = 128  # of the transposed copy: as many bytes of a row or a column as a GPU reads at once


@triton.jit
def _row_kernel(
    rows_at,
    branch_at,
    factor_at,
    weight_at,
    bias_at,
    summed_at,
    rounded_at,
    scale_at,
    width,
    eps,
    ADDS: tl.constexpr,
    FACTOR: tl.constexpr,
    NORM: tl.constexpr,
    GELU: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: x = rows (+ factor * branch); x normalised; GELU of x + bias; x rounded. All but the last if
    the constants say so; sums in fp32."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row.to(tl.int64) * width + column
    x = tl.load(rows_at + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        branch = tl.load(branch_at + at, mask=inside, other=0.0).to(tl.float32)
        if FACTOR:
            branch = branch * tl.load(factor_at).to(tl.float32)
        summed = (x + branch).to(summed_at.dtype.element_ty)
        tl.store(summed_at + at, summed, mask=inside)
        x = summed.to(tl.float32)
    if NORM:
        apart = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
        x = apart * tl.rsqrt(tl.sum(apart * apart, 0) / width + eps)
        x = x * tl.load(weight_at + column, mask=inside, other=0.0).to(tl.float32)
        x = x + tl.load(bias_at + column, mask=inside, other=0.0).to(tl.float32)
    if GELU != "":
        x = x + tl.load(bias_at + column, mask=inside, other=0.0).to(tl.float32)
    if GELU == "tanh":  # (1 + tanh(y)) / 2 = sigmoid(2 y); 1.5957691 = 2 * sqrt(2 / pi)
        x = x * tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))
    if GELU == "none":  # 0.7071068 = sqrt(1 / 2)
        x = 0.5 * x * (1 + tl.erf(0.7071067811865476 * x))
    largest = tl.maximum(tl.max(tl.abs(x), 0), SMALLEST_ROW)
    tl.store(scale_at + row, largest / LARGEST)
    x = tl.clamp(x * (LARGEST / largest), -LARGEST, LARGEST)
    tl.store(rounded_at + at, x.to(rounded_at.dtype.element_ty), mask=inside)


def run(
    rows: Tensor,
    *,
    branch: Tensor | None = None,
    factor: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    gelu_bias: Tensor | None = None,
    gelu: str = "",
) -> tuple[Rounded, Tensor]:
    """The rounded rows and, with a branch, the sum (else rows); see fp8_rows."""
    assert rows.is_contiguous() and (branch is None or branch.is_contiguous())
    number, width = rows.shape
    rounded = torch.empty(rows.shape, dtype=E4M3, device=rows.device)
    scale = torch.empty(number, 1, dtype=torch.float32, device=rows.device)
    summed = rows if branch is None else torch.empty_like(rows)
    weight, bias, eps = norm or (rows, gelu_bias, 0.0)
    # what a kernel doesn't read it gets some pointer for
    given = [rows if tensor is None else tensor for tensor in (branch, factor, weight, bias)]
    start: Any = _row_kernel[(number,)]
    start(
        rows,
        *given,
        summed,
        rounded,
        scale,
        width,
        eps,
        ADDS=branch is not None,
        FACTOR=factor is not None,
        NORM=norm is not None,
        GELU=gelu,
        LARGEST=LARGEST,
        SMALLEST_ROW=SMALLEST_ROW,
        BLOCK=triton.next_power_of_2(width),
        num_warps=NUM_WARPS,
    )
    return (rounded, scale), summed


@triton.jit
def _transpose_kernel(from_at, to_at, height, width, TILE: tl.constexpr):
    """One program a tile; torch's own copy moves single bytes, those of a column far apart."""
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (row < height)[:, None] & (column < width)[None, :]
    tile = tl.load(from_at + row[:, None] * width + column[None, :], mask=inside, other=0)
    inside = (column < width)[:, None] & (row < height)[None, :]
    tl.store(to_at + column[:, None] * height + row[None, :], tl.trans(tile), mask=inside)


def transpose(numbers: Tensor) -> Tensor:
    """(out, in) of one byte each -> (in, out), contiguous."""
    assert numbers.is_contiguous() and numbers.element_size() == 1
    height, width = numbers.shape
    turned = torch.empty(width, height, dtype=numbers.dtype, device=numbers.device)
    start: Any = _transpose_kernel[(triton.cdiv(height, TILE), triton.cdiv(width, TILE))]
    start(numbers.view(torch.uint8), turned.view(torch.uint8), height, width, TILE=TILE, num_warps=8)
    return turned
