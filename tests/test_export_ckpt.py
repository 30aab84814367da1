"""vlmsft export_ckpt: what comes out is what went in, or nothing comes out."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoProcessor, MllamaForConditionalGeneration

sys.path.append(str(Path(__file__).parent / "checkpoints"))
from checkpoint_cases import (
    TEXT,
    TEXT_OF_11B,
    VISION,
    VISION_OF_11B,
    assert_same,
    expected_tensors,
    hf_config,
    write_checkpoint,
    write_hf_folder,
)
from config_cases import compose
from export_cases import swap_gate_and_up, write_lively_folder
from nemo_forks import run_in_fork
from test_checkpoint_lora import adapters, write_lora

from vlmsft.checkpoints import verify
from vlmsft.checkpoints.hf_config import architecture
from vlmsft.checkpoints.hf_folder import HFFolder
from vlmsft.checkpoints.lora import merged
from vlmsft.checkpoints.nemo import NemoCheckpoint
from vlmsft.config_files import sample_set
from vlmsft.errors import UserError
from vlmsft.export_ckpt import export, problems_of_keys
from vlmsft.mllama import hf_mapping

DEFAULTS = {"which": "best", "format": "merged", "base": None, "verify": False, "verify_samples": 1}
PROCESSOR = {"tokenizer": {"pretrained_model_name": f"{sample_set()}/processor"}}
UNUSUAL_TEXT = {
    **TEXT,
    "rms_norm_eps": 1e-2,
    "rope_theta": 10000.0,
    "rope_scaling": {**TEXT["rope_scaling"], "factor": 4.0, "original_max_position_embeddings": 16},
}
UNUSUAL_VISION = {**VISION, "norm_eps": 1e-2, "intermediate_layers_indices": [0, 2], "vision_output_dim": 192}
"""Values that NeMo's own import and export pass over, of a size that shows."""


def run(checkpoint, output, **keys):
    export(str(checkpoint), str(output), **{**DEFAULTS, **keys})


def error_of(*arguments, **keys) -> str:
    with pytest.raises(UserError) as error:
        run(*arguments, **keys)
    return str(error.value)


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return write_hf_folder(tmp_path_factory.mktemp("hf") / "tiny", hf_config())


@pytest.fixture(scope="module")
def checkpoint(hf, tmp_path_factory) -> Path:
    """A checkpoint in a run folder."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text("name: demo\n")
    path = folder / "checkpoints" / "val_loss=0.5000-step=1"
    return write_checkpoint(path, hf_config(), expected_tensors(hf).items(), PROCESSOR)


# --- without comparing: no NeMo ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["tiny", "11B's layers"])
def test_hf_to_checkpoint_to_hf_is_exact_to_the_bit(layers, hf, checkpoint, tmp_path):
    if layers != "tiny":
        config = hf_config(TEXT_OF_11B, VISION_OF_11B)
        hf = write_hf_folder(tmp_path / "hf", config)
        checkpoint = write_checkpoint(tmp_path / "saved", config, expected_tensors(hf).items(), PROCESSOR)
    run(checkpoint, tmp_path / "out")
    source, back = HFFolder(hf), HFFolder(tmp_path / "out")
    back.check()
    assert_same(back, dict(source))
    assert architecture(back.config) == architecture(source.config)


def test_transformers_loads_it_at_once(checkpoint, hf, tmp_path, monkeypatch):
    run(checkpoint.parent.parent, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    model, info = MllamaForConditionalGeneration.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(info.values()) and model.dtype == torch.bfloat16
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    from PIL import Image

    image = Image.open(f"{sample_set()}/images/cat.jpg")
    inputs = processor(image, prompt, add_special_tokens=False, return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    assert "exported with `verify=false`" in (tmp_path / "out" / "README.md").read_text()
    assert model.generation_config.eos_token_id == [497, 504, 505]


def test_small_files_of_the_imported_model_come_back(hf, tmp_path):
    """A checkpoint that import_ckpt wrote keeps them in hf/."""
    path = write_checkpoint(tmp_path / "saved", hf_config(), expected_tensors(hf).items(), PROCESSOR)
    kept = path / "hf"
    shutil.copytree(f"{sample_set()}/processor", kept)
    config = {**json.loads((hf / "config.json").read_text()), "kept": 1}
    contents = {"config.json": config, "generation_config.json": {"temperature": 0.6, "do_sample": True}}
    for name, content in contents.items():
        (kept / name).write_text(json.dumps(content))
    (kept / "LICENSE.txt").write_text("licence")
    (kept / "chat_template.json").write_text('{"chat_template": "old"}')
    run(path, tmp_path / "out")
    out = tmp_path / "out"
    assert json.loads((out / "generation_config.json").read_text()) == contents["generation_config.json"]
    assert json.loads((out / "config.json").read_text())["kept"] == 1
    assert (out / "LICENSE.txt").read_text() == "licence"
    assert not (out / "chat_template.json").exists()  # transformers refuses it beside the other
    template = Path(sample_set(), "processor", "chat_template.jinja").read_text()
    assert AutoProcessor.from_pretrained(out).chat_template == template


@pytest.fixture(scope="module")
def lora(checkpoint, hf, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "saved"
    write_lora(path, hf_config(), checkpoint, adapters(expected_tensors(hf)))
    file = path / "context" / "model.yaml"
    file.write_text(file.read_text() + f"tokenizer:\n  pretrained_model_name: {sample_set()}/processor\n")
    return path


def test_lora_merged(lora, tmp_path):
    run(lora, tmp_path / "out")
    weights = merged(NemoCheckpoint(lora))
    assert_same(HFFolder(tmp_path / "out"), dict(hf_mapping.to_hf(weights, weights.sizes)))


def test_lora_as_an_adapter(lora, checkpoint, tmp_path):
    run(lora, tmp_path / "out", format="adapter", base="org/base")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "config.json").exists()
    AutoProcessor.from_pretrained(tmp_path / "out")
    assert "but" in error_of(checkpoint, tmp_path / "other", format="adapter")


def test_an_adapters_base_is_what_import_took_it_from(lora, checkpoint, tmp_path):
    base = Path(shutil.copytree(checkpoint, tmp_path / "base"))
    (base / "import.json").write_text('{"source": "hf://org/model@v1", "folder": "/cache"}')
    saved = Path(shutil.copytree(lora, tmp_path / "lora"))
    (saved / "weights" / "adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": str(base)}))
    run(saved, tmp_path / "out", format="adapter")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/model"


def test_an_output_that_exists_stays(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "expected a path where nothing is yet" in error_of(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_a_full_disk(checkpoint, tmp_path, monkeypatch):
    import collections

    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1, 1, 1000))
    assert "1.0 kB free on the file system at" in error_of(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_hf_cant_express(hf, tmp_path):
    path = write_checkpoint(tmp_path / "saved", hf_config(), expected_tensors(hf).items(), PROCESSOR)
    file = path / "context" / "model.yaml"
    file.write_text(file.read_text().replace("hidden_size: 128", "hidden_size: 128\n    rotary_percent: 0.5", 1))
    assert "language_model_config.rotary_percent: found 0.5" in error_of(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_tensors_leave_nothing_behind(checkpoint, tmp_path, monkeypatch):
    right = hf_mapping.to_hf

    def swapped(ours, sizes):
        yield from swap_gate_and_up(dict(right(ours, sizes))).items()

    monkeypatch.setattr(hf_mapping, "to_hf", swapped)
    monkeypatch.setattr("vlmsft.checkpoints.verify.require_nemo", lambda: None)
    message = error_of(checkpoint, tmp_path / "out", verify=True)
    assert message.startswith("language_model.decoder.layers.1.mlp.linear_fc1.weight: found an exported tensor that")
    assert list(tmp_path.iterdir()) == []


def test_every_wrong_key_at_once():
    overrides = ["checkpoint=x", "output=y", "which=newest", "format=gguf", "base=b", "verify=1", "verify_samples=0"]
    cfg = compose(*overrides, config_name="export_ckpt")
    keys = [problem.where for problem in problems_of_keys(cfg)]
    assert keys == ["which", "format", "verify", "verify_samples", "base"]


# --- comparing with the checkpoint's own model ------------------------------------------------------------------------


@pytest.fixture(scope="class")
def imported(tmp_path_factory) -> Path:
    """A checkpoint, as import_ckpt writes it, of a model with unusual values."""
    from vlmsft.import_ckpt import import_model

    folder = tmp_path_factory.mktemp("imported")
    hf = write_lively_folder(folder / "hf", hf_config(UNUSUAL_TEXT, UNUSUAL_VISION))
    import_model(str(hf), folder / "saved", None, None)
    return folder / "saved"


@pytest.mark.nemo
class TestComparing:
    @pytest.fixture
    def checkpoints_model_in_a_fork(self, monkeypatch):
        """Spares NeMo's import; the first test starts the process as a user's export does."""
        monkeypatch.setattr(verify, "subprocess", SimpleNamespace(run=run_in_fork))

    def test_the_gate_passes_and_the_card_says_so(self, imported, tmp_path, record_property):
        run(imported, tmp_path / "out", verify=True, verify_samples=2)
        text = (tmp_path / "out" / "README.md").read_text()
        assert "All 84 tensors equal the checkpoint's bit for bit" in text
        rows = [line for line in text.splitlines() if line.startswith("| validation.jsonl")]
        record_property("rows", rows)
        assert len(rows) == 2 and all("16 of 16" in row for row in rows)
        assert all(float(row.split("|")[4]) < 3e-6 for row in rows)

    @pytest.mark.usefixtures("checkpoints_model_in_a_fork")
    def test_a_wrong_mapping_is_found_by_what_the_model_computes(self, imported, tmp_path, monkeypatch):
        """Swapped both ways: files and checkpoint agree tensor by tensor."""
        to_hf, to_ours = hf_mapping._halve_rows, hf_mapping._join_rows
        rules = []
        for rule in hf_mapping.RULES:
            if rule.ours[0].endswith("mlp.linear_fc1.weight") and len(rule.hf) == 2:
                backwards = {
                    "to_hf": lambda sizes, tensors: to_hf(sizes, tensors)[::-1],
                    "to_ours": lambda sizes, tensors: to_ours(sizes, tensors[::-1]),
                }
                rule = hf_mapping.Rule(rule.hf, rule.ours, rule.layers, **backwards)
            rules.append(rule)
        monkeypatch.setattr(hf_mapping, "RULES", tuple(rules))
        message = error_of(imported, tmp_path / "out", verify=True)
        assert "validation.jsonl 1 (astronaut.jpg)" in message and "logits that differ" in message
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.usefixtures("checkpoints_model_in_a_fork")
    def test_merged_lora_in_bfloat16(self, tmp_path, record_property):
        """Adapters on everything, the tower included, against NeMo's own LoRA beside the weights."""
        import nemo_run
        from nemo.collections.vlm import LoRA

        from vlmsft.checkpoints.context import model_of_values, write_context
        from vlmsft.checkpoints.hf_config import model_values
        from vlmsft.import_ckpt import import_model

        config = hf_config()
        hf = write_lively_folder(tmp_path / "hf", config, torch.bfloat16)
        import_model(str(hf), tmp_path / "base", None, None)
        targets = ["linear_qkv", "linear_proj", "linear_q", "linear_kv", "linear_fc1", "linear_fc2"]
        chosen = [
            (name, tensor.bfloat16())
            for name, tensor in adapters(expected_tensors(hf))
            if name.split(".adapter.")[0].rpartition(".")[2] in targets
        ]
        path = write_lora(tmp_path / "lora", config, tmp_path / "base", chosen)
        shutil.rmtree(path / "context")
        model = model_of_values(model_values(config.to_dict()))
        model.model_transform = nemo_run.Config(LoRA, target_modules=targets, dim=4, alpha=8)
        write_context(path / "context", model, Path(sample_set(), "processor"), torch.bfloat16)
        run(path, tmp_path / "out", verify=True)
        text = (tmp_path / "out" / "README.md").read_text()
        (row,) = (line for line in text.splitlines() if line.startswith("| validation.jsonl"))
        record_property("row", row)
        print(row)
        assert float(row.split("|")[4]) < 0.03  # rounding; 0.1 is allowed
