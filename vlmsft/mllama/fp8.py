"""The frozen tower's matrices in fp8 (e4m3, 4 bits of precision), which a GPU of compute capability 8.9 or more
multiplies nearly twice as fast as bf16.

Both factors of a product are rounded to e4m3 with a scale for each row of the activations and each output of the
matrix; sums and results are what they were. The activations' scales are those of the rows at hand, the matrices are
rounded once. Their bf16 originals stay where they are: checkpoints, exports and merged adapters see no difference.
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
MATRICES = {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}


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


class FrozenMatrices:
    """Keeps a `quantised` (Rounded) beside each matrix of the tower's layers, as long as nothing of the tower trains or
    has an adapter.

    An attribute of the module that owns the matrix, which no state dict and no export has.
    """

    def __init__(self, tower: nn.Module):
        """Raises UserError for a matrix whose sizes fp8 products don't take."""
        self._tower = tower
        named = (module for name, module in tower.named_modules() if name.rpartition(".")[2] in MATRICES)
        self._linears: list[Any] = [getattr(module, "to_wrap", module) for module in named]
        for module in self._linears:
            if any(size % FP8_MULTIPLE for size in module.weight.shape):
                sizes = " x ".join(str(size) for size in module.weight.shape)
                raise UserError(
                    Problem(KEY, f"tower, and a matrix of {sizes}", f"sizes that are multiples of {FP8_MULTIPLE}")
                )
            module.quantised = module.quantised_from = None

    def update(self) -> None:
        """To be called before each forward: matrices that changed since are rounded anew.

        A change is noticed by the weight's place and by torch's count of what was written to it; what is written to
        `weight.data` goes unnoticed.
        """
        frozen = not any(p.requires_grad or ".adapter." in name for name, p in self._tower.named_parameters())
        for module in self._linears:
            weight = module.weight
            now = (weight.data_ptr(), weight._version) if frozen else None
            if now != module.quantised_from:
                module.quantised = quantise(weight.detach()) if frozen else None
                module.quantised_from = now


def require_possible(which: str) -> None:
    """Raises UserError where `which` is none of FP8_PARTS, and where the GPU that a model is built on has no fp8
    products. A CPU has them, slow as they are."""
    if which not in FP8_PARTS:
        raise UserError(Problem(KEY, repr(which), f"{', '.join(FP8_PARTS)} or null", nearest(str(which), FP8_PARTS)))
    if not torch.cuda.is_available():
        return
    found = torch.cuda.get_device_capability()
    if found < CAPABILITY:
        name = f"{torch.cuda.get_device_name()} with compute capability {found[0]}.{found[1]}"
        expected = f"a GPU of {CAPABILITY[0]}.{CAPABILITY[1]} or more, or null"
        raise UserError(Problem(KEY, f"{which} on {name}", expected))
