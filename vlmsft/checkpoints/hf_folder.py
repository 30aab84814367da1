"""A Hugging Face model folder's safetensors: read tensor by tensor, checked as a whole, written shard by shard.

Names are those of transformers >= 4.52 in memory (see vlmsft.mllama.hf_mapping), whichever release wrote the files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlmsft.checkpoints.aside import readable_bytes
from vlmsft.errors import Problem, UserError
from vlmsft.mllama.hf_mapping import file_name, memory_name

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ARCHITECTURE = "MllamaForConditionalGeneration"
MAX_SHARD_BYTES = 5 * 10**9
"""transformers' own limit for a shard."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
Shape = tuple[int, ...]


class _Entry(NamedTuple):
    file: str
    name: str  # in the file
    shape: Shape
    dtype: str  # safetensors' name


class HFFolder(Mapping[str, Tensor]):
    """The tensors of a folder, lazily. A tensor is a copy of its own: no page of a file stays mapped.

    The folder holds config.json and either model.safetensors or shards with an index; other files are ignored.
    What is wrong with it is kept until `check`, so that all of it can be told at once.
    """

    def __init__(self, path: str | Path):
        """Reads the headers of all shards. Raises UserError if `path` is no folder of a model in safetensors."""
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(Problem(str(path), "no folder", "a Hugging Face model folder"))
        self.config: dict[str, Any] = _read_json(self.path / "config.json")
        self._problems = architecture_problems(self.config, str(self.path / "config.json"))
        self._entries: dict[str, _Entry] = {}
        for file in self._files():
            self._read_header(file)

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        # opened for one tensor: pages that stay mapped count as this process's memory
        with safe_open(self.path / entry.file, "pt") as file:
            return file.get_tensor(entry.name).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """{name: shape}, from the headers."""
        return {name: entry.shape for name, entry in self._entries.items()}

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """{name: dtype}, from the headers."""
        return {name: _DTYPES[entry.dtype] for name, entry in self._entries.items()}

    @cached_property
    def num_bytes(self) -> int:
        """Of all tensors together."""
        return sum(torch.Size(self.shapes[name]).numel() * dtype.itemsize for name, dtype in self.dtypes.items())

    def check(self, expected: Mapping[str, Shape] | None = None) -> None:
        """Raises UserError with everything that is wrong: config, shards, and tensors against {name: shape}.

        expected: what the folder's own config.json asks for where None
        """
        problems = list(self._problems)
        if expected is None and not architecture_problems(self.config, ""):
            expected = expected_shapes(self.config)
        if expected is not None:
            problems += self._tensor_problems(expected)
        if problems:
            raise UserError(problems)

    def _files(self) -> list[str]:
        index = self.path / INDEX
        if index.is_file():
            return sorted(set(_read_json(index)["weight_map"].values()))
        if (self.path / SINGLE).is_file():
            return [SINGLE]
        others = sorted(path.name for path in self.path.glob("*.bin"))
        found = f"{', '.join(others)} only" if others else f"neither {INDEX} nor {SINGLE}"
        remedy = "Convert it: save_pretrained(folder, safe_serialization=True)" if others else ""
        raise UserError(Problem(str(self.path), found, "weights in safetensors", remedy))

    def _read_header(self, file: str) -> None:
        path = self.path / file
        problem = shard_problem(path)
        if problem:
            self._problems.append(problem)
            return
        with safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 # not a mapping
                tensor = shard.get_slice(name)
                entry = _Entry(file, name, tuple(tensor.get_shape()), tensor.get_dtype())
                if entry.dtype not in _DTYPES:
                    self._problems.append(Problem(f"{path}: {name}", entry.dtype, f"one of {', '.join(_DTYPES)}"))
                elif memory_name(name) in self._entries:
                    other = self._entries[memory_name(name)]
                    found = f"the tensor of {other.file}: {other.name} once more"
                    self._problems.append(Problem(f"{path}: {name}", found, "each tensor once"))
                else:
                    self._entries[memory_name(name)] = entry

    def _tensor_problems(self, expected: Mapping[str, Shape]) -> Iterator[Problem]:
        unread = any(shard_problem(self.path / file) for file in self._files())
        for name, shape in expected.items():
            if name in self._entries:
                found = self._entries[name]
                if found.shape != tuple(shape):
                    yield Problem(f"{self.path / found.file}: {found.name}", f"shape {found.shape}", f"{tuple(shape)}")
            elif not unread:  # else most of them are in the shard that can't be read
                yield Problem(f"{self.path}: {file_name(name)}", "no such tensor", f"one of shape {tuple(shape)}")
        for name in self._entries.keys() - expected.keys():
            extra = self._entries[name]
            where = f"{self.path / extra.file}: {extra.name}"
            yield Problem(where, f"an extra tensor of shape {extra.shape}", "the tensors of the model only")


def architecture_problems(config: Mapping[str, Any], where: str) -> list[Problem]:
    """What makes a config.json another architecture's than ours."""
    found = config.get("model_type")
    if found == "mllama":
        return []
    architectures = ", ".join(config.get("architectures") or ["no architecture"])
    remedy = "vlmsft knows Llama-3.2-Vision"
    return [Problem(where, f"model_type {found!r} ({architectures})", f"'mllama' ({ARCHITECTURE})", remedy)]


def shard_problem(path: Path) -> Problem | None:
    """Why a safetensors file can't be read: missing, truncated, or something else; None for a good one."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = file.read(header_size) if header_size < size else b""
    except OSError as error:
        return Problem(str(path), error.strerror or "unreadable", "a shard of the model", "Download it again")
    if size < 8 or len(header) < header_size:
        return Problem(str(path), f"{size} bytes", "a whole safetensors file", "It is truncated: download it again")
    try:
        entries = json.loads(header)
        end = max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        return Problem(str(path), "no safetensors header", "a safetensors file", "Download it again")
    expected = 8 + header_size + end
    if size == expected:
        return None
    remedy = "It is truncated: download it again" if size < expected else "Download it again"
    found = f"{size} bytes ({readable_bytes(size)})"
    return Problem(str(path), found, f"the {expected} bytes that its header names", remedy)


def expected_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """{name in memory: shape} of the model that a config.json describes; takes no memory."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    filled = MllamaConfig.from_dict(dict(config))
    filled.text_config.rope_scaling = filled.text_config.rope_scaling or {"rope_type": "default"}  # or it fails
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(filled)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def shard_bytes(total_bytes: int) -> int:
    """Largest size of a shard: an eighth of the weights, as a shard is held in memory, within 64 MB and 5 GB."""
    return min(MAX_SHARD_BYTES, max(64 * 10**6, total_bytes // 8))


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> int:
    """Write (name in memory, tensor) pairs as safetensors shards with an index, or as one file if they fit into one.

    At most one shard's tensors are alive. Returns the bytes of all tensors. The files get the names that vLLM and every
    release of transformers read. `folder` must hold no weights yet.
    """
    files: list[list[str]] = []  # the names in each shard
    shard: dict[str, Tensor] = {}
    total = held = 0
    for name, tensor in tensors:
        if shard and held + tensor.nbytes > max_shard_bytes:
            files.append(_write_shard(folder, len(files), shard))
            shard, held = {}, 0
        shard[file_name(name)] = _own(tensor)
        held += tensor.nbytes
        total += tensor.nbytes
    files.append(_write_shard(folder, len(files), shard))
    _name_shards(folder, files, total)
    return total


def _own(tensor: Tensor) -> Tensor:
    """Contiguous, and no view into a larger storage, which would be kept alive with it."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write_shard(folder: Path, number: int, shard: dict[str, Tensor]) -> list[str]:
    save_tensors(_unnamed(folder, number), shard)
    return list(shard)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file, as PyTorch's, that others may read as far as this process's umask lets them."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})  # makes a file of its own, for its owner only
    path.chmod(mode)


def _unnamed(folder: Path, number: int) -> Path:
    return folder / f"shard-{number}.unnamed"  # its name holds the number of all shards


def _name_shards(folder: Path, files: list[list[str]], total_bytes: int) -> None:
    if len(files) == 1:
        os.rename(_unnamed(folder, 0), folder / SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        os.rename(_unnamed(folder, number), folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(Problem(str(path), error.strerror or "unreadable", "a JSON file of the model")) from None
    except ValueError as error:
        raise UserError(Problem(str(path), f"no JSON ({error})", "a JSON file of the model")) from None
    if not isinstance(content, dict):
        raise UserError(Problem(str(path), type(content).__name__, "a JSON object"))
    return content
