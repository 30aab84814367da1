"""Frozen matrices in fp8: what the products are, how far losses and gradients get from fp32, what is left alone."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from bf16_cases import apart, outcome, precision
from mllama_cases import CASES, TARGETS, build, inputs_of, make_batch, swap_images, with_lora
from test_bf16 import copy_weights, draw_adapters

from vlmsft.errors import UserError
from vlmsft.mllama import fp8

pytestmark = [pytest.mark.nemo, pytest.mark.usefixtures("megatron")]


IN_TEXT = [f"*language_model.*.{name}" for name in ("linear_qkv", "linear_q", "linear_kv")]


class TestProducts:
    def test_each_row_has_its_scale(self):
        rows = torch.tensor([[1.0, -448.0], [448e-6, 1e-6], [0.0, 0.0], [3e30, 1e30], [3e-30, 1e-30]])
        quantised, scale = fp8.quantise(rows)
        assert quantised.dtype == torch.float8_e4m3fn and scale.shape == (5, 1)
        found = quantised.float() * scale
        assert torch.allclose(found, rows, rtol=2**-4, atol=0)
        assert torch.equal(found[2], rows[2])

    def test_the_largest_number_is_held_whatever_it_is(self):
        """Rounded up to more than e4m3 holds, it would be NaN."""
        rows = torch.rand(4096, 1, generator=torch.Generator().manual_seed(0)) * 1e3
        quantised, scale = fp8.quantise(rows.bfloat16())
        assert torch.allclose(quantised.float() * scale, rows, rtol=2**-8)

    @pytest.mark.parametrize("number", [1, 7, 48])
    def test_product_is_that_of_rounded_factors(self, number):
        generator = torch.Generator().manual_seed(number)
        weight = torch.randn(96, 64, generator=generator) * torch.logspace(-3, 3, 96).unsqueeze(1)
        rows = torch.randn(number, 64, generator=generator).bfloat16()
        found = fp8.multiply(fp8.quantise(rows), fp8.quantise(weight.bfloat16()))
        assert found.dtype == torch.bfloat16
        expected = rounded(rows) @ rounded(weight.bfloat16()).t()
        assert torch.allclose(found.float(), expected, rtol=1e-2, atol=1e-2 * float(weight.norm()) / 96)


def rounded(rows):
    quantised, scale = fp8.quantise(rows)
    return quantised.float() * scale


class TestGradient:
    """fp8.project: forwards as multiply, backwards with the same rounded matrix."""

    @staticmethod
    def outcome(x, weight, gradient):
        x = x.detach().requires_grad_()
        y = fp8.project(x, fp8.quantise(weight))
        y.backward(gradient)
        return y.detach(), x.grad

    @staticmethod
    def draw(dtype, number=20):
        """x, weight with outputs of many sizes, and a gradient of the outputs."""
        generator = torch.Generator().manual_seed(number)
        weight = torch.randn(96, 64, generator=generator) * torch.logspace(-4, 0, 96).unsqueeze(1)
        x, gradient = (torch.randn(number, width, generator=generator) for width in (64, 96))
        return (tensor.to(dtype) for tensor in (x, weight, gradient))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("number", [1, 20])
    def test_is_that_of_rounded_factors(self, dtype, number):
        x, weight, gradient = self.draw(dtype, number)
        y, of_x = self.outcome(x, weight, gradient)
        numbers, scale = fp8.quantise(weight)
        assert (y.dtype, of_x.dtype) == (dtype, dtype)
        assert apart_by(y, rounded(x) @ (numbers.float() * scale).t()) < 4e-3  # the result's own rounding to bf16
        assert apart_by(of_x, rounded(gradient.float() * scale.t()) @ numbers.float()) < 4e-3
        assert 0.01 < apart_by(of_x, gradient.float() @ weight.float()) < 0.06

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_size_costs_no_precision(self, dtype):
        """Losses are divided by many tokens, and an output's scale makes the rows smaller again. Powers of two change
        no digit."""
        x, weight, gradient = self.draw(dtype)
        _, expected = self.outcome(x, weight, gradient)
        for exponent in (-10, -20, -33, -50, -66):  # to 1e-20
            _, found = self.outcome(x, weight, gradient * 2.0**exponent)
            assert torch.equal(found * 2.0**-exponent, expected), exponent

    def test_rows_keep_to_themselves(self):
        """A row of zeros has a gradient of zero, beside rows of any size."""
        x, weight, gradient = self.draw(torch.float32, 6)
        _, expected = self.outcome(x, weight, gradient)
        sizes = torch.tensor([1.0, 0.0, 2.0**-40, 2.0**40, 0.0, 2.0**-66]).unsqueeze(1)
        assert torch.equal(self.outcome(x, weight, gradient * sizes)[1], expected * sizes)

    def test_what_is_no_number_stays_none(self):
        x, weight, gradient = self.draw(torch.float32, 3)
        gradient[1, 5] = float("inf")
        gradient[2, 5] = float("nan")
        assert self.outcome(x, weight, gradient)[1].isnan().any(dim=1).tolist() == [False, True, True]

    def test_whatever_the_layout(self):
        x, weight, gradient = self.draw(torch.float32)
        expected = self.outcome(x, weight, gradient)
        found = self.outcome(x.t().contiguous().t(), weight, gradient.t().contiguous().t())
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        ones = torch.ones_like(gradient)
        assert torch.equal(self.outcome(x, weight, torch.ones(()).expand_as(ones))[1], self.outcome(x, weight, ones)[1])


def apart_by(found, expected):
    return float((found.float() - expected).norm() / expected.norm())


KERNEL = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from vlmsft.mllama import fp8_kernels, fp8_rows
fp8_kernels.E4M3 = torch.float32  # the interpreter's own rounding to e4m3 is off
def quantise(rows):
    largest = rows.abs().amax(1, keepdim=True).clamp(min=fp8_kernels.SMALLEST_ROW)
    return rows * (448 / largest), largest / 448
fp8_rows.quantise = quantise
flat = lambda rounded, summed: (*rounded, summed)
torch.manual_seed(0)
for width in (48, 80):
    x, branch, weight, bias = (torch.randn(*shape, width) for shape in ((7,), (7,), (), ()))
    x[2] = 0
    x[3] *= 1e-20
    norm, gate = fp8_rows.Norm(weight, bias, 1e-5), torch.tensor([0.7])
    calls = [
        lambda: fp8_rows.norm_quantise(x, norm),
        lambda: fp8_rows.quantise_rows(x),
        lambda: fp8_rows.gelu_quantise(x, bias, True),
        lambda: fp8_rows.gelu_quantise(x, bias, False),
        lambda: flat(*fp8_rows.add_norm_quantise(x, branch, gate, norm)),
        lambda: flat(*fp8_rows.add_norm_quantise(x, branch, None, norm)),
    ]
    for call in calls:
        found = []
        for has_kernel in (True, False):
            fp8_rows._has_kernel = lambda rows: has_kernel
            found.append(call())
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
        print("same")
for height, width in ((48, 80), (256, 384), (400, 16)):
    numbers = torch.randint(0, 256, (height, width), dtype=torch.uint8).view(torch.float8_e4m3fn)
    turned = fp8_kernels.transpose(numbers).view(torch.uint8)
    assert turned.is_contiguous() and torch.equal(turned, numbers.view(torch.uint8).t())
    print("same")
"""


def test_the_kernels_compute_what_torchs_functions_do():
    """In Triton's interpreter, in a process of its own: Triton reads the switch when it is imported."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", KERNEL], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same") == 2 * 6 + 3


MODELS = {"fp32": {}, "bf16": {}, "tower": {"frozen_fp8": "tower"}, "all": {"frozen_fp8": "all"}}
# how many times as far from fp32 as bf16; measured: 3 to 4 and 8 to 11
FARTHER = {"tower": (1.5, 6), "all": (4, 16)}


@pytest.fixture(scope="module")
def models(megatron):
    """LoRA on the text decoder in fp32, in bf16, and in bf16 with the tower or all in fp8; the same weights."""
    from nemo.collections.llm.fn.base import walk
    from nemo.collections.vlm.peft import LoRA

    low = precision(torch.bfloat16)
    found = {name: build(**({} if name == "fp32" else low), **fp8).module for name, fp8 in MODELS.items()}
    for model in found.values():
        model.requires_grad_(False)
        walk(model, LoRA(target_modules=IN_TEXT, dim=4, alpha=8).transform)
    draw_adapters(found["fp32"])
    for model in found.values():
        copy_weights(found["fp32"], model)
    return {name: model if name == "fp32" else model.bfloat16() for name, model in found.items()}


@pytest.mark.parametrize("name", ["four tiles", "mixed tile counts", "several images", "images in a row"])
def test_distance_from_fp32(models, name, record_property):
    """Other images are farther. docs/one_gpu.md has the full model's figures."""
    batch = make_batch(CASES[name])
    found = {of: distance(model, batch, models["fp32"], batch) for of, model in models.items() if of != "fp32"}
    found["others"] = distance(models["fp32"], swap_images(batch), models["fp32"], batch)
    record_property("from fp32", found)
    print({"case": name, **found})
    for of in ("losses", "gradients", "logits"):
        for which, (least, most) in FARTHER.items():
            assert least * found["bf16"][of] < found[which][of] < most * found["bf16"][of], (which, of)
        assert found["others"][of] > 5 * found["tower"][of], of
        assert found["others"][of] > 2 * found["all"][of], of


def distance(model, batch, exact, exact_batch):
    labels = batch["labels"]
    outcomes = apart(outcome(model, inputs_of(batch), labels), outcome(exact, inputs_of(exact_batch), labels))
    logits = logits_of(model, batch) - logits_of(exact, exact_batch)
    return {**asdict(outcomes), "logits": float(logits.square().mean().sqrt())}


@torch.no_grad()
def logits_of(model, batch):
    return model(**inputs_of(batch)).float()


def test_adapters_train_as_in_bf16(models):
    """Ten steps on one micro batch: the losses stay together while they fall."""
    batch = make_batch(CASES["mixed tile counts"])
    mask, falls = batch["labels"] != -100, []
    for model in models.values():
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        optimizer, losses = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02), []
        for _ in range(10):
            optimizer.zero_grad()
            loss = model(**inputs_of(batch, labels=True)).float()[mask].mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        optimizer.zero_grad()
        falls.append(losses)
        with torch.no_grad():
            for name, value in before.items():
                model.get_parameter(name).copy_(value)
    exact, _, *in_fp8 = falls
    print([[round(loss, 3) for loss in losses] for losses in falls])
    assert exact[-1] < exact[0] - 1
    for losses in in_fp8:
        assert max(abs(a - b) for a, b in zip(losses, exact, strict=True)) < 0.1 * (exact[0] - exact[-1])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_text_layers_in_fp8(models, monkeypatch, backend):
    """As on a GPU, but for the kernels. inductor's round at other places: as far from fp32, not the same."""
    from torch._dynamo.utils import counters

    from vlmsft.mllama import lean

    assert backend != "inductor" or shutil.which("g++"), "torch.compile needs Debian's g++"
    monkeypatch.setattr(lean, "_compiled", functools.cache(functools.partial(torch.compile, backend=backend)))
    torch._dynamo.reset()
    counters.clear()
    graphs, saved = [], set()

    def keep(tensor):
        saved.update([tensor.data_ptr()] if tensor.dtype == fp8.E4M3 else [])
        return tensor

    for name in ("two tiles", "mixed tile counts", "several images"):
        batch = make_batch(CASES[name])
        exact, eager = (outcome(models[of], inputs_of(batch), batch["labels"]) for of in ("fp32", "all"))
        with monkeypatch.context() as on_gpu, torch._dynamo.config.patch(disable=False):
            on_gpu.setattr(lean, "_compiles", lambda like: True)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                compiled = outcome(models["all"], inputs_of(batch), batch["labels"])
        eager, compiled = apart(eager, exact), apart(compiled, exact)
        print({"case": name, "backend": backend, "eager": eager, "compiled": compiled})
        if backend == "aot_eager":
            assert compiled == eager
        assert compiled.losses < 1.5 * eager.losses and compiled.gradients < 1.5 * eager.gradients
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * 3 and graphs[0] > 0
    assert not counters["graph_break"]
    kept = {module.quantised[0].data_ptr() for module in matrices(models["all"], "text").values()}
    assert saved and saved <= kept, "no copy of a matrix waits for the backward pass"


def matrices(model, part="tower"):
    """{name: module} of all that fp8 could hold."""
    core = getattr(model, "module", model)
    of = {"tower": core.vision_model.vision_encoder, "text": core.language_model.decoder}[part]
    named = {name: module for name, module in of.named_modules() if name.rpartition(".")[2] in fp8.MATRICES}
    return {name: getattr(module, "to_wrap", module) for name, module in named.items()}


class TestWhatIsRounded:
    @pytest.mark.parametrize("targets", [None, TARGETS], ids=["full", "LoRA on text and tower"])
    def test_no_tower_that_trains(self, targets):
        """Its passes have no gradient in fp8."""
        batch = inputs_of(make_batch(CASES["mixed tile counts"]), labels=True)
        model = build(frozen_fp8="tower") if targets is None else with_lora(targets, frozen_fp8="tower")
        model(**batch).sum().backward()
        assert all(module.quantised is None for module in matrices(model).values())

    def test_each_matrix_of_the_text_decoder_that_does_not_train(self):
        """With adapters on all of them, of which all train, and behind a tower that trains too."""
        model = with_lora(TARGETS, frozen_fp8="all")
        batch = inputs_of(make_batch(CASES["mixed tile counts"]), labels=True)
        model(**batch).sum().backward()
        assert all(module.quantised is None for module in matrices(model).values())
        in_text = matrices(model, "text")
        assert len(in_text) == 4 * 4 + 2 * 5
        assert all(module.quantised is not None for module in in_text.values())
        assert all(float(p.grad.norm()) > 0 for p in model.parameters() if p.requires_grad)

        in_text["layers.1.mlp.linear_fc1"].weight.requires_grad_()
        model(**batch).sum().backward()
        trained = [name for name, module in in_text.items() if module.quantised is None]
        assert trained == ["layers.1.mlp.linear_fc1"]
        assert float(in_text[trained[0]].weight.grad.norm()) > 0

    def test_nothing_of_a_text_decoder_that_trains(self):
        model, plain = (build(freeze_vision_model=True, frozen_fp8=which) for which in ("all", "tower"))
        batch = inputs_of(make_batch(CASES["two tiles"]))
        assert torch.equal(model(**batch), plain(**batch))
        assert all(module.quantised is None for module in matrices(model, "text").values())

    def test_what_a_validation_rounds_is_trained_with(self):
        model, batch = with_lora(IN_TEXT, frozen_fp8="all"), inputs_of(make_batch(CASES["two tiles"]), labels=True)
        with torch.inference_mode():
            model(**batch)
        model(**batch).sum().backward()
        assert all(float(p.grad.norm()) > 0 for p in model.parameters() if p.requires_grad)

    def test_layers_that_are_computed_twice(self):
        batch, found = inputs_of(make_batch(CASES["mixed tile counts"]), labels=True), []
        for granularity in (None, "full"):
            text = {"recompute_granularity": granularity, "recompute_method": "uniform", "recompute_num_layers": 1}
            model = with_lora(IN_TEXT, frozen_fp8="all", text=text)
            model.train()(**batch).sum().backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
        assert torch.equal(*found)

    def test_no_tower_with_adapters_that_are_frozen_or_come_late(self):
        from nemo.collections.llm.fn.base import walk
        from nemo.collections.vlm.peft import LoRA

        batch = inputs_of(make_batch(CASES["two tiles"]))
        model, plain = (build(freeze_vision_model=True, frozen_fp8=which) for which in ("tower", None))
        with torch.no_grad():
            assert not torch.equal(model(**batch), plain(**batch))
            for one in (model, plain):
                walk(one.module, LoRA(target_modules=["*vision_encoder*linear_fc1"], dim=4, alpha=8).transform)
                draw_adapters(one)
                one.requires_grad_(False)
            assert torch.equal(model(**batch), plain(**batch))
        assert all(module.quantised is None for module in matrices(model).values())

    @pytest.mark.parametrize("which", ["tower", "all"])
    def test_what_is_frozen_and_nothing_else_of_the_model_sees_it(self, which):
        model = with_lora(IN_TEXT, frozen_fp8=which)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        model(**inputs_of(make_batch(CASES["mixed tile counts"]), labels=True)).sum().backward()
        found = [*matrices(model).values(), *(matrices(model, "text").values() if which == "all" else ())]
        assert len(found) == 6 * 4 + (4 * 4 + 2 * 5) * (which == "all")
        assert sum(module.quantised[0].nbytes for module in found) == counted(model, which)
        for name, p in model.named_parameters():
            assert torch.equal(p, weights[name])
            assert (p.grad is not None) == (".adapter." in name), name
        assert set(model.state_dict()) == set(with_lora(IN_TEXT).state_dict())

    def test_a_changed_matrix_is_rounded_anew(self):
        model, batch = build(freeze_vision_model=True, frozen_fp8="tower"), inputs_of(make_batch(CASES["two tiles"]))
        name = "module.vision_model.vision_encoder.transformer.layers.1.mlp.linear_fc1"
        with torch.no_grad():
            first, module = model(**batch), model.get_submodule(name)
            kept = module.quantised
            model(**batch)
            assert module.quantised is kept
            module.weight.mul_(0.5)
            second = model(**batch)
            module.weight.data = 2 * module.weight.data
            third = model(**batch)
        assert not torch.equal(first, second)
        assert torch.equal(first, third)


def counted(model, which):
    """What a plan counts for them."""
    from vlmsft.mllama.memory import fp8_bytes
    from vlmsft.runtime.summary import mllama_shapes, training_of

    shapes = mllama_shapes(model)
    assert shapes is not None
    return fp8_bytes(*shapes, training_of(model), which)


class TestRefused:
    def test_megatrons_classes(self):
        with pytest.raises(UserError, match="frozen_fp8: found tower, but lean_forward is false"):
            build(frozen_fp8="tower", lean_forward=False)(**inputs_of(make_batch(CASES["one tile"])))
        model = build(frozen_fp8="tower")
        model.module.language_model.decoder.layers[0].mlp.register_forward_hook(lambda *_: None)
        with pytest.raises(UserError, match="frozen_fp8: found tower, but PortableNormMLP has a forward hook"):
            model(**inputs_of(make_batch(CASES["one tile"])))

    def test_another_word(self):
        with pytest.raises(UserError, match=r"found 'towr', expected tower, all or null\. Did you mean 'tower'"):
            build(frozen_fp8="towr")

    def test_sizes(self):
        model = build(frozen_fp8="tower", vision={"ffn_hidden_size": 100})
        with pytest.raises(UserError, match="a matrix of 100 x 48, expected sizes that are multiples of 16"):
            model(**inputs_of(make_batch(CASES["one tile"])))
        model = build(frozen_fp8="all", text={"ffn_hidden_size": 100})
        with pytest.raises(UserError, match="found all, and a matrix of 200 x 64, expected"):
            model(**inputs_of(make_batch(CASES["one tile"])))

    def test_matrices_that_are_split(self):
        with pytest.raises(UserError, match="found all with tensor_model_parallel_size 2, expected null, or"):
            fp8.require_possible("all", 2)

    def test_a_gpu_without_fp8(self, monkeypatch):
        fp8.require_possible("tower")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
        with pytest.raises(UserError, match=r"tower on NVIDIA A100 with .* 8\.0, expected a GPU of 8\.9"):
            fp8.require_possible("tower")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        fp8.require_possible("tower")
