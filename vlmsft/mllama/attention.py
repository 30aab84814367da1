"""Exact attention for MLlama without a dense bias; the same code on a CPU and a GPU.

NeMo's stock model adds a bias of (tokens x tokens) to every attention of the vision tower and of (text x image tokens)
to every cross-attention. Both biases have so few distinct rows that a handful of unmasked calls says the same:

- tower: the bias only forbids padding-to-padding pairs. With the real tokens sorted to the front, real queries see
  every key and padding queries see the real keys: two calls per group of images with equally many real tokens.
- cross-attention: the keys of missing tiles are hidden from every row, so they are never computed; what is left is one
  call per (sample, run of text rows that see the same images). Rows that see no image give exactly 0.

What is called when is decided on the host, from the batch's CPU tensors, and travels to the core attention as its
`attention_bias`: Megatron's attention classes hand that argument through untouched.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor, nn


@dataclass(frozen=True)
class TowerGroup:
    """Neighbouring images [first_image, end_image) of a tower batch whose first `num_real` tokens are real."""

    first_image: int
    end_image: int
    num_real: int


@dataclass(frozen=True)
class TowerPlan:
    """How the tower attends to a batch of images that are sorted by their number of real tokens.

    num_tokens: of each image, real or not
    """

    groups: tuple[TowerGroup, ...]
    num_tokens: int


@dataclass(frozen=True)
class Run:
    """Text rows [first_row, end_row) of one sample that see the same image tokens.

    keys: half-open ranges of the flat image tokens; empty where the rows see no image
    """

    first_row: int
    end_row: int
    keys: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class CrossPlan:
    """Cross-attention of a micro batch: for each sample the runs that cover its rows, in order.

    is_masked: rows attend, but none of them takes over what it finds (see unseen_plan)
    """

    samples: tuple[tuple[Run, ...], ...]
    is_masked: bool = False

    @functools.cached_property
    def columns(self) -> tuple[tuple[Run, ...], ...] | None:
        """All samples' runs cut at the same rows: for each such range of rows one run of each sample.

        None where that would make more attention calls (one for each number of keys in a column) than there are runs.
        Most micro batches have two columns: a chat's image stands at its beginning. Rows behind a sample's last image
        are padding, which no one reads: they count as seeing it, so that samples of different length share their
        columns.
        """
        samples = [_without_end(runs) for runs in self.samples]
        edges = sorted({row for runs in samples for run in runs for row in (run.first_row, run.end_row)})
        columns = tuple(
            tuple(next(Run(first, end, run.keys) for run in runs if run.end_row >= end) for runs in samples)
            for first, end in itertools.pairwise(edges)
        )
        num_calls = sum(num_keys > 0 for column in columns for num_keys in _alike(column))
        num_runs = sum(bool(run.keys) for runs in self.samples for run in runs)
        return columns if num_calls <= num_runs else None

    @property
    def sees_images(self) -> bool:
        """Whether any row sees any image; if not, cross-attention layers are the identity."""
        return any(run.keys for runs in self.samples for run in runs)

    def row_mask(self, like: Tensor) -> Tensor:
        """(S, B, 1): 1 for rows that see an image, 0 for the others; device and dtype from `like`.

        Filled slice by slice, since a copy from the host would wait for the GPU's queue.
        """
        mask = like.new_zeros(self.samples[0][-1].end_row, len(self.samples), 1)
        for sample, runs in enumerate(self.samples):
            for run in runs:
                if run.keys and not self.is_masked:
                    mask[run.first_row : run.end_row, sample] = 1
        return mask


def _without_end(runs: tuple[Run, ...]) -> tuple[Run, ...]:
    """Lets the last run that sees an image go on to the end."""
    if len(runs) == 1 or runs[-1].keys:
        return runs
    *earlier, last, end = runs
    return (*earlier, Run(last.first_row, end.end_row, last.keys))


def plan_cross_attention(
    num_samples: int,
    num_rows: int,
    image_sample: Sequence[int],
    image_tokens: Sequence[int],
    visible_from: Sequence[int],
    visible_until: Sequence[int],
) -> CrossPlan:
    """Cut each sample's text rows into runs that see the same images.

    num_rows: padded text length S
    image_sample, visible_from, visible_until: as in the batch contract, one entry per image
    image_tokens: real tokens of each image (tiles x tokens per tile); image i's keys follow those of image i-1
    """
    first_key = [0]
    for count in image_tokens:
        first_key.append(first_key[-1] + count)
    samples = []
    for sample in range(num_samples):
        images = [i for i, owner in enumerate(image_sample) if owner == sample]
        cuts = {0, num_rows}
        for i in images:
            cuts.update(min(max(row, 0), num_rows) for row in (visible_from[i], visible_until[i]))
        edges = sorted(cuts)
        runs = []
        for first_row, end_row in itertools.pairwise(edges):
            visible = [i for i in images if visible_from[i] <= first_row and end_row <= visible_until[i]]
            runs.append(Run(first_row, end_row, _join((first_key[i], first_key[i + 1]) for i in visible)))
        samples.append(tuple(runs))
    return CrossPlan(tuple(samples))


def unseen_plan(num_samples: int, num_rows: int, num_tokens: int) -> CrossPlan:
    """All rows attend to the same image tokens, and stay as they are: nothing but the layers' work is left of it."""
    return CrossPlan(((Run(0, num_rows, ((0, num_tokens),)),),) * num_samples, is_masked=True)


def _join(ranges) -> tuple[tuple[int, int], ...]:
    joined: list[tuple[int, int]] = []
    for start, end in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        elif end > start:
            joined.append((start, end))
    return tuple(joined)


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T) v for every query against every key (or the earlier ones).

    query: (Sq, B, heads, D); key, value: (Sk, B, groups, D) where groups divides heads (Megatron's layout)
    Returns (Sq, B, heads * D).
    """
    num_rows, batch, num_heads, head_dim = query.shape
    out = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        dropout_p=dropout,
        is_causal=causal,
        scale=scale,
        enable_gqa=num_heads != key.shape[2],
    )
    return out.permute(2, 0, 1, 3).reshape(num_rows, batch, num_heads * head_dim)


def random_per_rank() -> AbstractContextManager:
    """Dropout that differs between tensor-parallel ranks, as their heads or rows do."""
    tracker = get_cuda_rng_tracker()
    assert tracker is not None  # it is made by the call that returns it
    return tracker.fork()


class _CoreAttention(nn.Module):
    """What Megatron's Attention builds as `core_attention`: no parameters, hence no checkpoint keys, as TE's."""

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type=None,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
    ):
        super().__init__()
        self.scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        # with sequence parallelism the whole layer runs in a rank's own random state, and forks don't nest
        self.forks = not config.sequence_parallel

    def forward(
        self,
        query,
        key,
        value,
        attention_mask=None,
        attn_mask_type=None,
        attention_bias: Any = None,
        packed_seq_params=None,
    ) -> Tensor:
        """Megatron's arguments; attention_bias: the plan of what sees what, where the class needs one."""
        return self._compute(query, key, value, attention_bias)

    def _compute(self, query: Tensor, key: Tensor, value: Tensor, plan: Any) -> Tensor:
        raise NotImplementedError

    def _random_state(self, dropout: float) -> AbstractContextManager:
        return random_per_rank() if dropout and self.forks else nullcontext()

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        with self._random_state(dropout):
            return attend(query, key, value, causal=causal, scale=self.scale, dropout=dropout)


class CausalAttention(_CoreAttention):
    """Text self-attention. Padding needs no mask: it stands behind the text, so no real row sees it."""

    def _compute(self, query: Tensor, key: Tensor, value: Tensor, plan: None) -> Tensor:
        """query (S, B, heads, D), key and value (S, B, groups, D) -> (S, B, heads * D)."""
        return self._attend(query, key, value, causal=True)


class TowerAttention(_CoreAttention):
    """Vision self-attention over tokens sorted as `TowerPlan` says.

    The images stand one after the other in Megatron's sequence dimension, so that an image's tokens are neighbours in
    memory and what the attention kernel writes needs no transposition.
    """

    def _compute(self, query: Tensor, key: Tensor, value: Tensor, plan: TowerPlan) -> Tensor:
        """query, key, value (images * tokens, 1, heads, D) -> (images * tokens, 1, heads * D)."""
        shape = (-1, plan.num_tokens, *query.shape[2:])
        query, key, value = (tensor.view(shape) for tensor in (query, key, value))
        parts = [self._group(query, key, value, group) for group in plan.groups]
        return _joined(parts, 0).flatten(0, 1).flatten(1).unsqueeze(1)

    def _group(self, query: Tensor, key: Tensor, value: Tensor, group: TowerGroup) -> Tensor:
        """(images, tokens, heads, D) of all images -> the same of the group's."""
        query, key, value = (tensor[group.first_image : group.end_image] for tensor in (query, key, value))
        real = group.num_real
        parts = [self._attend(query[:, :real], key, value)]
        if real < query.shape[1]:
            parts.append(self._attend(query[:, real:], key[:, :real], value[:, :real]))
        return _joined(parts, 1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
        """(images, tokens, heads, D) throughout."""
        dropout = self.dropout if self.training else 0.0
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        with self._random_state(dropout):
            out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=self.scale)
        return out.transpose(1, 2)


class CrossAttention(_CoreAttention):
    """Text rows attend to the real tokens of the images they see."""

    def _compute(self, query: Tensor, key: Tensor, value: Tensor, plan: CrossPlan) -> Tensor:
        """query (S, B, heads, D), key and value (N, 1, groups, D) -> (S, B, heads * D)."""
        return attend_runs(query, key, value, plan, self._attend)


def attend_runs(
    query: Tensor, key: Tensor, value: Tensor, plan: CrossPlan, attend_all: Callable[..., Tensor] = attend
) -> Tensor:
    """Cross-attention run by run; runs of the same rows with equally many keys in one call.

    query (S, B, heads, D), key and value (N, 1, groups, D) -> (S, B, heads * D)
    attend_all: attend, or one with dropout
    """
    if plan.columns is None:
        samples = [
            _joined([_one_run(query[:, b : b + 1], key, value, run, attend_all) for run in runs], 0)
            for b, runs in enumerate(plan.samples)
        ]
        return _joined(samples, 1)
    return _joined([_column(query, key, value, column, attend_all) for column in plan.columns], 0)


def _one_run(query: Tensor, key: Tensor, value: Tensor, run: Run, attend_all: Callable[..., Tensor]) -> Tensor:
    query = query[run.first_row : run.end_row]
    if not run.keys:
        return query.new_zeros(query.shape[0], 1, query.shape[2] * query.shape[3])
    return attend_all(query, _take(key, run.keys), _take(value, run.keys))


def _column(
    query: Tensor, key: Tensor, value: Tensor, column: tuple[Run, ...], attend_all: Callable[..., Tensor]
) -> Tensor:
    """The same rows of all samples: (rows, B, heads * D)."""
    query = query[column[0].first_row : column[0].end_row]
    by_sample: dict[int, Tensor] = {}
    for num_keys, members in _alike(column).items():
        columns = query[:, members[0] : members[-1] + 1]
        if len(columns[0]) != len(members):
            columns = torch.cat([query[:, b : b + 1] for b in members], dim=1)
        if num_keys:
            ranges = [column[b].keys for b in members]
            out = attend_all(columns, _side_by_side(key, ranges), _side_by_side(value, ranges))
        else:
            out = columns.new_zeros(*columns.shape[:2], columns.shape[2] * columns.shape[3])
        if len(members) == len(column):
            return out
        by_sample.update(zip(members, out.split(1, dim=1), strict=True))
    return torch.cat([by_sample[b] for b in range(len(column))], dim=1)


def _alike(column: tuple[Run, ...]) -> dict[int, list[int]]:
    """Samples by their number of keys."""
    samples: dict[int, list[int]] = {}
    for b, run in enumerate(column):
        samples.setdefault(sum(end - start for start, end in run.keys), []).append(b)
    return samples


def _side_by_side(tokens: Tensor, ranges: list[tuple[tuple[int, int], ...]]) -> Tensor:
    """(N, 1, groups, D) -> (keys, samples, groups, D); a view where the samples' tokens follow one another."""
    flat = [one for of_sample in ranges for one in of_sample]
    if len(_join(flat)) == 1 and all(len(of_sample) == 1 for of_sample in ranges):
        return tokens[flat[0][0] : flat[-1][1], 0].unflatten(0, (len(ranges), -1)).transpose(0, 1)
    return torch.cat([_take(tokens, of_sample) for of_sample in ranges], dim=1)


def _take(tokens: Tensor, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    return _joined([tokens[start:end] for start, end in ranges], 0)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    """torch.cat, which copies a single part too."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
