"""NeMo checkpoints without NeMo: what is written is read back, and what is wrong is named.

That training reads and writes the same files is shown in tests/test_import_ckpt.py.
"""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from checkpoint_cases import (
    TEXT_OF_11B,
    VISION_OF_11B,
    assert_same,
    expected_tensors,
    hf_config,
    write_checkpoint,
    write_hf_folder,
)

from vlmsft.checkpoints.hf_folder import HFFolder
from vlmsft.checkpoints.nemo import NemoCheckpoint, plain_values, stored_key, write_weights
from vlmsft.errors import UserError
from vlmsft.mllama.hf_mapping import Sizes, to_hf

LAYER = "language_model.decoder.layers"
EMBEDDING = "language_model.embedding.word_embeddings.weight"


@pytest.fixture(scope="module")
def config():
    return hf_config()


@pytest.fixture(scope="module")
def tensors(tmp_path_factory, config):
    return expected_tensors(write_hf_folder(tmp_path_factory.mktemp("hf"), config))


@pytest.fixture(scope="module")
def written(tmp_path_factory, config, tensors):
    return write_checkpoint(tmp_path_factory.mktemp("written") / "ckpt", config, tensors.items())


@pytest.fixture
def checkpoint(tmp_path, written):
    """A copy to damage."""
    return shutil.copytree(written, tmp_path / "ckpt")


def error_of(path: Path) -> str:
    with pytest.raises(UserError) as error:
        NemoCheckpoint(path)
    return str(error.value)


def edit_yaml(checkpoint: Path, part: str, **values) -> None:
    path = checkpoint / "context" / "model.yaml"
    content = yaml.safe_load(path.read_text())
    content["config"][part].update(values)
    path.write_text(yaml.safe_dump(content))


# --- what is right ----------------------------------------------------------------------------------------------------


def test_reads_what_was_written(written, tensors):
    found = NemoCheckpoint(written)
    assert_same(found, tensors)
    assert {name: tuple(found.shape(name)) for name in found} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert found.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert not found.is_adapter and found.base is None


def test_layers_of_the_11b_model(tmp_path):
    config = hf_config(TEXT_OF_11B, VISION_OF_11B)
    folder = write_hf_folder(tmp_path / "hf", config)
    found = NemoCheckpoint(write_checkpoint(tmp_path / "ckpt", config, expected_tensors(folder).items()))
    assert found.sizes == Sizes.from_hf(config)
    assert_same(found, expected_tensors(folder))
    assert_same(dict(to_hf(found, found.sizes)), dict(HFFolder(folder)))


def test_reading_needs_neither_nemo_nor_megatron(written):
    before = set(sys.modules)  # Energon's tests, in the same process, import megatron.energon
    NemoCheckpoint(written)[EMBEDDING]
    assert not [name for name in set(sys.modules) - before if name.split(".")[0] in ("nemo", "megatron")]


def test_tensors_are_written_one_after_the_other_into_files_of_limited_size(tmp_path, tensors):
    alive: list[weakref.ref] = []
    most = 0

    def lazily():
        nonlocal most
        for name, tensor in tensors.items():
            copy = tensor.clone()
            alive.append(weakref.ref(copy))
            most = max(most, sum(ref() is not None for ref in alive))
            yield name, copy

    advanced = []
    write_weights(tmp_path / "weights", lazily(), advance=advanced.append, file_bytes=400_000)
    assert most <= 2  # the one that was written last, and the next
    assert sum(advanced) == sum(tensor.nbytes for tensor in tensors.values())
    sizes = [path.stat().st_size for path in (tmp_path / "weights").glob("*.distcp")]
    assert len(sizes) > 2
    assert sum(sizes) < sum(advanced) + 2500 * (len(tensors) + 120)  # views don't carry their storage along


def test_a_stack_with_a_layer_missing_is_not_written(tmp_path, tensors):
    some = [(name, tensor) for name, tensor in tensors.items() if not name.startswith(f"{LAYER}.0.")]
    with pytest.raises(ValueError, match=r"layers \[1\]"):
        write_weights(tmp_path / "weights", some)


def test_rows_that_pad_the_vocabulary_are_left_out(tmp_path, config, tensors):
    padded = {**tensors, EMBEDDING: torch.cat([tensors[EMBEDDING], torch.zeros(128, 128, dtype=torch.bfloat16)])}
    assert_same(NemoCheckpoint(write_checkpoint(tmp_path / "ckpt", config, padded.items())), tensors)


def test_stored_keys():
    assert stored_key(f"{LAYER}.7.mlp.linear_fc1.weight") == (f"module.{LAYER}.mlp.linear_fc1.weight", 7)
    cross = "language_model.decoder.xattn_layers.3.gate_attn"  # not every number has one, so they are no stack
    assert stored_key(cross) == (f"module.{cross}", None)


def test_classes_in_yaml_become_names():
    node = {"_target_": "C", "dtype": {"_call_": False, "_target_": "torch.bfloat16"}, "ratios": [[1, 2]]}
    assert plain_values(node) == {"_target_": "C", "dtype": "torch.bfloat16", "ratios": [[1, 2]]}


# --- adapters ---------------------------------------------------------------------------------------------------------

LORA = {
    "_target_": "nemo.collections.vlm.peft.lora.LoRA",
    "dim": 2,
    "alpha": 8,
    "dropout": 0.1,
    "target_modules": ["*"],
}


@pytest.fixture
def adapter(tmp_path, config, written):
    sides = {"linear_in": torch.ones(2, 128), "linear_out": torch.ones(256, 2)}
    names = {f"{LAYER}.{i}.self_attention.linear_qkv.adapter.{s}.weight": t for i in (0, 1) for s, t in sides.items()}
    path = write_checkpoint(tmp_path / "lora", config, names.items(), {"model_transform": LORA})
    (path / "weights" / "adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": str(written)}))
    return path


def test_adapters_and_their_base(adapter, written, tensors):
    found = NemoCheckpoint(adapter)
    assert found.is_adapter and len(found) == 4
    assert found[f"{LAYER}.1.self_attention.linear_qkv.adapter.linear_out.weight"].shape == (256, 2)
    assert found.lora.scale == 4 and found.lora.target_modules == ["*"]
    assert found.base is not None and found.base.path == written
    assert_same(found.base, tensors)


@pytest.mark.parametrize(("path", "word"), [("gone/ckpt", "gone/ckpt, which isn't there"), ("None", "random weights")])
def test_a_base_that_is_missing_is_named_when_it_is_asked_for(adapter, path, word):
    (adapter / "weights" / "adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": path}))
    found = NemoCheckpoint(adapter)
    with pytest.raises(UserError, match=word):
        _ = found.base


def test_the_settings_of_a_checkpoint_without_adapters(written):
    with pytest.raises(UserError, match="no adapters"):
        _ = NemoCheckpoint(written).lora


# --- what is wrong ----------------------------------------------------------------------------------------------------


def test_a_data_file_that_was_cut_short(checkpoint):
    file = checkpoint / "weights" / "__0_0.distcp"
    size = file.stat().st_size
    with file.open("r+b") as data:
        data.truncate(size - 1)
    assert f"{file}: found {size - 1} bytes, expected {size} bytes" in error_of(checkpoint)
    file.unlink()
    assert f"{file}: found no such file" in error_of(checkpoint)


def test_a_tensor_that_was_overwritten(checkpoint):
    file = checkpoint / "weights" / "__0_0.distcp"
    file.write_bytes(b"\0" * file.stat().st_size)
    found = NemoCheckpoint(checkpoint)
    with pytest.raises(UserError, match=f"{EMBEDDING}, unreadable"):
        found[EMBEDDING]


@pytest.mark.parametrize("name", [".metadata", "metadata.json"])
def test_a_checkpoint_whose_writer_was_killed(checkpoint, name):
    (checkpoint / "weights" / name).unlink()
    assert f"weights/{name}: found no such file" in error_of(checkpoint)


def test_a_checkpoint_that_is_being_written(checkpoint):
    checkpoint.with_name("ckpt-unfinished").touch()
    assert "never finished" in error_of(checkpoint)


class Malicious:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"", "EOFError|Ran out of input"), (pickle.dumps(Malicious()), "builtins.print"), (pickle.dumps({}), "dict")],
)
def test_an_index_that_is_none(checkpoint, content, word, capsys):
    (checkpoint / "weights" / ".metadata").write_bytes(content)
    message = error_of(checkpoint)
    assert ".metadata" in message and any(part in message for part in word.split("|"))
    assert "executed" not in capsys.readouterr().out


def test_files_of_another_format(checkpoint):
    (checkpoint / "weights" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert "zarr files, expected torch_dist" in error_of(checkpoint)


def test_another_architecture(checkpoint):
    content = {"_target_": "nemo.collections.llm.gpt.model.llama.LlamaModel", "config": {"num_layers": 2}}
    (checkpoint / "context" / "model.yaml").write_text(yaml.safe_dump(content))
    assert "LlamaModel, expected an MLlama model" in error_of(checkpoint)


def test_a_context_without_model(checkpoint):
    (checkpoint / "context" / "model.yaml").unlink()
    assert "model.yaml: found no readable file" in error_of(checkpoint)


def test_weights_of_a_larger_and_of_a_smaller_model(checkpoint):
    edit_yaml(checkpoint, "vision_model_config", num_layers=4)
    assert "no vision_model.vision_encoder.transformer.layers.3." in error_of(checkpoint)
    edit_yaml(checkpoint, "vision_model_config", num_layers=2)
    assert "found vision_model.vision_encoder.transformer.layers.2." in error_of(checkpoint)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: (path / "weights").mkdir(parents=True)])
def test_a_folder_that_is_no_checkpoint(tmp_path, make):
    make(tmp_path / "other")
    assert "expected a NeMo 2.0 checkpoint" in error_of(tmp_path / "other")
