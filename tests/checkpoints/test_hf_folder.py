"""A folder's tensors: read lazily, checked as a whole, written so that transformers reads them back."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from checkpoint_cases import TEXT_OF_11B, VISION_OF_11B, assert_same, hf_config, write_hf_folder
from safetensors.torch import load_file, save_file
from transformers import MllamaForConditionalGeneration

from vlmsft.checkpoints.hf_folder import HFFolder, expected_shapes, shard_bytes, write_weights
from vlmsft.errors import UserError
from vlmsft.mllama.hf_mapping import Sizes, file_name, to_hf, to_ours


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return write_hf_folder(tmp_path_factory.mktemp("hf") / "tiny", hf_config())


@pytest.fixture
def folder(hf, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(hf, tmp_path / "copy"))


def problems(folder: Path) -> list[str]:
    with pytest.raises(UserError) as error:
        HFFolder(folder).check()
    return [str(problem) for problem in error.value.problems]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_holds_what_transformers_loads(hf):
    expected = MllamaForConditionalGeneration.from_pretrained(hf, dtype="auto").state_dict()
    found = HFFolder(hf)
    found.check()
    assert_same(found, expected)
    assert found.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert found.num_bytes == sum(tensor.nbytes for tensor in expected.values())
    assert set(found.dtypes.values()) == {torch.bfloat16}


def test_one_file_without_an_index(hf, tmp_path):
    tensors = {name: tensor for shard in shards(hf) for name, tensor in load_file(shard).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(hf / "config.json", tmp_path)
    found = HFFolder(tmp_path)
    found.check()
    assert len(found) == len(tensors)


def test_names_of_memory_are_read_from_files_too(hf, tmp_path):
    """transformers 5 writes them."""
    save_file(dict(HFFolder(hf)), tmp_path / "model.safetensors")
    shutil.copy(hf / "config.json", tmp_path)
    HFFolder(tmp_path).check()


@pytest.mark.parametrize(("layers", "shard"), [("tiny", 10**9), ("tiny", 100_000), ("11B's layers", 100_000)])
def test_hf_to_ours_to_hf_is_exact_to_the_bit(layers, shard, tmp_path):
    config = hf_config() if layers == "tiny" else hf_config(TEXT_OF_11B, VISION_OF_11B)
    source = HFFolder(write_hf_folder(tmp_path / "source", config))
    sizes = Sizes.from_hf(config)
    (tmp_path / "back").mkdir()
    shutil.copy(source.path / "config.json", tmp_path / "back")
    num_bytes = write_weights(tmp_path / "back", to_hf(dict(to_ours(source, sizes)), sizes), shard)
    back = HFFolder(tmp_path / "back")
    back.check()
    assert num_bytes == source.num_bytes == back.num_bytes
    assert_same(back, dict(source))
    assert (len(shards(tmp_path / "back")) == 1) == (shard == 10**9)
    # and transformers finds each of them
    _, info = MllamaForConditionalGeneration.from_pretrained(tmp_path / "back", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_files_are_laid_out_as_transformers_does(hf, tmp_path):
    write_weights(tmp_path, HFFolder(hf).items(), HFFolder(hf).num_bytes // 2 + 1)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    expected = json.loads((hf / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected["weight_map"].keys()
    assert index["metadata"]["total_size"] == expected["metadata"]["total_size"]
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors.index.json", *index["weight_map"].values()}
    assert shards(tmp_path)[0].name == f"model-00001-of-{len(shards(tmp_path)):05d}.safetensors"
    assert (
        shards(tmp_path)[0].stat().st_mode & 0o777 == (tmp_path / "model.safetensors.index.json").stat().st_mode & 0o777
    )


def test_no_more_than_a_shard_is_alive(tmp_path):
    alive: list[weakref.ref] = []

    def tensors():
        for number in range(10):
            tensor = torch.zeros(1000)
            alive.append(weakref.ref(tensor))
            assert sum(ref() is not None for ref in alive) <= 3  # a shard of two, and this one
            yield f"model.{number}", tensor
            del tensor

    write_weights(tmp_path, tensors(), 8000)
    assert len(shards(tmp_path)) == 5


def test_shards_stay_small_beside_the_model():
    assert shard_bytes(21_300_000_000) == 2_662_500_000
    assert shard_bytes(180_000_000_000) == 5_000_000_000
    assert shard_bytes(1_000_000) == 64_000_000


def test_read_pages_do_not_stay(tmp_path):
    """100 MB read tensor by tensor from one file; two of its tensors are 10 MB."""
    code = """
import resource, sys, torch
from vlmsft.checkpoints.hf_folder import HFFolder
folder = HFFolder(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in folder: folder[name].sum()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    (tmp_path / "config.json").write_text('{"model_type": "mllama"}')
    save_file({f"t{i}": torch.ones(5_000_000 // 4) for i in range(20)}, tmp_path / "model.safetensors")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40_000_000


def test_a_truncated_shard(folder):
    shard = shards(folder)[0]
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - 10)
    (problem,) = problems(folder)
    assert f"{shard}: found {size - 10} bytes" in problem and f"expected the {size} bytes" in problem


@pytest.mark.parametrize("size", [0, 5, 100])
def test_a_shard_without_a_whole_header(folder, size):
    with shards(folder)[1].open("r+b") as file:
        file.truncate(size)
    (problem,) = problems(folder)
    assert "truncated" in problem


def test_a_file_that_is_no_safetensors(folder):
    shards(folder)[0].write_bytes(b"\x10" + bytes(7) + b"<html>not found</html>")
    (problem,) = problems(folder)
    assert "no safetensors header" in problem


def test_all_problems_come_at_once(folder):
    first, *others = shards(folder)
    tensors = load_file(first)
    kept = file_name("model.language_model.embed_tokens.weight")
    assert kept in tensors
    gone = next(name for name in tensors if name != kept)
    del tensors[gone]
    tensors[kept] = tensors[kept][:-1].contiguous()
    tensors["language_model.model.extra"] = torch.zeros(3)
    save_file(tensors, first)
    found = "\n".join(problems(folder))
    assert f"{gone}: found no such tensor" in found
    assert f"{kept}: found shape (519, 128), expected (520, 128)" in found
    assert "language_model.model.extra: found an extra tensor of shape (3,)" in found
    others[-1].unlink()
    assert f"{others[-1]}: found No such file or directory" in "\n".join(problems(folder))


def test_a_tensor_twice(folder):
    first, second = shards(folder)[:2]
    name = next(iter(load_file(first)))
    save_file({**load_file(second), name: load_file(first)[name]}, second)
    assert "once more" in "\n".join(problems(folder))


def test_another_model_size(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 999
    (folder / "config.json").write_text(json.dumps(config))
    found = problems(folder)
    assert len(found) == 9  # gate, up and down of three layers
    assert all("999" in problem for problem in found)


def test_another_architecture(folder):
    (folder / "config.json").write_text('{"model_type": "llava", "architectures": ["Llava"]}')
    (problem,) = problems(folder)
    assert "model_type 'llava' (Llava)" in problem


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_config_that_is_no_json_object(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        HFFolder(folder)


def test_only_pytorch_files(folder):
    for path in [*shards(folder), folder / "model.safetensors.index.json"]:
        path.unlink()
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"pytorch_model\.bin only"):
        HFFolder(folder)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        HFFolder(tmp_path / "nowhere")


def test_expected_shapes_of_the_11b_model_take_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shapes = expected_shapes({"model_type": "mllama", "vision_config": {"image_size": 560}})
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 10_670_220_835
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
