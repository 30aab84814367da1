"""Frozen matrices in fp8 (e4m3, 4 bits of precision), which a GPU of compute capability 8.9 or more multiplies nearly
twice as fast as bf16: the tower's, whose passes have no gradient, or the text decoder's as well.

Both factors of a product are rounded to e4m3 with a scale for each row of the activations and each output of the
matrix; sums and results are what they were. The activations' scales are those of the rows at hand, the matrices are
rounded once. Their bf16 originals stay where they are: checkpoints, exports and merged adapters see no difference.
A frozen matrix has no gradient of its own; what passes through it backwards is rounded as activations are (`project`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmsft.errors import Problem, UserError, nearest
from vlmsft.mllama.sizes import FP8_MULTIPLE, FP8_PARTS

KEY = "model.config.frozen_fp8"
E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
# What a row that holds nothing larger is divided by. It over LARGEST and LARGEST over it are normal numbers of fp32;
# no gradient is as small, neither of a mean over many tokens nor times the scale of an output
SMALLEST_ROW = 2.0**-116
CAPABILITY = (8, 9)
MATRICES = {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "linear_q", "linear_kv"}

Rounded = tuple[Tensor, Tensor]
"""(N, K) in e4m3, and (N, 1) in fp32 that gives the numbers back when multiplied."""


def quantise(rows: Tensor) -> Rounded:
    """(N, K) of any precision."""
    largest = rows.abs().amax(dim=-1, keepdim=True).float().clamp(min=SMALLEST_ROW)
    # the product may come out just above what e4m3 holds, which would become NaN
    return (rows.float() * (LARGEST / largest)).clamp(-LARGEST, LARGEST).to(E4M3), largest / LARGEST


def multiply(rows: Rounded, matrix: Rounded) -> Tensor:
    """(N, in), (out, in) -> (N, out) in bf16, the only thing that a GPU's product with a scale for each row gives.

    Fast accumulation, which keeps fewer bits of a part of each sum, is 10 to 20 % faster and as far from fp32: 0.0374
    either way, for random factors on an H100.
    """
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        rows[0], matrix[0].t(), rows[1], matrix[1].t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )


def project(x: Tensor, matrix: Rounded) -> Tensor:
    """(N, in), (out, in) -> (N, out) in x's precision, with a gradient of x; torch.compile sees through it."""
    return _Project.apply(x, *matrix)  # pyright: ignore[reportReturnType]


class _Project(torch.autograd.Function):
    """Backwards the same rounded numbers of the matrix, and the gradient's rows rounded anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(numbers, scale)
        y = multiply(quantise(x.contiguous()), (numbers, scale))
        # not `.to` at once: behind one that changes nothing, torch 2.11 compiles a gradient of zero
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        numbers, scale = ctx.saved_tensors
        # an output's scale can't leave the sum over outputs: the rows take it
        rows = quantise(gradient.contiguous().float() * scale.t())
        return multiply_back(*rows, numbers).to(gradient.dtype), None, None


_SCHEMA = "(Tensor rows, Tensor scale, Tensor numbers) -> Tensor"


@torch.library.custom_op("vlmsft::multiply_back", mutates_args=(), schema=_SCHEMA)
def multiply_back(rows: Tensor, scale: Tensor, numbers: Tensor) -> Tensor:
    """(N, out) in e4m3, their (N, 1) scales, (out, in) in e4m3 -> (N, in) in bf16.

    A GPU sums along contiguous numbers only, so that those of the matrix are copied transposed: a byte read and written
    for each, of which the text decoder of 11B has 8.7e9. One operation, since torch.compile would make the copies,
    which depend on nothing else, in the forward pass, and keep all 8.1 GiB of them for the backward pass.
    """
    ones = torch.ones(numbers.shape[1], 1, device=scale.device)
    return multiply((rows, scale), (_transposed(numbers), ones))


@multiply_back.register_fake
def _(rows: Tensor, scale: Tensor, numbers: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], numbers.shape[1], dtype=torch.bfloat16)


def _transposed(numbers: Tensor) -> Tensor:
    if not numbers.is_cuda:
        return numbers.t().contiguous()
    # here, since torch for a CPU comes without Triton
    from vlmsft.mllama.fp8_kernels import transpose

    return transpose(numbers)


class FrozenMatrices:
    """Keeps a `quantised` (Rounded) beside matrices: of the tower's layers, as long as nothing of the tower trains or
    has an adapter; of the text decoder's layers with which=all, each as long as it doesn't train itself.

    An attribute of the module that owns the matrix, which no state dict and no export has.
    """

    def __init__(self, which: str, tower: nn.Module, decoder: nn.Module):
        """which: of FP8_PARTS. Raises UserError for a matrix whose sizes fp8 products don't take."""
        self._tower = tower
        self._of_tower = _linears(tower)
        self._of_decoder = _linears(decoder) if which == "all" else []
        for module in (*self._of_tower, *self._of_decoder):
            if any(size % FP8_MULTIPLE for size in module.weight.shape):
                sizes = " x ".join(str(size) for size in module.weight.shape)
                raise UserError(
                    Problem(KEY, f"{which}, and a matrix of {sizes}", f"sizes that are multiples of {FP8_MULTIPLE}")
                )
            module.quantised = module.quantised_from = None

    def update(self) -> None:
        """To be called before each forward: matrices that changed since are rounded anew.

        A change is noticed by the weight's place and by torch's count of what was written to it; what is written to
        `weight.data` goes unnoticed.
        """
        frozen = not any(p.requires_grad or ".adapter." in name for name, p in self._tower.named_parameters())
        for module in self._of_tower:
            _round(module, frozen)
        for module in self._of_decoder:
            _round(module, not module.weight.requires_grad)


def _linears(part: nn.Module) -> list[Any]:
    """Those that own a matrix of the part's layers, out of their adapters."""
    named = (module for name, module in part.named_modules() if name.rpartition(".")[2] in MATRICES)
    return [getattr(module, "to_wrap", module) for module in named]


def _round(module: Any, frozen: bool) -> None:
    weight = module.weight
    now = (weight.data_ptr(), weight._version) if frozen else None
    if now != module.quantised_from:
        with torch.inference_mode(False):  # what a validation rounds, a backward pass uses
            module.quantised = quantise(weight.detach()) if frozen else None
        module.quantised_from = now


def require_possible(which: str, tensor_model_parallel_size: int = 1) -> None:
    """Raises UserError where `which` is none of FP8_PARTS, for matrices that are split, and where the GPU that a model
    is built on has no fp8 products. A CPU has them, slow as they are."""
    if which not in FP8_PARTS:
        raise UserError(Problem(KEY, repr(which), f"{', '.join(FP8_PARTS)} or null", nearest(str(which), FP8_PARTS)))
    if tensor_model_parallel_size > 1:
        found = f"{which} with tensor_model_parallel_size {tensor_model_parallel_size}"
        raise UserError(Problem(KEY, found, "null, or tensor_model_parallel_size 1"))
    if not torch.cuda.is_available():
        return
    found = torch.cuda.get_device_capability()
    if found < CAPABILITY:
        name = f"{torch.cuda.get_device_name()} with compute capability {found[0]}.{found[1]}"
        expected = f"a GPU of {CAPABILITY[0]}.{CAPABILITY[1]} or more, or null"
        raise UserError(Problem(KEY, f"{which} on {name}", expected))
