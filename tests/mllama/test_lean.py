"""Layers as plain functions: what Megatron's classes compute, gradients included, compiled and not."""

from __future__ import annotations

import functools
import logging
import random

import pytest
import torch
from mllama_cases import CASES, TARGETS, add_adapters, build, inputs_of, make_batch, with_lora

from vlmsft.errors import UserError
from vlmsft.mllama.attention import Run, attend, attend_runs, plan_cross_attention

pytestmark = [pytest.mark.nemo, pytest.mark.usefixtures("megatron")]


def losses_and_gradients(model, batch, lean_forward):
    core = getattr(model, "module", model)
    core.config.lean_forward = lean_forward
    model.zero_grad()
    losses = model(**inputs_of(batch, labels=True))
    losses.sum().backward()
    return losses.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert float((found[0] - expected[0]).abs().max()) < 1e-5
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert float((found[1][name] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-6, name


@pytest.fixture(scope="module", params=["full", "lora"])
def model(request, megatron):
    return build() if request.param == "full" else with_lora(TARGETS)


@pytest.mark.parametrize("case", CASES)
def test_equals_megatrons_classes(model, case):
    batch = make_batch(CASES[case])
    assert_same(losses_and_gradients(model, batch, True), losses_and_gradients(model, batch, False))


def test_compiled_once_for_any_number_of_rows(model, monkeypatch):
    """As on a GPU, but for the kernels: torch's tracing and its split into forward and backward."""
    from torch._dynamo.utils import counters

    from vlmsft.mllama import lean

    monkeypatch.setattr(lean, "_compiles", lambda like: True)
    monkeypatch.setattr(lean, "_compiled", functools.cache(functools.partial(torch.compile, backend="aot_eager")))
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    for case in ("two tiles", "mixed tile counts", "several images", "images in a row"):
        batch = make_batch(CASES[case])
        expected = losses_and_gradients(model, batch, False)
        with torch._dynamo.config.patch(disable=False):
            assert_same(losses_and_gradients(model, batch, True), expected)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * 4
    assert 5 <= graphs[0] <= 7  # five functions, of which two run in a first layer whose input may need no gradient
    assert not counters["graph_break"]


def test_a_function_that_does_not_compile_is_an_error(monkeypatch):
    """NeMo tells torch.compile to go on without a word, uncompiled."""
    from vlmsft.mllama import lean

    def fails(graph, inputs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(lean, "_compiles", lambda like: True)
    monkeypatch.setattr(lean, "_compiled", functools.cache(functools.partial(torch.compile, backend=fails)))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(disable=False), pytest.raises(Exception, match="no such kernel"):
        build()(**inputs_of(make_batch(CASES["one tile"])))


def test_whatever_the_layout_that_the_attention_kernel_writes(monkeypatch):
    """torch's kernels differ: some keep the query's, others write sample by sample."""
    from torch.nn import functional

    model, batch, kernel = build(), make_batch(CASES["mixed tile counts"]), functional.scaled_dot_product_attention
    expected = losses_and_gradients(model, batch, True)

    def by_sample(*args, **kwargs):
        return kernel(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", by_sample)
    assert_same(losses_and_gradients(model, batch, True), expected)


class TestChoice:
    @pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_full_backward_hook"])
    def test_a_hook_is_not_passed_over(self, register):
        model, called = build(), []
        batch = make_batch(CASES["one tile"])
        expected = losses_and_gradients(model, batch, None)
        linear = model.module.language_model.decoder.layers[0].mlp.linear_fc2
        handle = getattr(linear, register)(lambda *_: called.append(1))
        assert_same(losses_and_gradients(model, batch, None), expected)
        assert called
        handle.remove()
        losses_and_gradients(model, batch, None)
        assert len(called) == 1

    @pytest.mark.parametrize(
        ("name", "targets", "reason"),
        [
            ("DoRA", TARGETS, "DoRALinear is no LoRALinear"),
            ("CanonicalLoRA", ["linear_q", "linear_k", "linear_v"], "LoRALinearSplitQKV is no LoRALinear"),
        ],
    )
    def test_other_adapters_need_megatrons_classes(self, name, targets, reason):
        """Also where they come after a forward pass."""
        from nemo.collections.llm import peft

        model, batch = build(), make_batch(CASES["one tile"])
        model(**inputs_of(batch))
        add_adapters(model, getattr(peft, name)(target_modules=targets, dim=4, alpha=8))
        found = losses_and_gradients(model, batch, None)
        assert model.module.megatron_because() == reason
        assert_same(found, losses_and_gradients(model, batch, False))

    def test_wanted_and_not_possible(self):
        model = build()
        model.module.config.lean_forward = True
        model.module.language_model.decoder.layers[0].mlp.register_forward_hook(lambda *_: None)
        with pytest.raises(UserError) as caught:
            model(**inputs_of(make_batch(CASES["one tile"])))
        (problem,) = caught.value.problems
        assert problem.where == "model.config.lean_forward"
        assert problem.expected == "null or false where PortableNormMLP has a forward hook"

    @pytest.mark.parametrize(
        ("name", "value"), [("hidden_dropout", 0.1), ("rotary_percent", 0.5), ("recompute_granularity", "selective")]
    )
    def test_other_arithmetic_needs_megatrons_classes(self, name, value):
        model = build(text={name: value})
        assert model.module.megatron_because() == f"{name} is {value}"

    def test_a_change_is_said(self, caplog):
        model, batch = build(), inputs_of(make_batch(CASES["one tile"]))
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="vlmsft.mllama.model"):
            model(**batch)
            assert not caplog.messages
            model.module.config.lean_forward = False
            model(**batch)
            model.module.config.lean_forward = None
            model(**batch)
        reasons = ["Megatron's classes: lean_forward is false", "plain functions"]
        assert caplog.messages == [f"from now on layers run as {reason}" for reason in reasons]


def test_each_module_with_weights_is_called():
    """Megatron gathers an optimizer's shards in hooks of the modules that own the weights."""
    model = build()
    model.module.config.lean_forward = False
    owners = {name: module for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    called = set()
    for name, module in owners.items():
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    model(**inputs_of(make_batch(CASES["two tiles"])))
    assert called == set(owners)


class TestColumns:
    @staticmethod
    def plan(num_samples, sample, tokens, first, last):
        return plan_cross_attention(num_samples, 10, sample, tokens, first, last)

    def test_samples_of_different_length_share_columns(self):
        columns = self.plan(2, [0, 1], [4, 8], [2, 2], [7, 9]).columns
        assert columns == ((Run(0, 2, ()),) * 2, (Run(2, 10, ((0, 4),)), Run(2, 10, ((4, 12),))))

    def test_a_sample_without_image_joins_in(self):
        columns = self.plan(2, [1], [4], [2], [9]).columns
        assert columns == ((Run(0, 2, ()),) * 2, (Run(2, 10, ()), Run(2, 10, ((0, 4),))))

    def test_never_more_calls_than_runs(self):
        """Random plans, of which many have no columns and many do."""
        numbers, with_columns = random.Random(0), 0
        for _ in range(200):
            plan = random_plan(numbers)
            calls = []

            def attend_all(query, key, value, calls=calls):
                calls.append(key.shape[0])
                return query.flatten(2)

            attend_runs(
                torch.zeros(40, len(plan.samples), 1, 1),
                torch.zeros(99, 1, 1, 1),
                torch.zeros(99, 1, 1, 1),
                plan,
                attend_all,
            )
            assert len(calls) <= sum(bool(run.keys) for runs in plan.samples for run in runs)
            with_columns += plan.columns is not None
        assert 20 < with_columns < 180

    def test_with_and_without_columns_the_same(self):
        """Each row sees the tokens that the plan says; rows behind the last image are not looked at."""
        numbers, kinds = random.Random(1), set()
        for _ in range(40):
            plan = random_plan(numbers)
            kinds.add(plan.columns is None)
            query, key, value = (
                torch.randn(40, len(plan.samples), 4, 8),
                torch.randn(99, 1, 2, 8),
                torch.randn(99, 1, 2, 8),
            )
            found = attend_runs(query, key, value, plan)
            for b, runs in enumerate(plan.samples):
                for run in runs:
                    if not run.keys:
                        continue
                    seen = [token for first, end in run.keys for token in range(first, end)]
                    rows = slice(run.first_row, run.end_row)
                    expected = attend(query[rows, b : b + 1], key[seen], value[seen])
                    assert torch.allclose(found[rows, b : b + 1], expected, atol=1e-5)
        assert kinds == {True, False}


def random_plan(numbers):
    """One to eight samples of up to 40 rows with up to three images of 1 to 4 tokens each, one after the other."""
    sample, tokens, first, last = [], [], [], []
    num_samples = numbers.randint(1, 8)
    for b in range(num_samples):
        rows = sorted(numbers.sample(range(30), numbers.randint(1, 3)))
        sample += [b] * len(rows)
        tokens += [numbers.randint(1, 4) for _ in rows]
        first += rows
        last += [*rows[1:], numbers.randint(31, 40)]
    return plan_cross_attention(num_samples, 40, sample, tokens, first, last)
