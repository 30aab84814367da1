"""MLlama's layers as plain functions of their parameters: what a rank computes without Megatron.

Megatron's and TransformerEngine's layers spend some 0.1 ms of the host's time on each kernel that they start, several
times what a GPU needs for it at small micro batches. Here a layer is what stands before its attention, the attention,
and what stands behind it; the first and the last go through torch.compile on a GPU. The modules keep the parameters, so
that checkpoints, LoRA, Megatron's DDP and its optimizer see no difference.

With tensor parallelism a rank holds some outputs of linear_qkv, linear_q, linear_kv and linear_fc1 and the inputs of
linear_proj and linear_fc2 that follow from them. What the former multiply, whole on each rank, gets the sum of the
ranks' gradients (_for_all_ranks); what the latter give is summed (_sum_of_ranks). These sums, and what then has to
stand outside of the compiled functions (norms, linear_proj, gates, residuals), are not compiled.

Where something needs Megatron's own forward (sequence parallelism, adapters with tensor parallelism, dropout, hooks on
a module, an adapter that is no LoRA), Checked.why_not says what. Tensor-parallel ranks have to agree: a hook that only
one of them has would leave the others waiting.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from nemo.collections.llm.peft.lora import LoRALinear
from nemo.collections.llm.peft.utils import ParallelLinearAdapter
from torch import Tensor, nn

from vlmsft.mllama import fp8
from vlmsft.mllama.attention import CrossPlan, TowerPlan, attend, attend_runs
from vlmsft.mllama.fp8_rows import Norm, add_norm_quantise, gelu_quantise, norm_quantise, quantise_rows
from vlmsft.mllama.plain_values import TEXT_VALUES, TOWER_VALUES

# NeMo's recipes set it: a function that fails to compile would run uncompiled, and nobody would know
torch._dynamo.config.suppress_errors = False


class Linear(NamedTuple):
    """A linear layer, the norm in front of it (if its module holds one) and its adapter (if it has one).

    scale, dropout, training: of the adapter, whose input is dropped out
    quantised: the weight in fp8, where fp8.FrozenMatrices keeps one
    """

    weight: Tensor
    bias: Tensor | None
    norm: Tensor | None
    down: Tensor | None
    up: Tensor | None
    scale: float
    dropout: float
    training: bool
    quantised: fp8.Rounded | None


class Heads(NamedTuple):
    """Attention's sizes; groups: of keys and values."""

    heads: int
    groups: int
    head_dim: int


class Unsupported(Exception):
    """What needs Megatron's forward."""


class Checked:
    """What of a built model (an MLlamaBase) needs a look before each forward: adapters and hooks come and go."""

    def __init__(self, model: Any):
        decoder, tower = model.language_model.decoder, model.vision_model.vision_encoder
        self._stacks = (decoder.layers, decoder.xattn_layers, tower.transformer.layers, tower.global_transformer.layers)
        self._config = model.config
        self._modules: list[nn.Module] = []
        self._refused: str | None = None

    def why_not(self) -> str | None:
        """What needs Megatron's forward; None where the functions here do.

        Functions call no module: what Megatron's DDP or anyone else hooks to one would not be called.
        """
        modules = _modules_in(self._stacks)
        if modules != self._modules:  # modules compare by identity
            self._modules, self._refused = modules, _refused(self._config, modules)
        return self._refused or next((hook for hook in map(_hook, modules) if hook), None)


def _modules_in(stacks: Iterable[nn.Module]) -> list[nn.Module]:
    """All modules of the layers; nn.Module.modules() takes 2.5 times as long, at each forward."""
    found, waiting = [], [layer for stack in stacks for layer in stack.children()]
    while waiting:
        module = waiting.pop()
        found.append(module)
        waiting += [child for child in module._modules.values() if child is not None]
    return found


def _hook(module: nn.Module) -> str | None:
    if module._forward_pre_hooks or module._forward_hooks:
        return f"{type(module).__name__} has a forward hook"
    if module._backward_pre_hooks or module._backward_hooks:
        return f"{type(module).__name__} has a backward hook"
    return None


def _refused(config: Any, modules: Iterable[nn.Module]) -> str | None:
    if config.sequence_parallel:
        return "sequence_parallel is true"
    try:
        _check_config(config.language_model_config, {**TEXT_VALUES, "activation_func": (F.silu,)})
        _check_config(config.vision_model_config, {**TOWER_VALUES, "activation_func": (F.gelu,)})
        for module in modules:
            if _is_adapted(module):
                _check_adapter(module)
                linear_of(module)
    except Unsupported as reason:
        return str(reason)
    return None


def _check_config(config: Any, wanted: Mapping[str, tuple[Any, ...]]) -> None:
    for name, values in wanted.items():
        if getattr(config, name) not in values:
            raise Unsupported(f"{name} is {getattr(config, name)}")


def _check_adapter(module: Any) -> None:
    """Other PEFT methods wrap a linear and its adapter as well, and compute something else."""
    if _has_ranks():
        raise Unsupported("there are adapters and tensor_model_parallel_size is more than 1")
    for part, known in ((module, LoRALinear), (module.adapter, ParallelLinearAdapter)):
        if type(part) is not known:
            raise Unsupported(f"{type(part).__name__} is no {known.__name__}")


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "to_wrap") and hasattr(module, "adapter")


def linear_of(module: Any) -> Linear:
    """A Megatron, TransformerEngine or portable linear, bare or in NeMo's LoRALinear."""
    if not _is_adapted(module):
        plain = (module.weight, _given(module.bias), _norm_of(module), None, None, 1.0, 0.0, False)
        return Linear(*plain, _quantised_of(module))
    base, adapter = module.to_wrap, module.adapter
    dropout = adapter.dropout.p if adapter.dropout is not None else 0.0
    if not isinstance(adapter.activation, nn.Identity) or (dropout and adapter.dropout_position != "pre"):
        raise Unsupported(f"the adapter of {adapter.base_linear_name} has an activation or dropout behind it")
    return Linear(
        base.weight,
        _given(base.bias),
        _norm_of(base),
        adapter.linear_in.weight,
        adapter.linear_out.weight,
        adapter.alpha / adapter.dim,
        dropout,
        adapter.training,
        _quantised_of(base),
    )


def _given(tensor: Tensor | None) -> Tensor | None:
    """TransformerEngine's linears without a bias hold an empty one."""
    return tensor if tensor is not None and tensor.numel() else None


def _norm_of(module: nn.Module) -> Tensor | None:
    return getattr(module, "layer_norm_weight", None)


def _quantised_of(module: nn.Module) -> fp8.Rounded | None:
    return getattr(module, "quantised", None)


def _run(function: Callable, rows: tuple[Tensor, ...], *args: Any) -> Any:
    """function(*rows, *args), compiled on a GPU for any number of rows, which all of `rows` begin with."""
    if not _compiles(rows[0]):
        return function(*rows, *args)
    for tensor in rows:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compiled(function)(*rows, *args)


def _compiles(like: Tensor) -> bool:
    return like.is_cuda


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function)


def _project(x: Tensor, linear: Linear, eps: float = 0.0) -> Tensor:
    """(N, in) -> (N, out): norm, linear and adapter."""
    if linear.norm is not None:
        x = F.rms_norm(x, linear.norm.shape, linear.norm, eps)
    y = _multiply(x, linear)
    if linear.down is None or linear.up is None:
        return y
    if linear.dropout:
        x = F.dropout(x, linear.dropout, linear.training)
    return y + linear.scale * F.linear(F.linear(x, linear.down), linear.up)


def _multiply(x: Tensor, linear: Linear) -> Tensor:
    if linear.quantised is None:
        return F.linear(x, linear.weight, linear.bias)
    y = fp8.project(x, linear.quantised)
    return y if linear.bias is None else y + linear.bias


# --- tensor parallelism ---------------------------------------------------------------------------------------------


def _has_ranks() -> bool:
    return parallel_state.get_tensor_model_parallel_world_size() > 1


def _for_all_ranks(x: Tensor) -> Tensor:
    return copy_to_tensor_model_parallel_region(x) if _has_ranks() else x


def _sum_of_ranks(x: Tensor) -> Tensor:
    return reduce_from_tensor_model_parallel_region(x) if _has_ranks() else x


def _input_of(linear: Linear, rows: Tensor, eps: float = 0.0) -> tuple[Tensor, Linear]:
    """What a linear split by outputs multiplies, and the linear: with ranks the norm is computed here.

    A rank's gradient of that input is a part of the whole one, which the norm's own gradients need.
    """
    if not _has_ranks():
        return rows, linear
    if linear.norm is not None:
        rows = F.rms_norm(rows, linear.norm.shape, linear.norm, eps)
    return _for_all_ranks(rows), linear._replace(norm=None)


def _project_sum(x: Tensor, linear: Linear) -> Tensor:
    """_project with a linear split by inputs: the bias, which each rank holds whole, comes behind the sum."""
    y = _sum_of_ranks(_project(x, linear._replace(bias=None)))
    return y if linear.bias is None else y + linear.bias


# --- text decoder: self-attention -----------------------------------------------------------------------------------


def self_layer(layer: Any, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A Llama layer: (S, B, H) -> the same; cos, sin: (S * B, 1, head dim) in fp32, as `rotation` makes them."""
    attention = layer.self_attention
    num_rows, batch, width = hidden_states.shape
    eps = layer.config.layernorm_epsilon
    rows = hidden_states.reshape(-1, width)
    x, qkv = _input_of(linear_of(attention.linear_qkv), rows, eps)
    query, key, value = _run(before_self, (x, cos, sin), qkv, heads_of(attention), eps)
    query, key, value = (tensor.unflatten(0, (num_rows, batch)) for tensor in (query, key, value))
    attended = attend(query, key, value, causal=True).reshape(num_rows * batch, -1)
    linears = (linear_of(attention.linear_proj), *_linears_of(layer.mlp))
    if _has_ranks():
        rows = rows + _project_sum(attended, linears[0])
        rows = rows + _swiglu_sum(rows, *linears[1:], eps)
    else:
        rows = _run(behind_self, (rows, attended), *linears, eps)
    return rows.view(num_rows, batch, width)


def heads_of(attention: Any) -> Heads:
    return Heads(
        attention.num_attention_heads_per_partition,
        attention.num_query_groups_per_partition,
        attention.hidden_size_per_attention_head,
    )


def rotation(angles: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """cos and sin, (S * B, 1, head dim) in fp32, of Megatron's rotary angles (S, 1, 1, head dim)."""
    angles = angles.float().expand(-1, batch, -1, -1).flatten(0, 1)
    return angles.cos(), angles.sin()


def before_self(
    rows: Tensor, cos: Tensor, sin: Tensor, qkv: Linear, heads: Heads, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, projection and rotary embedding: (N, H) -> query (N, heads, D), key and value (N, groups, D)."""
    # a group's queries, its key and its value stand together
    grouped = _project(rows, qkv, eps).view(-1, heads.groups, heads.heads // heads.groups + 2, heads.head_dim)
    query = grouped[:, :, :-2].reshape(-1, heads.heads, heads.head_dim)
    key, value = grouped[:, :, -2], grouped[:, :, -1]
    return _rotate(query, cos, sin), _rotate(key, cos, sin), value.contiguous()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    half_turned = torch.cat((-second, first), dim=-1)
    return (x.float() * cos + half_turned * sin).to(x.dtype)


def behind_self(rows: Tensor, attended: Tensor, proj: Linear, fc1: Linear, fc2: Linear, eps: float) -> Tensor:
    """Output projection, residual, norm, SwiGLU and residual: (N, H) and (N, heads * D) -> (N, H)."""
    rows = rows + _project(attended, proj)
    return rows + _swiglu(rows, fc1, fc2, eps)


def _swiglu(rows: Tensor, fc1: Linear, fc2: Linear, eps: float) -> Tensor:
    gate, up = _project(rows, fc1, eps).chunk(2, dim=-1)
    return _project(F.silu(gate) * up, fc2)


def _swiglu_sum(rows: Tensor, fc1: Linear, fc2: Linear, eps: float) -> Tensor:
    x, fc1 = _input_of(fc1, rows, eps)
    y = _sum_of_ranks(_run(_swiglu, (x,), fc1, fc2._replace(bias=None), eps))
    return y if fc2.bias is None else y + fc2.bias


def _linears_of(mlp: Any) -> tuple[Linear, Linear]:
    return linear_of(mlp.linear_fc1), linear_of(mlp.linear_fc2)


# --- text decoder: cross-attention ----------------------------------------------------------------------------------


def cross_layer(layer: Any, hidden_states: Tensor, image_tokens: Tensor, plan: CrossPlan, row_mask: Tensor) -> Tensor:
    """A gated cross-attention layer: (S, B, H) -> the same.

    image_tokens: (T, 1, H); plan: which rows see which; row_mask: (S, B, 1), 1 for rows that see an image
    """
    attention = layer.cross_attention
    num_rows, batch, width = hidden_states.shape
    eps, heads = layer.config.layernorm_epsilon, heads_of(attention)
    rows, row_mask = hidden_states.reshape(-1, width), row_mask.reshape(-1, 1)
    x, linear_q = _input_of(linear_of(attention.linear_q), rows, eps)
    query = _run(query_of, (x,), linear_q, attention.q_layernorm.weight, heads, eps)
    seen, linear_kv = _input_of(linear_of(attention.linear_kv), image_tokens.flatten(0, 1))
    key, value = _run(key_value_of, (seen,), linear_kv, attention.k_layernorm.weight, heads, eps)
    attended = attend_runs(query.unflatten(0, (num_rows, batch)), key.unsqueeze(1), value.unsqueeze(1), plan)
    attended, gates = attended.reshape(num_rows * batch, -1), (layer.gate_attn, layer.gate_ffn)
    linears = (linear_of(attention.linear_proj), *_linears_of(layer.mlp))
    if _has_ranks():
        rows = rows + gates[0].tanh() * _project_sum(row_mask * attended, linears[0])
        rows = rows + gates[1].tanh() * row_mask * _swiglu_sum(rows, *linears[1:], eps)
    else:
        rows = _run(behind_cross, (rows, attended, row_mask), gates, *linears, eps)
    return rows.view(num_rows, batch, width)


def query_of(rows: Tensor, linear: Linear, norm: Tensor, heads: Heads, eps: float) -> Tensor:
    """(N, H) -> (N, heads, D), each head normalised."""
    query = _project(rows, linear, eps).view(-1, heads.heads, heads.head_dim)
    return F.rms_norm(query, norm.shape, norm, eps)


def key_value_of(rows: Tensor, linear: Linear, norm: Tensor, heads: Heads, eps: float) -> tuple[Tensor, Tensor]:
    """(T, H) -> keys, each head normalised, and values: (T, groups, D)."""
    key, value = _project(rows, linear).view(-1, heads.groups, 2 * heads.head_dim).chunk(2, dim=-1)
    return F.rms_norm(key, norm.shape, norm, eps), value.contiguous()


def behind_cross(
    rows: Tensor,
    attended: Tensor,
    row_mask: Tensor,
    gates: tuple[Tensor, Tensor],
    proj: Linear,
    fc1: Linear,
    fc2: Linear,
    eps: float,
) -> Tensor:
    """As behind_self with each branch behind its gate; rows that see no image stay as they are."""
    gate_attn, gate_ffn = gates
    rows = rows + gate_attn.tanh() * _project(row_mask * attended, proj)
    return rows + gate_ffn.tanh() * row_mask * _swiglu(rows, fc1, fc2, eps)


# --- vision tower ---------------------------------------------------------------------------------------------------


def tower_layer(layer: Any, x: Tensor, plan: TowerPlan) -> Tensor:
    """A layer of the tower: (N, 1, H) -> the same, the image tokens sorted as the plan says.

    Kernels of cuBLAS and torch one by one: with 6432 tokens an image the host is ahead of the GPU, and torch's own
    layer norm is faster at this width than torch.compile's or TransformerEngine's.
    """
    attention, mlp, rows = layer.self_attention, layer.mlp, x.view(-1, x.shape[-1])
    if _quantised_of(attention.linear_qkv) is not None:
        return _tower_layer_in_fp8(layer, rows, plan).view_as(x)
    normalised = _for_all_ranks(_layer_norm(rows, _norm(layer.input_layernorm, layer)))
    attended = _attend_tower(attention, _project(normalised, linear_of(attention.linear_qkv)), plan)
    rows = layer.add(rows, _project_sum(attended, linear_of(attention.linear_proj)), None, "gate_attn")
    normalised = _for_all_ranks(_layer_norm(rows, _norm(layer.pre_mlp_layernorm, layer)))
    fc1, fc2 = _linears_of(mlp)
    inner = _linear_gelu(normalised, fc1, mlp.config.bias_activation_fusion)
    branch = _sum_of_ranks(_project(inner, fc2._replace(bias=None)))
    return layer.add(rows, branch, fc2.bias, "gate_ffn").view_as(x)


def _tower_layer_in_fp8(layer: Any, rows: Tensor, plan: TowerPlan) -> Tensor:
    """(N, H) -> the same, of a layer in which nothing trains. What makes the activations rounds them as well."""
    attention, mlp = layer.self_attention, layer.mlp
    linears = (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
    qkv, proj, fc1, fc2 = (linear.quantised for linear in linears)
    normalised = norm_quantise(rows, _norm(layer.input_layernorm, layer))
    attended = _attend_tower(attention, fp8.multiply(normalised, qkv), plan)
    branch, gate = fp8.multiply(quantise_rows(attended), proj), layer.gate_attn if layer.gated else None
    normalised, rows = add_norm_quantise(rows, branch, gate, _norm(layer.pre_mlp_layernorm, layer))
    inner = gelu_quantise(fp8.multiply(normalised, fc1), mlp.linear_fc1.bias, mlp.config.bias_activation_fusion)
    return layer.add(rows, fp8.multiply(inner, fc2), mlp.linear_fc2.bias, "gate_ffn")


def _attend_tower(attention: Any, qkv: Tensor, plan: TowerPlan) -> Tensor:
    """(N, 3 * H) -> (N, H)."""
    heads = heads_of(attention)
    # a head's query, key and value stand together
    query, key, value = qkv.view(-1, 1, heads.heads, 3 * heads.head_dim).chunk(3, dim=-1)
    return attention.core_attention(query, key, value, attention_bias=plan).view(-1, heads.heads * heads.head_dim)


def _norm(norm: Any, layer: Any) -> Norm:
    return Norm(norm.weight, norm.bias, layer.config.layernorm_epsilon)


def _layer_norm(rows: Tensor, norm: Norm) -> Tensor:
    return F.layer_norm(rows, norm.weight.shape, norm.weight, norm.bias, norm.eps)


def _linear_gelu(rows: Tensor, linear: Linear, tanh: bool) -> Tensor:
    """tanh: GELU's approximation. cuBLASLt computes it within the matrix product; torch has no gradient for that, and
    takes the exact GELU there on a CPU."""
    in_product = rows.is_cuda and not torch.is_grad_enabled()
    if tanh and in_product and linear.bias is not None and linear.down is None:
        return torch.ops.aten._addmm_activation(linear.bias, rows, linear.weight.t(), use_gelu=True)
    return F.gelu(_project(rows, linear), approximate="tanh" if tanh else "none")
