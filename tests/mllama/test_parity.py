"""vlmsft's MLlama against NeMo's stock forward and against HF's repaired one: same logits, same gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mllama_cases import (
    CASES,
    TEXT,
    VISION,
    Sample,
    build,
    hf_inputs,
    hf_model,
    inputs_of,
    make_batch,
    nemo_inputs,
    swap_images,
)

pytestmark = pytest.mark.nemo

LOGITS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


def gradients(model, logits, labels):
    """Gradients of the mean loss by name; the model's own gradients are left empty."""
    model.zero_grad()
    F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def largest_difference(ours, theirs):
    """The largest relative difference over all parameters, with its name.

    The gates count as one vector: a gate's gradient is a single number, a sum that may nearly cancel (in float64 the
    one that is 2e-4 off here is right to 4e-5, and its value is a thousandth of its neighbours').
    """
    assert ours.keys() == theirs.keys()
    ours, theirs = _gates_together(ours), _gates_together(theirs)
    floor = 1e-6 * max(float(g.norm()) for g in theirs.values())
    relative = {
        name: float((ours[name] - theirs[name]).norm()) / max(float(theirs[name].norm()), floor) for name in theirs
    }
    return max((value, name) for name, value in relative.items())


def _gates_together(gradients):
    together = {name: gradient for name, gradient in gradients.items() if gradient.numel() > 1}
    gates = sorted(gradients.keys() - together.keys())
    together["gates"] = torch.cat([gradients[name].flatten() for name in gates])
    return together


def reports(record_property, **numbers):
    for name, value in numbers.items():
        record_property(name, value)
    print(numbers)


@pytest.fixture(scope="module")
def stock_models(megatron):
    """(ours, NeMo's stock) with the same weights."""
    from mllama_stock import build_stock

    ours = build()
    with pytest.MonkeyPatch.context() as monkeypatch:
        stock = build_stock(TEXT, VISION, monkeypatch)
        stock.load_state_dict(ours.module.state_dict(), strict=True)
        yield ours.module, stock


@pytest.fixture(scope="module")
def hf_models(megatron):
    """(ours, HF's repaired) with the same weights."""
    from vlmsft.mllama.hf_mapping import Sizes, to_ours
    from vlmsft.mllama.hf_reference import repair

    reference = repair(hf_model())
    # HF's GELU is exact; NeMo's fused one approximates it with tanh
    ours = build(vision={"bias_activation_fusion": False})
    weights = dict(to_ours(reference.state_dict(), Sizes.from_config(ours.config)))
    ours.module.load_state_dict(weights, strict=True)
    return ours.module, reference


class TestStock:
    def test_under_a_million_parameters(self, stock_models):
        assert sum(p.numel() for p in stock_models[0].parameters()) < 1_000_000

    @pytest.mark.parametrize("name", CASES)
    def test_logits_and_gradients(self, stock_models, name, record_property):
        ours, stock = stock_models
        batch = make_batch(CASES[name])
        logits = ours(**inputs_of(batch))
        expected = stock(**nemo_inputs(batch, ours.vision_model.normalise(batch["tiles"])))
        difference = float((logits - expected).abs().max())
        relative, parameter = largest_difference(
            gradients(ours, logits, batch["labels"]), gradients(stock, expected, batch["labels"])
        )
        reports(record_property, logits=difference, gradients=relative, parameter=parameter)
        assert difference < LOGITS_TOLERANCE
        assert relative < GRADIENT_TOLERANCE, parameter

    @pytest.mark.parametrize("name", CASES)
    def test_other_images_give_other_logits(self, stock_models, name):
        ours, _ = stock_models
        batch = make_batch(CASES[name])
        with torch.no_grad():
            logits, other = ours(**inputs_of(batch)), ours(**inputs_of(swap_images(batch)))
        assert float((logits - other).abs().max()) > 0.1

    def test_text_only_equals_a_slot_without_tiles(self, stock_models, record_property):
        ours, stock = stock_models
        batch = make_batch((Sample(16), Sample(11)))
        with torch.no_grad():
            logits = ours(**inputs_of(batch))
            expected = stock(**nemo_inputs(batch, torch.zeros(0, 3, 56, 56)))
        difference = float((logits - expected).abs().max())
        reports(record_property, logits=difference)
        assert difference < LOGITS_TOLERANCE

    def test_a_batch_gives_what_its_samples_give_alone(self, stock_models):
        ours, _ = stock_models
        samples = CASES["several images"]
        batch = make_batch(samples)
        with torch.no_grad():
            together = ours(**inputs_of(batch))
            alone = ours(**inputs_of(_only_sample(batch, 1)))
        assert torch.allclose(together[1:], alone, atol=1e-5)

    def test_later_image_is_seen_by_later_text_only(self, stock_models):
        ours, _ = stock_models
        batch = make_batch((Sample(24, ((1, 2), (9, 3))),))
        second = batch["tiles"].clone()
        second[2:] = 255 - second[2:]
        with torch.no_grad():
            logits, other = ours(**inputs_of(batch)), ours(**inputs_of({**batch, "tiles": second}))
        changed = (logits - other).abs().amax(-1)[0]
        assert float(changed[:9].max()) == 0
        assert float(changed[9:24].min()) > 1e-3


def _only_sample(batch, sample):
    keep = batch["image_sample"] == sample
    of_tile = torch.repeat_interleave(keep, batch["num_tiles"])
    host = {name: batch[name][keep] for name in ("num_tiles", "aspect_ratio_ids", "visible_from", "visible_until")}
    return {
        **{name: batch[name][sample : sample + 1] for name in ("tokens", "labels", "loss_mask", "position_ids")},
        "tiles": batch["tiles"][of_tile],
        "image_sample": batch["image_sample"][keep] - sample,
        **host,
    }


class TestHuggingFace:
    @pytest.mark.parametrize("name", CASES)
    def test_logits_and_gradients(self, hf_models, name, record_property):
        from vlmsft.mllama.hf_mapping import Sizes, to_ours

        ours, reference = hf_models
        batch = make_batch(CASES[name])
        logits = ours(**inputs_of(batch))
        expected = reference(**hf_inputs(batch, ours.vision_model.normalise(batch["tiles"])), use_cache=False).logits
        difference = float((logits - expected).abs().max())
        theirs = dict(to_ours(gradients(reference, expected, batch["labels"]), Sizes.from_config(ours.config)))
        relative, parameter = largest_difference(gradients(ours, logits, batch["labels"]), theirs)
        reports(record_property, logits=difference, gradients=relative, parameter=parameter)
        assert difference < LOGITS_TOLERANCE
        assert relative < GRADIENT_TOLERANCE, parameter

    def test_text_only(self, hf_models):
        ours, reference = hf_models
        batch = make_batch((Sample(16), Sample(11)))
        with torch.no_grad():
            difference = ours(**inputs_of(batch)) - reference(input_ids=batch["tokens"], use_cache=False).logits
        assert float(difference.abs().max()) < LOGITS_TOLERANCE

    def test_tanh_gelu_is_a_small_step_away(self, hf_models, record_property):
        """NeMo's default (bias_activation_fusion) computes the tower's GELU by tanh; HF and Meta by erf."""
        ours, reference = hf_models
        approximate = build()
        approximate.module.load_state_dict(ours.state_dict(), strict=True)
        batch = make_batch(CASES["mixed tile counts"])
        pixels = ours.vision_model.normalise(batch["tiles"])
        with torch.no_grad():
            expected = reference(**hf_inputs(batch, pixels), use_cache=False).logits
            difference = float((approximate.module(**inputs_of(batch)) - expected).abs().max())
        reports(record_property, logits=difference)
        assert LOGITS_TOLERANCE < difference < 1e-2
