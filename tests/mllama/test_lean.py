"""Layers as plain functions: what Megatron's classes compute, gradients included, compiled and not."""

from __future__ import annotations

import functools

import pytest
import torch
from mllama_cases import CASES, build, inputs_of, make_batch
from test_lora import TARGETS, with_lora

from vlmsft.mllama.attention import Run, plan_cross_attention

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


class TestChoice:
    def test_a_hook_is_not_passed_over(self):
        model, called = build(), []
        batch = inputs_of(make_batch(CASES["one tile"]))
        expected = model(**batch)
        linear = model.module.language_model.decoder.layers[0].mlp.linear_fc2
        handle = linear.register_forward_pre_hook(lambda *_: called.append(1))
        assert torch.allclose(model(**batch), expected, atol=1e-5)
        assert called
        handle.remove()
        model(**batch)
        assert len(called) == 1

    def test_wanted_and_not_possible(self):
        model = build()
        model.module.config.lean_forward = True
        model.module.language_model.decoder.layers[0].mlp.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="lean_forward is true, but PortableNormMLP has a forward hook"):
            model(**inputs_of(make_batch(CASES["one tile"])))

    @pytest.mark.parametrize(("name", "value"), [("hidden_dropout", 0.1), ("rotary_percent", 0.5)])
    def test_other_arithmetic_needs_megatrons_classes(self, name, value):
        model = build(text={name: value})
        model(**inputs_of(make_batch(CASES["one tile"])))
        assert model.module._megatron_because == f"{name} is {value}"


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

    def test_none_where_cuts_would_make_more_calls(self):
        plan = self.plan(3, [0, 1, 2], [4, 4, 4], [1, 3, 5], [9, 9, 9])
        assert plan.columns is not None
        assert self.plan(1, [0, 0], [4, 4], [1, 3], [3, 9]).columns is not None
        many = plan_cross_attention(2, 40, [0, 0, 0, 1, 1, 1], [4] * 6, [1, 5, 9, 3, 7, 11], [5, 9, 20, 7, 11, 20])
        assert many.columns is not None and len(many.columns) == 7
