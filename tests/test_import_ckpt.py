"""Hugging Face folder -> checkpoint -> training, with one process and with two: not a bit changes on the way."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parent / "checkpoints"))
from checkpoint_cases import (
    TEXT,
    TEXT_OF_11B,
    VISION_OF_11B,
    assert_same,
    expected_tensors,
    hf_config,
    write_hf_folder,
)
from config_cases import compose
from nemo_forks import Forked, environment, run_module
from train_cases import RUNS, Job, last_checkpoint, run_jobs

from vlmsft.checkpoints.nemo import NemoCheckpoint
from vlmsft.errors import UserError
from vlmsft.import_ckpt import import_model, open_source, raise_wrong_dtype

TWO_STEPS = ["experiment=demo", "trainer.callbacks.overfit=null", "trainer.max_steps=2", "trainer.val_check_interval=2"]
STILL = [
    "optim.max_lr=0",
    "optim.min_lr=0",
    "optim.warmup_steps=0",
    "data.global_batch_size=2",
    "data.micro_batch_size=2",
]
"""Training that leaves the weights as they are."""


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    """A folder of conf/model/mllama_tiny.yaml's architecture."""
    return write_hf_folder(tmp_path_factory.mktemp("hf") / "tiny", hf_config())


def error_of(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    return str(error.value)


# --- refused before NeMo is imported ----------------------------------------------------------------------------------


def test_default_output_is_named_after_the_source(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for source in ("hf://meta-llama/Llama-3.2-11B-Vision-Instruct", "'downloads/Llama-3.2-11B-Vision-Instruct/'"):
        cfg = compose(f"source={source}", config_name="import_ckpt")
        assert cfg.output == str(tmp_path / "models" / "Llama-3.2-11B-Vision-Instruct")


def test_all_that_is_wrong_with_a_folder_at_once(hf, tmp_path):
    folder = shutil.copytree(hf, tmp_path / "hf")
    shard = next(folder.glob("model-00001-*"))
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1)
    (folder / "tokenizer_config.json").unlink()
    message = error_of(open_source, str(folder), tmp_path / "out")
    assert str(shard) in message and "tokenizer_config.json: found no such file" in message


def test_an_output_that_is_no_checkpoint_stays(hf, tmp_path):
    (tmp_path / "out").mkdir()
    assert "found a folder at" in error_of(open_source, str(hf), tmp_path / "out")


def test_images_that_the_model_would_see_otherwise(hf, tmp_path):
    folder = shutil.copytree(hf, tmp_path / "hf")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rescale_factor": 1.0}))
    assert "rescale_factor: found 1.0" in error_of(import_model, str(folder), tmp_path / "out", None, None)


def test_a_dtype_that_is_none():
    assert "dtype: found 'bf16', expected bfloat16" in error_of(raise_wrong_dtype, "bf16")


# --- the checkpoint ---------------------------------------------------------------------------------------------------


@pytest.mark.nemo
class TestCheckpoint:
    @pytest.fixture(scope="class")
    def imported(self, hf, tmp_path_factory) -> Path:
        output = tmp_path_factory.mktemp("models") / "tiny"
        import_model(str(hf), output, None, compose("model=mllama_tiny", f"source={hf}", config_name="import_ckpt"))
        return output

    def test_holds_the_folder(self, hf, imported):
        found = NemoCheckpoint(imported)
        assert_same(found, expected_tensors(hf))
        assert found.model_config["params_dtype"] == "torch.bfloat16"
        assert found.processor == str(imported / "hf")
        for name in ("config.json", "generation_config.json", "preprocessor_config.json", "chat_template.jinja"):
            assert (imported / "hf" / name).read_bytes() == (hf / name).read_bytes()
        context = b"".join(path.read_bytes() for path in (imported / "context").iterdir() if path.is_file())
        assert str(imported.parent).encode() not in context  # it may be moved

    def test_again_changes_nothing(self, hf, imported, capsys):
        before = {path: path.stat().st_mtime_ns for path in imported.rglob("*")}
        import_model(str(hf), imported, None, None)
        assert "same model bit for bit" in capsys.readouterr().out
        assert {path: path.stat().st_mtime_ns for path in imported.rglob("*")} == before

    def test_another_model_is_refused(self, imported, tmp_path):
        other = write_hf_folder(tmp_path / "tiny", hf_config(), seed=1)
        message = error_of(import_model, str(other), imported, None, None)
        assert f"{imported}, where " in message and "differs" in message

    def test_a_config_that_differs_is_named_key_by_key(self, hf, tmp_path):
        changes = [
            "model.config.language_model_config.ffn_hidden_size=512",
            "model.config.vision_model_config.patch_size=14",
        ]
        cfg = compose("model=mllama_tiny", *changes, f"source={hf}", config_name="import_ckpt")
        message = error_of(import_model, str(hf), tmp_path / "out", None, cfg)
        assert "model.config.language_model_config.ffn_hidden_size: found 512, expected 256" in message
        assert "model.config.vision_model_config.patch_size: found 14, expected 28" in message
        assert not (tmp_path / "out").exists()

    def test_another_dtype(self, hf, tmp_path):
        import_model(str(hf), tmp_path / "out", "float32", None)
        assert_same(NemoCheckpoint(tmp_path / "out"), {n: t.float() for n, t in expected_tensors(hf).items()})

    def test_layers_of_the_11b_model(self, tmp_path):
        """What the folder's own config says is honoured, also where conf/model says otherwise."""
        text = {**TEXT_OF_11B, "rope_scaling": {**TEXT["rope_scaling"], "factor": 32.0}, "rms_norm_eps": 1e-6}
        folder = write_hf_folder(tmp_path / "hf", hf_config(text, {**VISION_OF_11B, "norm_eps": 1e-6}))
        import_model(str(folder), tmp_path / "out", None, None)
        found = NemoCheckpoint(tmp_path / "out")
        assert_same(found, expected_tensors(folder))
        values = found.model_config["language_model_config"]
        assert (values["scale_factor"], values["layernorm_epsilon"]) == (32.0, 1e-6)
        assert found.model_config["vision_model_config"]["layernorm_epsilon"] == 1e-6

    def test_two_at_once(self, hf, tmp_path, capsys):
        threads = [
            threading.Thread(target=import_model, args=(str(hf), tmp_path / "out", None, None)) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        said = capsys.readouterr().out
        assert said.count("of weights imported") == 1 and said.count("nothing to do") == 1
        assert_same(NemoCheckpoint(tmp_path / "out"), expected_tensors(hf))
        assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.lock"}


@pytest.mark.nemo
def test_a_process_that_is_killed_leaves_the_place_to_the_next(hf, tmp_path):
    """Two processes: the one that writes is killed, the other, which waits for it, clears up and writes."""
    command = (run_module, "vlmsft.import_ckpt", f"source={hf}", "output=out")
    both = [Forked(*command, folder=tmp_path, environment=environment()) for _ in range(2)]
    try:
        folder = wait_for(lambda: next(tmp_path.glob(".out.*.unfinished/hf"), None)).parent
        (killed,) = (one for one in both if folder.name.startswith(f".out.{one.process.pid}-"))
        killed.kill()
        assert killed.process.exitcode == -signal.SIGKILL
        assert folder.exists() and not (tmp_path / "out").exists()
        (other,) = (one for one in both if one is not killed)
        assert other.wait(300) == 0, other.output()
    finally:
        for one in both:
            one.kill()
    assert "of weights imported" in other.output()
    assert not folder.exists()
    assert_same(NemoCheckpoint(tmp_path / "out"), expected_tensors(hf))


def wait_for(found, seconds: float = 300.0):
    end = time.monotonic() + seconds
    while (result := found()) is None:
        assert time.monotonic() < end
        time.sleep(0.005)
    return result


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.nemo
class TestTraining:
    """From the imported checkpoint two tensor-parallel ranks train, from theirs one process, and nothing learns."""

    @pytest.fixture(scope="class")
    def runs(self, hf, tmp_path_factory) -> SimpleNamespace:
        folder = tmp_path_factory.mktemp("runs")
        imported = folder / "imported"
        import_model(str(hf), imported, "float32", None)
        two_ranks = ["trainer.devices=2", "strategy.tensor_model_parallel_size=2", f"restore_from={imported}"]
        run_jobs(folder, [Job("two", [*TWO_STEPS, *STILL, *two_ranks])], num_processes=2)
        run_jobs(folder, [Job("one", [*TWO_STEPS, *STILL], weights_from="two")])
        saved = {name: last_checkpoint(folder / RUNS / name) for name in ("one", "two")}
        return SimpleNamespace(imported=imported, **saved)

    @pytest.mark.parametrize("name", ["two", "one"])
    def test_weights_arrive_bit_for_bit(self, hf, runs, name):
        expected = {name: tensor.float() for name, tensor in expected_tensors(hf).items()}
        assert_same(NemoCheckpoint(getattr(runs, name)), expected)

    def test_the_writer_lays_out_what_training_does(self, runs):
        assert layout(runs.imported) == layout(runs.one)

    def test_weights_of_training_are_taken_apart_and_put_together(self, runs):
        """By two ranks more matrices lie in pieces; read, they are the same."""
        pieces = {name: layout(getattr(runs, name))[QKV] for name in ("one", "two")}
        assert len(pieces["two"][1]) == 2 * len(pieces["one"][1])


QKV = "module.language_model.decoder.layers.self_attention.linear_qkv.weight"


def layout(checkpoint: Path) -> dict:
    """{key: (global shape, pieces, dtype)} of all that isn't the optimizer's; objects have none of these."""
    from vlmsft.checkpoints.nemo import read_metadata

    stored = read_metadata(checkpoint / "weights" / ".metadata").state_dict_metadata
    return {key: describe(value) for key, value in stored.items() if not key.startswith("optimizer.")}


def describe(value) -> tuple:
    if not hasattr(value, "chunks"):
        return ()
    pieces = sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in value.chunks)
    return (tuple(value.size), pieces, value.properties.dtype)
