"""Loading: what is refused, and that the weights arrive; checkpoints of real runs are in test_callback.py."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from generation_toys import PROCESSOR, hf_config, randomise

from vlmsft.errors import UserError
from vlmsft.generation.model import build, load_model


def test_weights_are_those_of_the_folder(loaded, hf_folder):
    from transformers import MllamaForConditionalGeneration

    expected = MllamaForConditionalGeneration.from_pretrained(hf_folder).state_dict()
    found = loaded.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not loaded.model.training


def test_rotary_frequencies_are_made_anew(loaded):
    from transformers import MllamaForConditionalGeneration

    expected = MllamaForConditionalGeneration(hf_config()).model.language_model.rotary_emb.inv_freq
    assert torch.equal(loaded.model.model.language_model.rotary_emb.inv_freq, expected)


def test_end_tokens_are_the_templates_the_tokenizers_and_the_folders(loaded):
    assert loaded.end_token_ids == {497, 504, 505}


def test_dtype(hf_folder):
    model = load_model(hf_folder, device="cpu", dtype="bfloat16").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "where"),
    [({"device": "cuda:63"}, "device"), ({"device": "abacus"}, "device"), ({"dtype": "int8"}, "dtype")],
)
def test_unknown_device_and_dtype(hf_folder, arguments, where):
    with pytest.raises(UserError) as error:
        load_model(hf_folder, **arguments)
    assert error.value.problems[0].where == where


def test_no_such_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        load_model("nowhere", device="cpu")


def test_truncated_file(hf_folder, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(hf_folder, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        load_model(folder, device="cpu")


def test_processor_of_another_vocabulary(hf_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(hf_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = config["image_token_index"] = 500
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="lm_head"):
        load_model(folder, device="cpu")


def test_missing_unknown_and_misshapen_weights_are_all_named():
    from transformers import MllamaForConditionalGeneration

    model = MllamaForConditionalGeneration(hf_config())
    randomise(model)
    weights = dict(model.state_dict())
    del weights["lm_head.weight"]
    weights["model.multi_modal_projector.bias"] = torch.zeros(3)
    weights["model.extra"] = torch.zeros(1)
    with pytest.raises(UserError) as error:
        build(hf_config(), weights.items(), torch.device("cpu"), torch.float32)
    named = {problem.where for problem in error.value.problems}
    assert named == {"lm_head.weight", "model.multi_modal_projector.bias", "model.extra"}


def test_processor_can_be_named(hf_folder, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(hf_folder, folder, ignore=shutil.ignore_patterns("*token*", "*processor*", "*.jinja"))
    with pytest.raises(UserError, match="processor"):
        load_model(folder, device="cpu")
    assert load_model(folder, device="cpu", processor=PROCESSOR).encoder.processor_path == PROCESSOR
