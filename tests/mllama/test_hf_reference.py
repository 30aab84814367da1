"""What the two repairs of HF's classes change, and by how much HF is off without them."""

from __future__ import annotations

import pytest
import torch
from mllama_cases import CASES, Sample, hf_inputs, hf_model, make_batch

from vlmsft.mllama.hf_reference import load, repair

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)


def inputs(samples, seed=0):
    batch = make_batch(samples, seed)
    return hf_inputs(batch, (batch["tiles"] / 255 - MEAN) / STD)


@pytest.fixture(scope="module")
def models():
    return hf_model(), repair(hf_model())


@torch.no_grad()
def logits(model, arguments):
    return model(**arguments, use_cache=False).logits


def test_unpatched_hf_is_far_off(models, record_property):
    """The size of the error on this tiny model; weights are random, so a real model's error is another number.

    With transformers 4.57.6, image first (only the vision repair acts) and text first (both act).
    """
    plain, repaired = models
    for name, samples in {"image first": CASES["three tiles"], "text first": CASES["text before the image"]}.items():
        arguments = inputs(samples)
        expected, found = logits(repaired, arguments), logits(plain, arguments)
        difference = float((found - expected).abs().max())
        agreement = float((found.argmax(-1) == expected.argmax(-1)).float().mean())
        record_property(name, (difference, agreement))
        print(name, difference, agreement, float(expected.std()))
        assert difference > 0.05


def test_a_row_that_sees_no_image_is_what_it_is_without_images(models):
    """HF leaves the cross-attention layers out where there is no image; a row in front of the image must agree."""
    plain, repaired = models
    arguments = inputs((Sample(20, ((7, 2),)),))
    without_image = {"input_ids": arguments["input_ids"]}
    expected = logits(repaired, without_image)[:, :7]
    assert torch.allclose(logits(repaired, arguments)[:, :7], expected, atol=1e-6)
    assert float((logits(plain, arguments)[:, :7] - expected).abs().max()) > 0.05


def test_vision_features_are_the_layers_inputs(models):
    _, repaired = models
    tower = repaired.model.vision_model.transformer
    states = torch.randn(1, 8, tower.config.hidden_size)
    output = tower(states)
    assert torch.equal(output.hidden_states[0], states)
    assert len(output.hidden_states) == len(tower.layers)


def test_text_only_is_untouched(models):
    plain, repaired = models
    arguments = inputs((Sample(16),))
    assert torch.equal(logits(plain, arguments), logits(repaired, arguments))


def test_generation_with_a_cache_gives_the_tokens_of_full_forwards(models):
    _, repaired = models
    arguments = inputs((Sample(12, ((3, 2),)),))
    prompt = {
        **arguments,
        "input_ids": arguments["input_ids"][:, :12],
        "cross_attention_mask": arguments["cross_attention_mask"][:, :12],
    }
    generated = repaired.generate(**prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(generated[:, :12], prompt["input_ids"])
    grown = prompt
    for step in range(5):
        token = logits(repaired, grown)[:, -1].argmax(-1, keepdim=True)
        assert torch.equal(generated[:, 12 + step : 13 + step], token)
        mask = grown["cross_attention_mask"]
        grown = {
            **grown,
            "input_ids": torch.cat([grown["input_ids"], token], dim=1),
            "cross_attention_mask": torch.cat([mask, mask[:, -1:]], dim=1),
        }


def test_load_reads_what_transformers_saved(models, tmp_path):
    _, repaired = models
    repaired.save_pretrained(tmp_path)
    arguments = inputs(CASES["two tiles"])
    loaded = load(str(tmp_path))
    assert loaded.config.architectures == ["MllamaForConditionalGeneration"]
    assert torch.equal(logits(loaded, arguments), logits(repaired, arguments))
