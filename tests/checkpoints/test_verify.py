"""The export gate fails for what it must fail for. That it passes is shown in tests/test_export_ckpt.py, with NeMo."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_cases import expected_tensors, hf_config
from export_cases import swap_gate_and_up, write_lively_folder

from vlmsft.checkpoints import verify
from vlmsft.checkpoints.hf_folder import HFFolder, write_weights
from vlmsft.checkpoints.verify import (
    TOLERANCE,
    Answer,
    Question,
    compare,
    compare_tensors,
    exported_answer,
    micro_batch,
    questions,
    raise_differences,
)
from vlmsft.data.encode import SampleEncoder
from vlmsft.errors import UserError
from vlmsft.mllama.hf_mapping import Sizes
from vlmsft.mllama.hf_reference import load


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return write_lively_folder(tmp_path_factory.mktemp("hf") / "tiny", hf_config())


def no_progress(num_bytes):
    pass


def test_equal_tensors_pass(hf):
    sizes = Sizes.from_hf(hf_config())
    assert compare_tensors(HFFolder(hf), expected_tensors(hf), sizes, no_progress) == 84


@pytest.mark.parametrize("fault", ["swapped", "one bit", "another dtype"])
def test_a_wrong_tensor_is_named(hf, tmp_path, fault):
    tensors = dict(HFFolder(hf))
    name = "vision_model.vision_encoder.transformer.layers.1.mlp.linear_fc1.bias"
    if fault == "swapped":
        tensors, name = swap_gate_and_up(tensors), "language_model.decoder.layers.1.mlp.linear_fc1.weight"
    elif fault == "one bit":
        bias = tensors["model.vision_model.transformer.layers.1.mlp.fc1.bias"]
        bias[0] = torch.nextafter(bias[0], torch.tensor(torch.inf))
    else:
        tensors["model.vision_model.transformer.layers.1.mlp.fc1.bias"] = torch.zeros(128, dtype=torch.float64)
    shutil.copy(hf / "config.json", tmp_path)
    write_weights(tmp_path, tensors.items(), 10**9)
    with pytest.raises(UserError) as error:
        compare_tensors(HFFolder(tmp_path), expected_tensors(hf), Sizes.from_hf(hf_config()), no_progress)
    assert error.value.problems[0].where == name


@pytest.fixture(scope="module")
def asked():
    return questions(None, None, 3)


def test_questions_of_the_packaged_set_without_a_file(asked):
    assert len(asked) == 3 and all(question.images for question in asked)
    assert asked[0].name == "validation.jsonl 1 (astronaut.jpg)"
    assert len({question.name for question in asked}) == 3


def test_questions_of_the_runs_own_file(tmp_path, asked):
    from vlmsft.config_files import sample_set

    shutil.copy(f"{sample_set()}/images/cat.jpg", tmp_path / "mine.jpg")
    (tmp_path / "mine.jsonl").write_text(
        '{"conversations": [{"from": "human", "value": "no image"}, {"from": "gpt", "value": "A"}]}\n'
        '{"image": "mine.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, '
        '{"from": "gpt", "value": "A"}]}\n'
    )
    (found,) = questions(str(tmp_path / "mine.jsonl"), str(tmp_path), 2)
    assert (found.name, found.text, len(found.images)) == ("mine.jsonl 2 (mine.jpg)", "What?", 1)
    (tmp_path / "mine.jpg").unlink()  # images that are gone: the packaged ones do
    names = [question.name for question in questions(str(tmp_path / "mine.jsonl"), str(tmp_path), 3)]
    assert names == [question.name for question in asked]


def with_model_inputs(folder: Path) -> Path:
    """The packaged processor's tokenizer returns token_type_ids, as the export puts right."""
    from vlmsft.export_ckpt import TOKENIZER_CONFIG, name_model_inputs

    name_model_inputs(folder / TOKENIZER_CONFIG)
    return folder


def test_both_sides_are_asked_the_same(hf, asked):
    """Logits of HF's model from the batch for ours are those from HF's own processor."""
    encoder = SampleEncoder(str(hf), 1 << 20)
    model = load(str(hf), dtype="auto")
    answer = exported_answer(model, with_model_inputs(hf), encoder, asked[0])
    batch = micro_batch(encoder, asked[0], answer.tokens)
    statistics = encoder.processor.image_processor
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (statistics.image_mean, statistics.image_std))
    tiles = (batch["tiles"] / 255 - mean) / std
    pixels = torch.zeros(1, 1, 4, *tiles.shape[1:])
    pixels[0, 0, : len(tiles)] = tiles
    cross = torch.zeros(1, len(answer.tokens), 1, 4)
    cross[0, batch["visible_from"][0] : batch["visible_until"][0], 0, : len(tiles)] = 1
    with torch.no_grad():
        logits = model(
            input_ids=batch["tokens"],
            pixel_values=pixels,
            aspect_ratio_ids=batch["aspect_ratio_ids"][None],
            aspect_ratio_mask=(torch.arange(4) < len(tiles)).long()[None, None],
            cross_attention_mask=cross,
        ).logits[0]
    assert float((logits - answer.logits).abs().max()) < 1e-5
    assert len(answer.tokens) == answer.num_prompt_tokens + 16


def test_another_chat_template_is_found(hf, asked, tmp_path):
    folder = Path(shutil.copytree(hf, tmp_path / "copy"))
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "\n ")
    with pytest.raises(UserError, match="the exported tokenizer or chat template"):
        exported_answer(None, with_model_inputs(folder), SampleEncoder(str(hf), 1 << 20), asked[0])


def case(difference: float, asked):
    """A comparison of logits that are `difference` (a part of their deviation) apart everywhere."""
    exact = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([torch.arange(5), exact[4:8].argmax(-1)])
    return compare(asked[0], Answer(tokens, 5, exact + difference * exact.std(), "text"), exact, exact)


def test_difference_is_in_deviations(asked):
    comparison = case(0.25, asked)
    assert comparison.difference == pytest.approx(0.25, rel=1e-4)
    assert (comparison.num_tokens, comparison.num_equal_tokens, comparison.worst_gap) == (4, 4, 0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_worst_question_is_named(asked, dtype):
    tolerance = TOLERANCE[dtype]
    good, bad = case(0.9 * tolerance, asked), case(1.1 * tolerance, [Question("the bad one", "?", ())])
    raise_differences([good, good], tolerance)
    with pytest.raises(UserError, match="the bad one"):
        raise_differences([good, bad, good], tolerance)


def test_another_greedy_token_is_a_difference(asked):
    exact = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([torch.arange(5), exact[4:8].argmin(-1)])
    comparison = compare(asked[0], Answer(tokens, 5, exact, "text"), exact, exact)
    with pytest.raises(UserError, match="0 of 4 greedy tokens equal"):
        raise_differences([comparison], 1e-4)


def test_without_nemo(monkeypatch):
    monkeypatch.setattr(verify, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="verify=false"):
        verify.require_nemo()


def test_swapped_gate_and_up_change_the_logits_beyond_each_tolerance(hf, asked, record_property):
    """The gate's second half alone finds it, also in bfloat16."""
    encoder = SampleEncoder(str(hf), 1 << 20)
    with_model_inputs(hf)
    for dtype, tolerance in TOLERANCE.items():
        right, wrong = load(str(hf), dtype=dtype), load(str(hf), dtype=dtype)
        wrong.load_state_dict(swap_gate_and_up(wrong.state_dict()))
        expected, found = (exported_answer(model, hf, encoder, asked[0]) for model in (right, wrong))
        length = found.num_prompt_tokens  # up to there both saw the same tokens
        prompt = Answer(found.tokens[: length + 1], length, found.logits[:length], "")
        comparison = compare(asked[0], prompt, expected.logits[:length], expected.logits[:length])
        record_property(str(dtype), comparison.difference)
        assert comparison.difference > 3 * tolerance, dtype
