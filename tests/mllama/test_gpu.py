"""On a GPU: TransformerEngine's layers, bf16, and NeMo's stock classes as they are.

Run with `pytest -m gpu tests/mllama/test_gpu.py -s` where torch, TransformerEngine 2.9 and NeMo 2.7.3 are installed.
The model has about 800M parameters: NeMo's tower is 1280 wide and at least 31 layers deep whatever the config says.
"""

from __future__ import annotations

import os

import pytest
import torch
from bf16_cases import apart, assert_equally_far, outcome, precision
from mllama_cases import CASES, TILE, build, inputs_of, make_batch, nemo_inputs, on_device, randomise, swap_images
from nemo_forks import Forked, environment, wait_for_all

pytestmark = pytest.mark.gpu

TEXT = {
    "num_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 512,
    "num_cross_attention_layers": 2,
    "vocab_size": 320,
    "seq_length": 128,
}
VISION = {"num_layers": 32, "num_global_layers": 8, "vision_chunk_size": TILE, "text_hidden_size": 256}


@pytest.fixture(scope="module", autouse=True)
def nccl():
    """Megatron's groups for one GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    from megatron.core import parallel_state, tensor_parallel

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29533")
    torch.distributed.init_process_group("nccl", rank=0, world_size=1, device_id=torch.device("cuda", 0))
    parallel_state.initialize_model_parallel(1)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def build_ours(dtype, layers, **settings):
    from vlmsft.mllama.config import MLlamaConfig, TextConfig, VisionConfig

    config = MLlamaConfig(
        layers=layers,
        language_model_config=TextConfig(**TEXT),
        vision_model_config=VisionConfig(**VISION),
        **precision(dtype),
        **settings,
    )
    return config.configure_model().cuda()


def build_stock():
    from nemo.collections.vlm.mllama.model import base

    class Tokenizer:
        vocab_size = TEXT["vocab_size"]

    common = precision(torch.bfloat16)
    config = base.MLlamaModelConfig(
        language_model_config=base.CrossAttentionTextConfig(**TEXT, **common),
        vision_model_config=base.CrossAttentionVisionConfig(**VISION, **common),
        **common,
    )
    return config.configure_model(Tokenizer()).cuda()


def copy_weights(source, target):
    state = {key: value for key, value in source.state_dict().items() if not key.endswith("_extra_state")}
    outcome = target.load_state_dict(state, strict=False)
    assert outcome.unexpected_keys == []
    assert [key for key in outcome.missing_keys if not key.endswith("_extra_state")] == []
    return target


@pytest.fixture(scope="module")
def reference(nccl):
    """Ours in fp32 on TransformerEngine's layers, random weights, open gates."""
    model = build_ours(torch.float32, "transformer_engine")
    randomise(model)
    return model


@pytest.fixture(scope="module")
def ours(reference):
    return copy_weights(reference, build_ours(torch.bfloat16, "transformer_engine"))


@pytest.fixture(scope="module")
def stock(reference):
    return copy_weights(reference, build_stock())


def on_gpu(batch):
    return on_device(batch, "cuda")


@torch.no_grad()
def logits_of(model, batch):
    return model(**inputs_of(on_gpu(batch))).float()


def stock_inputs(ours, batch):
    arguments = nemo_inputs(batch, ours.vision_model.normalise(batch["tiles"].cuda()).cpu())
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


@torch.no_grad()
def stock_logits(stock, ours, batch):
    return stock(**stock_inputs(ours, batch)).float()


@pytest.mark.parametrize("name", CASES)
def test_stock_and_ours_are_equally_far_from_fp32(reference, ours, stock, name):
    """bf16 rounds each model's own way, so the two are compared through ours in fp32."""
    batch = make_batch(CASES[name])
    exact = logits_of(reference, batch)
    noise = (logits_of(ours, batch) - exact).square().mean().sqrt()
    of_stock = (stock_logits(stock, ours, batch) - exact).square().mean().sqrt()
    other = (logits_of(reference, swap_images(batch)) - exact).square().mean().sqrt()
    print({"case": name, "ours": float(noise), "stock": float(of_stock), "other images": float(other)})
    assert other > 3 * noise
    assert of_stock < 2 * noise
    assert noise < 2 * of_stock


@pytest.mark.parametrize("name", ["mixed tile counts", "images in a row"])
def test_losses_and_gradients_of_stock_and_ours_are_equally_far_from_fp32(reference, ours, stock, name):
    """Gradients of all weights. As test_bf16.py on a CPU, whose stock model has none of TransformerEngine's layers."""
    batch = make_batch(CASES[name])
    labels, inputs = batch["labels"].cuda(), inputs_of(on_gpu(batch))
    exact = outcome(reference, inputs, labels)
    of_ours = apart(outcome(ours, inputs, labels), exact)
    of_stock = apart(outcome(stock, stock_inputs(ours, batch), labels), exact)
    others = apart(outcome(reference, inputs_of(on_gpu(swap_images(batch))), labels), exact)
    print({"case": name, "ours": of_ours, "stock": of_stock, "other images": others})
    assert ours.language_model.decoder.is_lean
    assert_equally_far(of_stock, of_ours, others)


class TestFp8:
    """Frozen matrices in fp8 (vlmsft.mllama.fp8). Figures of the full model: benchmarks/train_gpu.py --compare."""

    @pytest.mark.parametrize("width", [1280, 5120])
    def test_kernel_computes_what_torchs_functions_do(self, width):
        from vlmsft.mllama import fp8, fp8_rows

        generator = torch.Generator("cuda").manual_seed(width)
        rows, branch, weight, bias = (
            torch.randn(*shape, width, generator=generator, device="cuda", dtype=torch.bfloat16)
            for shape in ((1777,), (1777,), (), ())
        )
        norm, gate = fp8_rows.Norm(weight, bias, 1e-5), torch.tensor([0.7], device="cuda", dtype=torch.bfloat16)

        def outcomes():
            yield fp8_rows.quantise_rows(rows)
            yield fp8_rows.norm_quantise(rows, norm)
            for tanh in (True, False):
                yield fp8_rows.gelu_quantise(rows, bias, tanh)
            for one in (gate, None):
                rounded, summed = fp8_rows.add_norm_quantise(rows, branch, one, norm)
                yield rounded
                yield fp8.quantise(summed)

        found = list(outcomes())
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(fp8_rows, "_has_kernel", lambda rows: False)
            expected = list(outcomes())
        for (number, scale), (expected_number, expected_scale) in zip(found, expected, strict=True):
            assert torch.allclose(scale, expected_scale, rtol=2**-7)
            apart = number.float() * scale - expected_number.float() * expected_scale
            # where e4m3 has two neighbours to choose from, one may take the other: a step of up to 1/8
            assert float(apart.norm()) < 0.02 * float((expected_number.float() * expected_scale).norm())

    @pytest.mark.parametrize("shape", [(28672, 4096), (6144, 4096), (48, 80)])
    def test_transposed_copy(self, shape):
        from vlmsft.mllama import fp8_kernels

        numbers = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
        found = fp8_kernels.transpose(numbers.view(torch.float8_e4m3fn)).view(torch.uint8)
        assert found.is_contiguous() and torch.equal(found, numbers.t())

    @pytest.mark.parametrize("number", [1, 2048, 1777])
    def test_product(self, number):
        from vlmsft.mllama import fp8

        generator = torch.Generator("cuda").manual_seed(number)
        rows, weight = (
            torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)
            for shape in ((number, 1280), (5120, 1280))
        )
        found, expected = fp8.multiply(fp8.quantise(rows), fp8.quantise(weight)), rows.float() @ weight.float().t()
        # two factors of 3 bits behind the leading one: 0.0374 for normally distributed ones
        assert 0.03 < float((found.float() - expected).norm() / expected.norm()) < 0.045

    @pytest.mark.parametrize("way", ["eager", "compiled"])
    @pytest.mark.parametrize("size", [1.0, 1e-6, 1e-10], ids=["1", "1e-6", "1e-10"])
    def test_gradients_through_a_text_layer(self, way, size):
        """As far from bf16's as fp8 makes them, whatever the size of the gradient that comes in."""
        from vlmsft.mllama import fp8, lean

        found = {}
        for rounds in (False, True):
            rows, gradient, linears = draw_layer(1777, 2048, 7168, fp8.quantise if rounds else lambda weight: None)
            run = lean._run if way == "compiled" else lambda function, rows, *args: function(*rows, *args)
            output = run(lean.behind_self, rows, *linears, 1e-5)
            output.backward(gradient * size)
            adapters = {f"{n}.{of}": getattr(linear, of) for n, linear in enumerate(linears) for of in ("down", "up")}
            grads = {of: p.grad.float() / size for of, p in {"attended": rows[1], "rows": rows[0], **adapters}.items()}
            found[rounds] = {"output": output.detach().float(), **grads}
        for of, expected in found[False].items():
            far = float((found[True][of] - expected).norm() / expected.norm())
            print({"way": way, "size": size, "of": of, "relative difference": far})
            assert 0.01 < far < 0.1, of

    @pytest.mark.parametrize("which", ["tower", "all"])
    @pytest.mark.parametrize("name", ["mixed tile counts", "images in a row", "text-only beside images"])
    def test_distance_from_fp32(self, reference, name, which):
        """Logits, losses and gradients of LoRA on the text decoder; bf16 and other images beside it."""
        exact, in_bf16, in_fp8 = (
            with_text_lora(copy_weights(reference, build_ours(dtype, "transformer_engine", frozen_fp8=eight)))
            for dtype, eight in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, which))
        )
        batch, others = make_batch(CASES[name]), swap_images(make_batch(CASES[name]))
        labels = batch["labels"].cuda()
        expected, logits = outcome(exact, inputs_of(on_gpu(batch)), labels), logits_of(exact, batch)
        far = {}
        for what, model, given in (("bf16", in_bf16, batch), ("fp8", in_fp8, batch), ("others", exact, others)):
            of_logits = float((logits_of(model, given) - logits).square().mean().sqrt())
            of_labels = apart(outcome(model, inputs_of(on_gpu(given)), labels), expected)
            far[what] = {"logits": of_logits, "losses": of_labels.losses, "gradients": of_labels.gradients}
        print({"case": name, "which": which, **far})
        in_tower = in_fp8.vision_model.vision_encoder.transformer.layers[0].mlp.linear_fc1
        in_text = in_fp8.language_model.decoder.layers[0].self_attention.linear_qkv.to_wrap
        assert in_tower.quantised is not None
        assert (getattr(in_text, "quantised", None) is not None) == (which == "all")
        most = {"tower": 10, "all": 20}[which]
        for of in ("logits", "losses", "gradients"):
            assert 1.2 * far["bf16"][of] < far["fp8"][of] < most * far["bf16"][of], of
            assert far["others"][of] > 1.5 * far["fp8"][of], of

    @pytest.mark.parametrize("which", ["tower", "all"])
    def test_a_step_never_waits_for_the_gpu(self, reference, which):
        model = with_text_lora(
            copy_weights(reference, build_ours(torch.bfloat16, "transformer_engine", frozen_fp8=which))
        )
        batch = inputs_of(on_gpu(make_batch(CASES["images in a row"])), labels=True)
        assert_a_step_never_waits(model, batch)


def draw_layer(number, width, inner, quantise):
    """(rows, attended), a gradient, and proj, fc1, fc2 with adapters, as lean.behind_self takes them; in bf16."""
    from vlmsft.mllama import lean

    generator = torch.Generator("cuda").manual_seed(number)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator, device="cuda")).bfloat16()

    def linear(inputs, outputs, norm=None):
        weight = draw(outputs, inputs, scale=inputs**-0.5)
        down = draw(8, inputs, scale=inputs**-0.5).requires_grad_()
        up = draw(outputs, 8, scale=0.1).requires_grad_()
        return lean.Linear(weight, None, norm, down, up, 4.0, 0.0, True, quantise(weight))

    norm = 1 + draw(width, scale=0.1)
    rows = tuple(draw(number, width).requires_grad_() for _ in range(2))
    linears = linear(width, width), linear(width, 2 * inner, norm), linear(inner, width)
    return rows, draw(number, width), linears


def with_text_lora(model):
    from nemo.collections.llm.fn.base import walk
    from nemo.collections.vlm.peft import LoRA

    model.requires_grad_(False)
    targets = [f"*language_model.*.{name}" for name in ("linear_qkv", "linear_q", "linear_kv")]
    walk(model, LoRA(target_modules=targets, dim=4, alpha=8, dropout=0.0).transform)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".adapter." in name:
                scale = 0.1 if "linear_out" in name else 1.0
                p.copy_(torch.randn(p.shape, generator=generator) * scale / p.shape[1] ** 0.5)
    return model.cuda()


@pytest.fixture(scope="module")
def portable(reference):
    return copy_weights(reference, build_ours(torch.float32, "torch"))


@pytest.mark.parametrize("name", ["mixed tile counts", "images in a row", "text-only beside images"])
def test_torch_layers_equal_transformer_engines(reference, portable, name):
    """fp32; TransformerEngine multiplies in TF32, hence the tolerance."""
    batch = make_batch(CASES[name])
    expected = logits_of(reference, batch)
    difference = (logits_of(portable, batch) - expected).square().mean().sqrt() / expected.std()
    print({"case": name, "relative difference": float(difference)})
    assert difference < 2e-2


def test_checkpoint_keys_are_the_stock_ones(ours, stock):
    def shapes(model):
        return {key: tuple(getattr(value, "global_shape", ())) for key, value in model.sharded_state_dict().items()}

    assert shapes(ours) == shapes(stock)
    assert shapes(build_ours(torch.bfloat16, "torch")) == shapes(stock)


def test_auto_takes_transformer_engine():
    from vlmsft.mllama.layers import resolve_layers

    assert resolve_layers("auto") == "transformer_engine"


@pytest.mark.parametrize("trained", ["all", "behind a frozen tower"])
def test_a_step_never_waits_for_the_gpu(ours, trained):
    batch = inputs_of(on_gpu(make_batch(CASES["images in a row"])), labels=True)
    ours.vision_model.vision_encoder.requires_grad_(trained == "all")
    try:
        assert_a_step_never_waits(ours, batch)
    finally:
        ours.zero_grad()
        ours.vision_model.vision_encoder.requires_grad_(True)


def assert_a_step_never_waits(model, batch):
    for _ in range(3):  # kernels are compiled and constants copied at first
        model(**batch).mean().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch).mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_tensor_parallel_ranks_equal_one(tmp_path):
    """The compiled functions and the ranks' sums between them. On one GPU, over gloo: NCCL wants one for each rank."""
    from tensor_parallel_worker import main_on_gpu
    from test_tensor_parallel import computed_by_one

    torch.save(computed_by_one(build().module.cuda()), tmp_path / "expected.pt")
    ranks = [Forked(main_on_gpu, rank, tmp_path, folder=tmp_path, environment=environment()) for rank in range(2)]
    wait_for_all(ranks, seconds=300)


def test_lora_equals_merged_weights(reference):
    """NeMo's LoRA on TransformerEngine's fused norm and linear, in fp32."""
    from nemo.collections.llm.fn.base import walk
    from nemo.collections.llm.peft.lora import LoRALinear
    from nemo.collections.vlm.peft import LoRA

    model = copy_weights(reference, build_ours(torch.float32, "transformer_engine"))
    walk(model, LoRA(target_modules=["linear_fc1", "linear_q"], dim=4, alpha=8).transform)
    merged = copy_weights(reference, build_ours(torch.float32, "transformer_engine"))
    model.cuda()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, LoRALinear):
                for p in module.adapter.parameters():
                    p.normal_(std=0.1)
                delta = module.adapter.linear_out.weight @ module.adapter.linear_in.weight
                merged.get_parameter(f"{name}.weight").add_(2.0 * delta)
    batch = make_batch(CASES["mixed tile counts"])
    expected = logits_of(merged, batch)
    assert (expected - logits_of(reference, batch)).square().mean().sqrt() > 0.05 * expected.std()
    assert (logits_of(model, batch) - expected).square().mean().sqrt() < 2e-2 * expected.std()
