"""The layers that MLlama is made of, from TransformerEngine or portable ones, chosen by one key.

The portable classes have the same parameter names, the same sharding and the same checkpoint keys as
TransformerEngine's, `_extra_state` included: a distributed checkpoint written with either loads into the other and into
NeMo's stock classes.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import bias_dropout_add_unfused, get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from nemo.collections.vlm.mllama.model.language import (
    CrossAttentionTransformerLayer,
    MLlamaCrossAttention,
    MLlamaCrossAttentionSubmodules,
)
from nemo.collections.vlm.mllama.model.vision import ImageTransformerLayer, SelfAttentionNoBias
from torch import Tensor, nn

from vlmsft.errors import Problem, UserError, nearest
from vlmsft.mllama.attention import CausalAttention, CrossAttention, CrossPlan, TowerAttention

CHOICES = ("auto", "transformer_engine", "torch")


def resolve_layers(choice: str) -> str:
    """'transformer_engine' or 'torch' for one of CHOICES; auto takes TransformerEngine where there is a CUDA GPU.

    Raises UserError for another word, and when TransformerEngine is wanted but not installed.
    """
    if choice not in CHOICES:
        raise UserError(
            Problem("model.config.layers", repr(choice), "one of " + ", ".join(CHOICES), nearest(choice, CHOICES))
        )
    if choice == "auto":
        choice = "transformer_engine" if torch.cuda.is_available() else "torch"
    if choice == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        raise UserError(
            Problem(
                "model.config.layers",
                "no transformer_engine in this environment",
                "TransformerEngine, which NeMo's layers run on",
                "Install the `gpu` extra, or set model.config.layers=torch.",
            )
        )
    return choice


def _device(config) -> Any:
    return "cpu" if config.use_cpu_initialization else torch.cuda.current_device()


def whole_rows(config: Any) -> Any:
    """The config of a module that computes all rows on each rank: a copy where sequence parallelism splits others'."""
    if not config.sequence_parallel:
        return config
    config = copy.copy(config)
    config.sequence_parallel = False
    return config


def _sum_over_ranks(config: Any, parameters: Iterable[Any]) -> None:
    """Replicated parameters that see their rank's rows only: Megatron adds up the ranks' gradients of what is marked.

    As TransformerEngine marks its norms' itself.
    """
    for parameter in parameters:
        if parameter is not None:
            parameter.sequence_parallel = config.sequence_parallel


def _empty_extra_state(module: nn.Module) -> None:
    """A strict load accepts a state dict without the module's `_extra_state` (Hugging Face's, for one)."""
    module._register_load_state_dict_pre_hook(
        lambda state_dict, prefix, *args: state_dict.setdefault(f"{prefix}_extra_state")
    )


def _normalise(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    if kind == "RMSNorm":
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _require_norm(kind: str) -> str:
    if kind not in ("LayerNorm", "RMSNorm"):
        raise UserError(Problem("normalization", repr(kind), "LayerNorm or RMSNorm"))
    return kind


class PortableNorm(nn.Module):
    """LayerNorm or RMSNorm (config.normalization) with the names of TransformerEngine's: weight, bias, _extra_state."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.kind = _require_norm(config.normalization)
        self.eps = eps
        factory = {"dtype": config.params_dtype, "device": _device(config)}
        self.weight = nn.Parameter(torch.ones(hidden_size, **factory))
        self.bias = nn.Parameter(torch.zeros(hidden_size, **factory)) if self.kind == "LayerNorm" else None
        _sum_over_ranks(config, (self.weight, self.bias))
        _empty_extra_state(self)

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_size) -> the same shape."""
        return _normalise(x, self.weight, self.bias, self.eps, self.kind)

    def get_extra_state(self) -> None:
        """Nothing to keep; the key is there because TransformerEngine's norms write one."""

    def set_extra_state(self, state: Any) -> None:
        """TransformerEngine's fp8 state has no meaning here."""


class PortableNormLinear(ColumnParallelLinear):
    """A norm and a column-parallel linear in one, named as TELayerNormColumnParallelLinear: layer_norm_weight, weight.

    return_layernorm_output: return ((output, normalised input), bias), as TransformerEngine's class does when NeMo's
    LoRA sets this attribute: the adapter works on the normalised input. NeMo sets it on TransformerEngine's class only,
    so `tell_wrapped_norms` does it for this one.
    """

    def __init__(self, input_size: int, output_size: int, *, config, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.kind = _require_norm(config.normalization)
        self.eps = config.layernorm_epsilon
        self.return_layernorm_output = False
        factory = {"dtype": config.params_dtype, "device": _device(config)}
        self.layer_norm_weight = nn.Parameter(torch.ones(input_size, **factory))
        self.layer_norm_bias = nn.Parameter(torch.zeros(input_size, **factory)) if self.kind == "LayerNorm" else None
        _sum_over_ranks(config, (self.layer_norm_weight, self.layer_norm_bias))

    def forward(self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None):
        """(S, B, input_size) -> ((S, B, output_size / TP), bias or None); see return_layernorm_output.

        With sequence parallelism the input holds the rank's rows, as does the normalised input; the output holds all.
        """
        normalised = _normalise(input_, self.layer_norm_weight, self.layer_norm_bias, self.eps, self.kind)
        output, bias = super().forward(normalised, weight, runtime_gather_output)
        return ((output, normalised), bias) if self.return_layernorm_output else (output, bias)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """weight and bias sharded along axis 0, the norm's parameters replicated."""
        state_dict = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state_dict, prefix, {"weight": 0, "bias": 0}, sharded_offsets)


NormLinearPlace = tuple[nn.Module, str, PortableNormLinear]


def find_norm_linears(model: nn.Module) -> list[NormLinearPlace]:
    """(parent, attribute, module) of each PortableNormLinear below `model`."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, PortableNormLinear)
    ]


def tell_wrapped_norms(places: list[NormLinearPlace]) -> None:
    """Have each PortableNormLinear that an adapter has wrapped since hand out its normalised input, and only those."""
    for parent, name, module in places:
        module.return_layernorm_output = getattr(parent, name) is not module


class PortableMLP(MLP):
    """Megatron's MLP with the activation in eager torch: Megatron's own one is compiled at the first call.

    config.bias_activation_fusion keeps the meaning it has there for GELU: the tanh approximation when true.
    """

    linear_fc1_class: type = ColumnParallelLinear

    def __init__(self, config, **kwargs):
        submodules = MLPSubmodules(linear_fc1=self.linear_fc1_class, linear_fc2=RowParallelLinear)
        super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size)

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None):
        """(S, B, H) -> ((S, B, H), bias or None)."""
        hidden, bias = self.linear_fc1(hidden_states)
        if bias is not None:
            hidden = hidden + bias
        if self.config.gated_linear_unit:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = self._activate(gate) * up
        else:
            hidden = self._activate(hidden)
        return self.linear_fc2(hidden)

    def _activate(self, x: Tensor) -> Tensor:
        if self.config.activation_func is F.gelu:
            return F.gelu(x, approximate="tanh" if self.config.bias_activation_fusion else "none")
        return self.config.activation_func(x)


class PortableNormMLP(PortableMLP):
    """PortableMLP whose first linear is preceded by the layer's norm."""

    linear_fc1_class = PortableNormLinear


def portable_bias_dropout_add(training: bool, fused: bool):
    """Megatron's get_bias_dropout_add, never the compiled version."""
    return bias_dropout_add_unfused(training)


@dataclass(frozen=True)
class LayerKit:
    """The classes of one choice of layers, as Megatron's specs take them."""

    norm: type
    column_linear: type
    norm_column_linear: type
    row_linear: type
    mlp: Any
    norm_mlp: Any
    bias_dropout_add: Any
    compiled: bool  # elementwise chains and the loss through torch.compile


def layer_kit(choice: str) -> LayerKit:
    """The classes for `choice` (see resolve_layers)."""
    return _transformer_engine_kit() if resolve_layers(choice) == "transformer_engine" else _torch_kit()


def _let_lora_work_without_transformer_engine() -> None:
    """Keep NeMo's LoRA from comparing a module's class with TransformerEngine's where that is not installed.

    One of its two tests raises there; the other compares with the mock objects that Megatron puts in its place.
    """
    from nemo.collections.llm.peft import lora, utils

    if importlib.util.find_spec("transformer_engine") is None:
        lora.te = SimpleNamespace(Linear=_NoSuchLinear)
        utils.HAVE_TE = False


class _NoSuchLinear:
    """Equal to no module's class."""


def _torch_kit() -> LayerKit:
    _let_lora_work_without_transformer_engine()
    return LayerKit(
        norm=PortableNorm,
        column_linear=ColumnParallelLinear,
        norm_column_linear=PortableNormLinear,
        row_linear=RowParallelLinear,
        mlp=PortableMLP,
        norm_mlp=PortableNormMLP,
        bias_dropout_add=portable_bias_dropout_add,
        compiled=False,
    )


def _transformer_engine_kit() -> LayerKit:
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    def mlp(linear_fc1):
        return _spec(MLP, MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=TERowParallelLinear))

    return LayerKit(
        norm=TENorm,
        column_linear=TEColumnParallelLinear,
        norm_column_linear=TELayerNormColumnParallelLinear,
        row_linear=TERowParallelLinear,
        mlp=mlp(TEColumnParallelLinear),
        norm_mlp=mlp(TELayerNormColumnParallelLinear),
        bias_dropout_add=get_bias_dropout_add,
        compiled=True,
    )


def _add_with_bias(residual: Tensor, output: Tensor, bias: Tensor) -> Tensor:
    return residual + (output + bias)


def _add_gated(residual: Tensor, output: Tensor, gate: Tensor) -> Tensor:
    return residual + gate.tanh() * output


def _add_gated_with_bias(residual: Tensor, output: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    return residual + gate.tanh() * (output + bias)


# dynamic: micro batches differ in their number of images. A function each, because torch gives a function up after
# eight variants, and what trains, what is recomputed and what is None made more of one
_compiled = {add: torch.compile(add, dynamic=True) for add in (_add_with_bias, _add_gated, _add_gated_with_bias)}


class TowerLayer(ImageTransformerLayer):
    """NeMo's ImageTransformerLayer (its names) that adds a branch, its bias and its gate to the residual in one kernel.

    compiled: through torch.compile. NeMo's layer multiplies each branch by its gate (or by 1), adds the bias and adds
    the residual in passes of their own.
    """

    def __init__(self, *args, compiled: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.compiled = compiled

    def forward(self, hidden_states: Tensor, attention_bias: Any) -> Tensor:
        """(N, 1, H) -> the same shape; attention_bias: the TowerPlan."""
        output, bias = self.self_attention(
            self.input_layernorm(hidden_states), attention_mask=None, attention_bias=attention_bias
        )
        hidden_states = self.add(hidden_states, output, bias, "gate_attn")
        output, bias = self.mlp(self.pre_mlp_layernorm(hidden_states))
        return self.add(hidden_states, output, bias, "gate_ffn")

    def add(self, residual: Tensor, output: Tensor, bias: Tensor | None, gate_name: str) -> Tensor:
        """residual + gate * (output + bias), with the bias, the gate and the dropout that there are."""
        gate = getattr(self, gate_name) if self.gated else None
        if self.training and self.hidden_dropout:
            output = F.dropout(output if bias is None else output + bias, self.hidden_dropout)
            bias = None
        if bias is None and gate is None:
            return residual + output
        add = _add_gated if bias is None else _add_with_bias if gate is None else _add_gated_with_bias
        return (_compiled[add] if self.compiled else add)(residual, output, *(x for x in (bias, gate) if x is not None))


class CrossLayer(CrossAttentionTransformerLayer):
    """NeMo's gated cross-attention layer, where the rows that a rank keeps may be fewer than those that attend."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        _sum_over_ranks(config, (self.gate_attn, self.gate_ffn))

    def forward(
        self,
        hidden_states: Tensor,
        key_value: tuple[Tensor, Tensor],
        plan: CrossPlan,
        row_mask: Tensor,
        own_row_mask: Tensor,
    ) -> Tensor:
        """(S, B, H) -> the same shape; with sequence parallelism (S / TP, B, H), this rank's rows.

        key_value: (N, 1, groups, D) each, of all image tokens, from cross_attention.get_key_value_tensors
        row_mask: (S, B, 1), CrossPlan.row_mask; own_row_mask: of this rank's rows
        """
        attended = self.cross_attention(
            hidden_states,
            cross_attention_masks=None,
            xattn_cache=key_value,
            full_text_row_masked_out_mask=row_mask,
            cross_attention_bias=plan,
        )
        hidden_states = self._add(self.cross_attn_bda, hidden_states, attended, self.gate_attn.tanh())
        return self._add(self.mlp_bda, hidden_states, self.mlp(hidden_states), self.gate_ffn.tanh() * own_row_mask)

    def _add(self, bias_dropout_add: Any, residual: Tensor, output_with_bias: Any, gate: Tensor) -> Tensor:
        gated = tuple(part if part is None else gate * part for part in output_with_bias)
        with self.bias_dropout_add_exec_handler():
            return bias_dropout_add(self.training, self.config.bias_dropout_fusion)(
                gated, residual, self.hidden_dropout
            )


def _spec(module: type, submodules: Any, **params: Any) -> ModuleSpec:
    """A ModuleSpec; Megatron annotates its `submodules` as a class and takes an instance."""
    return ModuleSpec(module=module, params=params, submodules=submodules)


def text_layer_spec(kit: LayerKit) -> ModuleSpec:
    """A self-attention layer of the text decoder."""
    return _spec(
        TransformerLayer,
        TransformerLayerSubmodules(
            self_attention=_spec(
                SelfAttention,
                SelfAttentionSubmodules(
                    linear_qkv=kit.norm_column_linear,
                    core_attention=CausalAttention,
                    linear_proj=kit.row_linear,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
                attn_mask_type=AttnMaskType.causal,
            ),
            self_attn_bda=kit.bias_dropout_add,
            mlp=kit.norm_mlp,
            mlp_bda=kit.bias_dropout_add,
        ),
    )


def _on_whole_rows(linear: type) -> type:
    """The column-parallel class for an input that all ranks hold whole, with sequence parallelism too."""

    class WholeRows(linear):
        def __init__(self, *args, config, **kwargs):
            super().__init__(*args, config=whole_rows(config), **kwargs)

    return WholeRows


def cross_layer_spec(kit: LayerKit) -> ModuleSpec:
    """A gated cross-attention layer of the text decoder."""
    return _spec(
        CrossLayer,
        TransformerLayerSubmodules(
            cross_attention=_spec(
                MLlamaCrossAttention,
                MLlamaCrossAttentionSubmodules(
                    linear_q=kit.norm_column_linear,
                    linear_kv=_on_whole_rows(kit.column_linear),
                    core_attention=CrossAttention,
                    linear_proj=kit.row_linear,
                    q_layernorm=kit.norm,
                    k_layernorm=kit.norm,
                ),
                attn_mask_type=AttnMaskType.no_mask,
            ),
            cross_attn_bda=kit.bias_dropout_add,
            mlp=kit.norm_mlp,
            mlp_bda=kit.bias_dropout_add,
        ),
    )


def vision_layer_spec(kit: LayerKit) -> ModuleSpec:
    """A layer of the vision tower; gated where its config says so."""
    return _spec(
        TowerLayer,
        TransformerLayerSubmodules(
            input_layernorm=kit.norm,
            self_attention=_spec(
                SelfAttentionNoBias,
                SelfAttentionSubmodules(
                    linear_qkv=kit.column_linear,
                    core_attention=TowerAttention,
                    linear_proj=kit.row_linear,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
                attn_mask_type=AttnMaskType.no_mask,
            ),
            pre_mlp_layernorm=kit.norm,
            mlp=kit.mlp,
        ),
        compiled=kit.compiled,
    )
