"""What the model does with its inputs: losses, idle parameters, freezing, refused settings, the batch step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mllama_cases import CASES, Sample, build, inputs_of, make_batch

pytestmark = [pytest.mark.nemo, pytest.mark.usefixtures("megatron")]


@pytest.fixture(scope="module")
def model(megatron):
    return build()


def test_losses_are_per_token_and_zero_without_a_label(model):
    batch = make_batch(CASES["mixed tile counts"])
    with torch.no_grad():
        losses, logits = model(**inputs_of(batch, labels=True)), model(**inputs_of(batch))
    expected = F.cross_entropy(logits.transpose(1, 2), batch["labels"], ignore_index=-100, reduction="none")
    assert losses.shape == batch["labels"].shape
    assert torch.allclose(losses, expected, atol=1e-5)
    assert torch.equal(losses == 0, batch["labels"] == -100)


@pytest.mark.parametrize("case", ["mixed tile counts", "several images"])
def test_logits_of_answer_rows_are_enough(model, case):
    from vlmsft.mllama.step import answer_rows

    batch = inputs_of(make_batch(CASES[case]), labels=True)
    gradients = []
    for rows in (None, answer_rows(batch["labels"])):
        model.zero_grad()
        losses = model(**batch, answer_rows=rows)
        losses.sum().backward()
        gradients.append((losses.detach(), [p.grad.clone() for p in model.parameters()]))
    (every, expected), (few, got) = gradients
    assert torch.allclose(few, every, atol=1e-6) and float(every.sum()) > 0
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True))
    model.zero_grad()


def test_a_batch_without_answers_still_touches_every_parameter(model):
    batch = inputs_of(make_batch(CASES["several images"]), labels=True)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    model.zero_grad()
    model(**batch, answer_rows=torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()


@pytest.mark.parametrize("trainable", ["", "linear_q"], ids=["everything trains", "one kind of matrix trains"])
def test_recomputed_layers_give_the_same_gradients_with_dropout(trainable):
    """The second case is LoRA's: the first layers' inputs need no gradient."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states = get_cuda_rng_tracker().get_states()
    batch, results, layer_runs = inputs_of(make_batch(CASES["several images"]), labels=True), [], []
    for granularity in (None, "full"):
        part = {"recompute_granularity": granularity, "attention_dropout": 0.1, "hidden_dropout": 0.1}
        model = build(text=part, vision=part)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable in name)
        runs = []
        model.module.language_model.decoder.layers[1].mlp.register_forward_pre_hook(
            lambda *_, runs=runs: runs.append(1)
        )
        model.train()
        torch.manual_seed(5)
        get_cuda_rng_tracker().set_states(dict(states))  # it keeps the one that it is given
        losses = model(**batch)
        losses.sum().backward()
        results.append((losses.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
        layer_runs.append(len(runs))
    (kept, expected), (recomputed, got) = results
    assert layer_runs == [1, 2]
    assert torch.equal(kept, recomputed)
    assert all(torch.allclose(got[name], gradient, atol=1e-6) for name, gradient in expected.items())


def test_loss_reduction_takes_them(model):
    batch = make_batch(CASES["several images"])
    losses = model.forward_step(batch)
    total, count, _ = model.training_loss_reduction.forward(batch, losses)
    assert int(count) == int((batch["labels"] != -100).sum())
    assert torch.allclose(total, losses.sum())


def test_text_only_batch_touches_every_trainable_parameter(model):
    model.zero_grad()
    model(**inputs_of(make_batch((Sample(12), Sample(9))), labels=True)).sum().backward()
    untouched = [name for name, p in model.named_parameters() if p.grad is None]
    assert untouched == []
    only_images = [p for name, p in model.named_parameters() if "vision_model" in name or "xattn" in name]
    assert len(only_images) > 50
    assert all(float(p.grad.abs().max()) == 0 for p in only_images)
    model.zero_grad()


def test_images_that_no_row_sees_are_skipped(model):
    """A prompt cut in front of its image: nothing to attend to, nothing to compute, every parameter still touched."""
    batch = make_batch((Sample(12, ((3, 2),)),))
    hidden = {**batch, "visible_until": batch["visible_from"].clone()}
    model.zero_grad()
    losses = model(**inputs_of(hidden, labels=True))
    losses.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    text_only = {name: batch[name] for name in ("tokens", "position_ids", "labels")}
    assert torch.equal(losses, model(**text_only))
    model.zero_grad()


def test_tiles_that_dont_fit_their_counts_are_refused(model):
    batch = make_batch(CASES["two tiles"])
    with pytest.raises(ValueError, match="num_tiles"):
        model(**inputs_of({**batch, "tiles": batch["tiles"][:1]}))
    with pytest.raises(ValueError, match="aspect ratio ids"):
        model(**inputs_of({**batch, "aspect_ratio_ids": torch.tensor([1])}))


def test_pixels_are_normalised_as_transformers_does(model):
    from transformers import MllamaImageProcessor

    tile = make_batch(CASES["one tile"])["tiles"]
    config = model.config.vision_model_config
    processor = MllamaImageProcessor(image_mean=config.image_mean, image_std=config.image_std)
    rescaled = processor.rescale(tile[0].numpy(), processor.rescale_factor)
    image = processor.normalize(rescaled, processor.image_mean, processor.image_std, input_data_format="channels_first")
    assert float((model.module.vision_model.normalise(tile)[0] - torch.from_numpy(image)).abs().max()) < 2.4e-7


class TestFreezing:
    @pytest.mark.parametrize(
        ("switch", "prefix"),
        [
            ("freeze_language_model", "module.language_model."),
            ("freeze_vision_model", "module.vision_model.vision_encoder."),
            ("freeze_vision_projection", "module.vision_model.vision_projection."),
        ],
    )
    def test_a_switch_freezes_its_part_and_no_other(self, switch, prefix):
        model = build(**{switch: True})
        for name, p in model.named_parameters():
            assert p.requires_grad != name.startswith(prefix), name

    def test_projector_trains_behind_a_frozen_tower(self, model):
        frozen = build(freeze_vision_model=True)
        batch = make_batch(CASES["mixed tile counts"])
        found = {}
        for kind, each in {"free": model, "frozen": frozen}.items():
            each.zero_grad()
            each(**inputs_of(batch, labels=True)).sum().backward()
            found[kind] = {name: p.grad for name, p in each.named_parameters()}
            each.zero_grad()
        for name, gradient in found["frozen"].items():
            if "vision_encoder" in name:
                assert gradient is None
            else:
                assert torch.allclose(gradient, found["free"][name], rtol=1e-4, atol=1e-5), name

    def test_a_frozen_tower_leaves_no_graph(self, monkeypatch):
        frozen = build(freeze_vision_model=True)
        seen = []
        projection = frozen.module.vision_model.vision_projection
        monkeypatch.setattr(projection, "forward", lambda x: seen.append(x.requires_grad) or x[..., :64])
        frozen(**inputs_of(make_batch(CASES["one tile"])))
        assert seen == [False]

    def test_a_frozen_tower_has_no_dropout(self):
        frozen = build(vision={"hidden_dropout": 0.5, "attention_dropout": 0.5}, freeze_vision_model=True)
        frozen.train()
        batch = inputs_of(make_batch(CASES["one tile"]))
        assert torch.equal(frozen(**batch), frozen(**batch))


class TestConfig:
    def test_sub_configs_follow_the_top_config(self):
        model = build(bf16=True, params_dtype=torch.bfloat16, autocast_dtype=torch.bfloat16)
        for part in (model.config.language_model_config, model.config.vision_model_config):
            assert part.bf16
            assert part.params_dtype is torch.bfloat16
            assert part.autocast_dtype is torch.bfloat16
            assert part.use_cpu_initialization
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        losses = model(**inputs_of(make_batch(CASES["mixed tile counts"]), labels=True))
        assert losses.dtype is torch.float32
        assert bool(losses.isfinite().all())

    def test_per_token_loss_survives_nemos_copying(self):
        model = build(calculate_per_token_loss=True)
        model.config.__post_init__()  # the strategy does this once more
        assert model.config.calculate_per_token_loss

    def test_what_the_model_cannot_do_is_refused_by_name(self):
        with pytest.raises(ValueError) as refused:
            build(pipeline_model_parallel_size=2, context_parallel_size=2, sequence_parallel=True, fp8="hybrid")
        names = [problem.split()[0] for problem in str(refused.value).split("; ")]
        assert names == ["pipeline_model_parallel_size", "context_parallel_size", "fp8", "sequence_parallel"]

    def test_sizes_that_dont_fit_are_named_together(self):
        with pytest.raises(ValueError) as refused:
            build(vision={"intermediate_layers_indices": [2, 9], "patch_size": 15, "max_num_tiles": 2})
        names = [problem.split()[0] for problem in str(refused.value).split("; ")]
        assert names == ["vision_chunk_size", "intermediate_layers_indices", "max_num_tiles"]

    def test_unknown_layers_are_refused(self):
        from vlmsft.errors import UserError

        with pytest.raises(UserError, match="transformer_engine"):
            build(layers="transformers_engine")

    def test_context_keeps_our_fields(self):
        """NeMo rebuilds the config from its constructor's arguments: ours must be among them."""
        from nemo.lightning import io

        config = build(freeze_vision_model=True).config
        again = io.reinit(config)
        assert again.freeze_vision_model
        assert again.vision_model_config.intermediate_layers_indices == [0, 2, 3]
        assert again.vision_model_config.ffn_hidden_size == 80


class TestStep:
    @pytest.mark.parametrize("wrap", [lambda batch: batch, lambda batch: (batch, 0, 0)])
    def test_data_step_takes_both_forms(self, wrap):
        from vlmsft.mllama.step import data_step

        batch = make_batch(CASES["several images"])
        moved = data_step(iter([wrap(batch)]))
        assert moved.keys() == batch.keys() | {"answer_rows", "data_wait_seconds"}
        assert all(torch.equal(moved[name], batch[name]) for name in batch)
        assert torch.equal(moved["answer_rows"], torch.nonzero(batch["labels"].flatten() != -100).flatten())

    def test_steering_tensors_stay_on_the_host(self, monkeypatch):
        from vlmsft.mllama import step

        moved = []

        class Traced(torch.Tensor):
            def to(self, *args, **kwargs):
                moved.append(self.key)
                return self

        batch = {}
        for name, value in make_batch(CASES["several images"]).items():
            batch[name] = value.as_subclass(Traced)
            batch[name].key = name
        rows = torch.zeros(1).as_subclass(Traced)
        rows.key = "answer_rows"
        monkeypatch.setattr(step, "answer_rows", lambda labels: rows)
        step.data_step(iter([batch]))
        assert sorted(moved) == sorted(step.DEVICE_TENSORS)
