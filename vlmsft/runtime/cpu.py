"""Megatron on a machine without a GPU.

NeMo 2.0 and Megatron-Core name CUDA in a few dozen places: `device="cuda"`, `torch.cuda.current_device()`, streams,
`tensor.type() == "torch.cuda.FloatTensor"`. `activate()` answers all of them with the CPU, so that the same trainer,
DDP, optimizer and checkpoints that run on a GPU run here too, in fp32 and over gloo. `strategy=cpu` is the only thing
that imports this module; a process that has activated it can't go back, and must not use a GPU.

The price: every torch call passes through a Python hook (about 10 % of a step of the tiny model, more on larger ones).
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from nemo import lightning as nl
from torch.optim.adam import adam
from torch.overrides import TorchFunctionMode

from vlmsft.runtime.seed import seed_all

CPU = torch.device("cpu")


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites CUDA devices in calls, and names fp32 CPU tensors as Megatron's optimizer expects them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(args[0]).replace("torch.", "torch.cuda.")
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


class _NoStream:
    """Stands for a CUDA stream where there is only one order of execution."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class CpuAdam(torch.optim.Optimizer):
    """torch's Adam that counts its steps per parameter group, as the fused Adams do that Megatron is written for.

    torch.optim.Adam keeps a `step` beside each parameter's moments, which Megatron-Core 0.15.3 saves but can't load: it
    asks an optimizer without state for the step (an AssertionError), looks for `step` among the saved moments (a
    KeyError), and gives all parameters one and the same `step` tensor, which then counts as many times too fast.
    With the step in the group, Megatron takes the path that every GPU run takes, and both checkpoint formats work.

    adam_w_mode: decoupled weight decay; its name and default are TransformerEngine's and Apex's
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool = True,
        store_param_remainders: bool = False,  # of bf16 weights; Megatron passes it to a new TransformerEngine's
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            adam(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.tensor(group["step"] - 1.0) for _ in params],  # adam counts them up
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                decoupled_weight_decay=self.adam_w_mode,
            )


def _patch_torch_cuda() -> None:
    # also where there is a GPU: nothing of this run goes there, and no library takes its kernels
    torch.cuda.is_available = lambda: False
    torch.cuda.device_count = lambda: 0
    torch.cuda.current_device = lambda: CPU
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.empty_cache = lambda: None
    torch.cuda.Stream = _NoStream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.default_stream = torch.cuda.current_stream = lambda *args, **kwargs: _NoStream()
    # One generator serves both: Megatron's tracker swaps its state in and out, as it does the GPU's.
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)


def _patch_megatron() -> None:
    from megatron.core import optimizer as megatron_optimizer
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
    from megatron.core.tensor_parallel import random as megatron_random
    from nemo.lightning.io import pl as nemo_io

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    megatron_optimizer.Adam = distrib_optimizer.Adam = CpuAdam
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
    # TransformerEngine's and Apex's kernels would take the address of a CPU tensor for one of the GPU
    clip_grads.multi_tensor_applier = optimizer.multi_tensor_applier = utils.local_multi_tensor_applier
    clip_grads.multi_tensor_scale_impl = optimizer.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    # asserts that CUDA is initialised, then moves tensors between GPUs
    nemo_io._fix_tensors_device = lambda checkpoint: checkpoint


_active: _CudaMeansCpu | None = None


def activate() -> None:
    """Answer "cuda" with the CPU for the rest of this process. Safe to call twice."""
    global _active
    if _active is not None:
        return
    _patch_torch_cuda()
    _patch_megatron()
    _active = _CudaMeansCpu()
    _active.__enter__()


class CpuMegatronStrategy(nl.MegatronStrategy):
    """NeMo's MegatronStrategy over gloo on CPUs; takes the same arguments.

    NeMo's ProgressPrinter (replace_progress_bar) stays off whatever is asked: on rank 0 only it reads Megatron's
    timers, which is a collective; NCCL ignores the empty one, gloo pairs it with the next rank's and hangs at the first
    checkpoint.
    """

    def __init__(self, *args, replace_progress_bar: bool = False, **kwargs):
        activate()
        super().__init__(*args, replace_progress_bar=False, **kwargs)

    def setup_distributed(self) -> None:
        super().setup_distributed()
        # NeMo fills Megatron's tracker only where it counts a GPU; its own seed, which vlmsft.runtime.seed replaces
        seed_all(1234)
