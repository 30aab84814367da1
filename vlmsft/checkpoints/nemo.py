"""NeMo 2.0 checkpoints, read and written tensor by tensor without NeMo and Megatron.

A checkpoint is a folder with two parts: `weights/` holds the tensors as torch.distributed.checkpoint writes them
(Megatron calls that torch_dist), `context/` what the model was built from. Tensors are stored whole, whatever number of
tensor-parallel ranks wrote them; layers of a stack are stored as one tensor with a leading layer axis.

Names are those of vlmsft/mllama/hf_mapping.py: "language_model.decoder.layers.0.mlp.linear_fc1.weight".
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, cast

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from vlmsft.checkpoints.find import UNFINISHED_SUFFIX, is_checkpoint
from vlmsft.errors import Problem, UserError
from vlmsft.mllama.hf_mapping import Sizes, our_names
from vlmsft.mllama.sizes import TextShape, cross_layers

WEIGHTS, CONTEXT, HF_FILES = "weights", "context", "hf"
"""Parts of a checkpoint. HF_FILES, which only vlmsft writes, holds the Hugging Face folder's small files: config.json,
generation_config.json, preprocessor_config.json, the tokenizer."""
ADAPTER_FILE = "adapter_metadata.json"
"""In `weights/` of a checkpoint that holds adapters only: where its base is."""
FILE_BYTES = 4 * 1024**3
"""Size from which `write_weights` begins another file."""

PREFIX = "module."
STACKS = (
    "language_model.decoder.layers",
    "vision_model.vision_encoder.transformer.layers",
    "vision_model.vision_encoder.global_transformer.layers",
)
"""Layers that are stored as one tensor. Cross-attention layers stand alone: not every number has one."""
VOCABULARY = ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight")
"""Rows are padded by NeMo to a multiple of 128 times the tensor-parallel size; vlmsft's model has no padding."""
_LAYER = re.compile(rf"^({'|'.join(re.escape(stack) for stack in STACKS)})\.(\d+)\.(.+)$")
_GATED_MLP = re.compile(r"^language_model\.decoder\.(xattn_)?layers\.\d+\.mlp\.linear_fc1\.weight$")


def stored_key(name: str) -> tuple[str, int | None]:
    """(key in the file, index on its leading layer axis or None) of a parameter."""
    match = _LAYER.match(name)
    if match is None:
        return f"{PREFIX}{name}", None
    stack, number, rest = match.groups()
    return f"{PREFIX}{stack}.{rest}", int(number)


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lora:
    """What the adapters of a checkpoint were made with; see nemo.collections.vlm.LoRA."""

    dim: int
    alpha: float
    dropout: float
    target_modules: list[str]

    @property
    def scale(self) -> float:
        """Factor of linear_out @ linear_in."""
        return self.alpha / self.dim


class NemoCheckpoint(Mapping[str, Tensor]):
    """The parameters of a checkpoint folder, each read when it is asked for. Optimizer state is never read.

    Of a LoRA checkpoint (`is_adapter`) these are the adapters only, "<module>.adapter.linear_in.weight" (dim, inputs)
    and "<module>.adapter.linear_out.weight" (outputs, dim); `base` has the rest.

    Opening reads the index, not the tensors, and compares it with the files and with the model that context/ describes.
    Raises UserError for a folder that is no checkpoint, is unfinished or cut short, or holds another architecture.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        _check_folder(self.path)
        self._weights = self.path / WEIGHTS
        self._reader = _Reader(self._weights)
        self.model_config: dict[str, Any] = self._model_context["config"]
        self.is_adapter = (self._weights / ADAPTER_FILE).is_file()
        tensors, self._pieces = self._reader.tensors, {}
        for key, stored in tensors.items():
            self._pieces |= {name: (key, layer) for name, layer in _parameters(key, stored)}
        self._check()

    @cached_property
    def _model_context(self) -> dict[str, Any]:
        path = self.path / CONTEXT / "model.yaml"
        try:
            content = plain_values(yaml.load(path.read_text(encoding="utf-8"), _YamlLoader))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(
                Problem(str(path), f"no readable file ({_first_line(error)})", "the model of a NeMo 2.0 checkpoint")
            ) from None
        config = content.get("config") if isinstance(content, dict) else None
        parts = ("language_model_config", "vision_model_config")
        if not isinstance(config, dict) or not all(isinstance(config.get(part), dict) for part in parts):
            target = content.get("_target_", "nothing of the kind") if isinstance(content, dict) else "no mapping"
            raise UserError(Problem(str(path), target, "an MLlama model: the only architecture that vlmsft knows"))
        return content

    @cached_property
    def sizes(self) -> Sizes:
        """For hf_mapping.to_hf."""
        text = SimpleNamespace(**self.model_config["language_model_config"])
        vision = self.model_config["vision_model_config"]
        return Sizes(
            num_layers=text.num_layers,
            cross_layers=tuple(cross_layers(TextShape.of(text))),
            num_heads=text.num_attention_heads,
            num_groups=text.num_query_groups,
            vision_layers=vision["num_layers"],
            vision_global_layers=vision["num_global_layers"],
            vision_heads=vision["num_attention_heads"],
            patch_size=vision.get("patch_size", 14),  # NeMo's own config has no such field: its tower takes 14 only
        )

    @property
    def processor(self) -> str:
        """Folder of the checkpoint's tokenizer and image processor, or their id on the Hugging Face hub."""
        if (self.path / HF_FILES / "tokenizer_config.json").is_file():
            return str(self.path / HF_FILES)
        tokenizer = self._model_context.get("tokenizer") or {}
        name = tokenizer.get("pretrained_model_name")
        if name is None:
            raise UserError(
                Problem(str(self.path / CONTEXT / "model.yaml"), "no tokenizer", "the processor of the run")
            )
        copy = self.path / CONTEXT / name
        return str(copy) if copy.is_dir() else name

    @property
    def lora(self) -> Lora:
        """UserError for a checkpoint without adapters, or with adapters of another kind."""
        path = self.path / CONTEXT / "model.yaml"
        settings = self._model_context.get("model_transform")
        if not self.is_adapter or not isinstance(settings, dict) or "dim" not in settings:
            found = "no adapters" if not self.is_adapter else f"model_transform {settings!r}"
            raise UserError(Problem(str(path), found, "the settings of a LoRA run"))
        names = ("dim", "alpha", "dropout", "target_modules")
        return Lora(**{name: settings[name] for name in names})

    @cached_property
    def base(self) -> NemoCheckpoint | None:
        """What a LoRA checkpoint's adapters belong to; None for a checkpoint of the whole model.

        UserError where the base isn't where the training found it (the path is kept in weights/adapter_metadata.json).
        """
        if not self.is_adapter:
            return None
        file = self._weights / ADAPTER_FILE
        path = json.loads(file.read_text(encoding="utf-8"))["model_ckpt_path"]
        if path in (None, "None"):
            raise UserError(
                Problem(
                    str(file), "no base checkpoint", "one", "The run started from random weights: restore_from=null"
                )
            )
        folder = Path(path).parent if Path(path).name == WEIGHTS else Path(path)
        if not folder.is_dir():
            remedy = f"Put it back there, or write its new place into {file}"
            raise UserError(Problem(str(file), f"{path}, which isn't there", "the base of the adapters", remedy))
        return NemoCheckpoint(folder)

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor on the CPU, in the dtype of the file. KeyError for a name that the checkpoint lacks."""
        key, layer = self._pieces[name]
        stored = self._reader.tensors[key]
        offsets, sizes = [0] * len(stored.size), list(stored.size)
        sizes[-len(self.shape(name)) :] = self.shape(name)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        tensor = self._reader.read(key, offsets, sizes)
        return tensor if layer is None else tensor[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def __contains__(self, name: object) -> bool:
        return name in self._pieces  # Mapping's own would read the tensor

    def shape(self, name: str) -> torch.Size:
        """Of a tensor, without reading it."""
        key, layer = self._pieces[name]
        shape = list(self._reader.tensors[key].size[0 if layer is None else 1 :])
        if name in VOCABULARY:
            shape[0] = min(shape[0], self.model_config["language_model_config"]["vocab_size"])
        return torch.Size(shape)

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor, without reading it."""
        return self._reader.tensors[self._pieces[name][0]].properties.dtype

    @property
    def num_bytes(self) -> int:
        """Of all tensors together."""
        return sum(self.shape(name).numel() * self.dtype(name).itemsize for name in self)

    def _check(self) -> None:
        if self.is_adapter:
            return
        expected = our_names(self.sizes)
        problems = [
            Problem(str(self._weights), f"no {name}", "every parameter of the model that context/model.yaml describes")
            for name in expected
            if name not in self._pieces
        ]
        problems += [
            Problem(str(self._weights), f"{name}", "only parameters of the model that context/model.yaml describes")
            for name in self._pieces.keys() - set(expected)
        ]
        if problems:
            raise UserError(_first_few(problems))


def _check_folder(path: Path) -> None:
    """UserError for what is no checkpoint folder, or one that was never finished."""
    if path.with_name(f"{path.name}{UNFINISHED_SUFFIX}").exists():
        remedy = "The run was killed while it saved; take another checkpoint of it"
        raise UserError(Problem(str(path), "a checkpoint that was never finished", "a complete one", remedy))
    if not is_checkpoint(path):
        found = "no such folder" if not path.is_dir() else "a folder without weights/ and context/"
        raise UserError(Problem(str(path), found, "a NeMo 2.0 checkpoint"))
    for name in ("metadata.json", ".metadata"):  # written last
        if not (path / WEIGHTS / name).is_file():
            raise UserError(Problem(str(path / WEIGHTS / name), "no such file", "a complete checkpoint: it comes last"))
    backend = json.loads((path / WEIGHTS / "metadata.json").read_text(encoding="utf-8")).get("sharded_backend")
    if backend != "torch_dist":
        remedy = "Write it anew with NeMo's save_ckpt_format=torch_dist"
        raise UserError(Problem(str(path / WEIGHTS / "metadata.json"), f"{backend} files", "torch_dist", remedy))


def _parameters(key: str, stored: TensorStorageMetadata) -> Iterator[tuple[str, int | None]]:
    """(name, layer) of each parameter that is stored under a key."""
    name = key.removeprefix(PREFIX)
    stack = next((stack for stack in STACKS if name.startswith(f"{stack}.")), None)
    if stack is None:
        yield name, None
        return
    for layer in range(stored.size[0]):
        yield f"{stack}.{layer}{name.removeprefix(stack)}", layer


class _Reader:
    """torch's reader for one `weights/` folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files = FileSystemReader(folder)
        self._metadata = read_metadata(folder / ".metadata")
        self._files.set_up_storage_reader(self._metadata, is_coordinator=True)
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: stored
            for key, stored in self._metadata.state_dict_metadata.items()
            if key.startswith(PREFIX) and isinstance(stored, TensorStorageMetadata)
        }
        self._check_files()

    def _check_files(self) -> None:
        """UserError for files that are missing or shorter than the index says."""
        ends: dict[str, int] = {}
        for info in cast("dict[Any, _StorageInfo]", self._metadata.storage_data).values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        problems = []
        for name, end in ends.items():
            file = self.folder / name
            size = file.stat().st_size if file.is_file() else None
            if size is None or size < end:
                found = "no such file" if size is None else f"{size} bytes"
                problems.append(
                    Problem(str(file), found, f"{end} bytes", "The checkpoint was cut short: copy it again")
                )
        if problems:
            raise UserError(problems)

    def read(self, key: str, offsets: list[int], sizes: list[int]) -> Tensor:
        """A region of a stored tensor, put together from the pieces that it is stored in."""
        stored = self.tensors[key]
        region = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        target = torch.empty(sizes, dtype=stored.properties.dtype)
        items = create_read_items_for_chunk_list(key, stored, [region])
        covered = sum(item.lengths.numel() for item in items)
        if covered != target.numel():
            raise UserError(Problem(str(self.folder), f"{key} with holes", "all pieces of a tensor"))
        try:
            self._files.read_data(LoadPlan(items), _Planner(target)).wait()
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(
                Problem(str(self.folder), f"{key}, unreadable ({_first_line(error)})", "a tensor as torch saves it")
            ) from error
        return target


class _Planner(DefaultLoadPlanner):
    """Where torch's reader puts the pieces of the one tensor that was asked for."""

    def __init__(self, target: Tensor):
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        assert read_item.type == LoadItemType.TENSOR
        piece = self._target
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            piece = piece.narrow(axis, start, length)
        return piece

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class _MCoreMetadata(Metadata):
    """Stands for Megatron's subclass of the same name, which only adds fields."""


class _Ignored:
    """Stands for what Megatron's index holds beside the tensors: plans of the ranks that wrote it."""


class _MetadataUnpickler(pickle.Unpickler):
    """Reads the index without importing Megatron, and refuses whatever an index has no business with."""

    _MODULES = ("torch.distributed.checkpoint.", "torch.distributed._shard.", "pathlib")
    _TORCH = ("Size", "bool", "bfloat16", "float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64")
    _LAYOUTS = ("strided", "contiguous_format", "preserve_format", "float8_e4m3fn", "float8_e5m2")
    _OTHERS = ("torch.serialization._get_layout", "collections.OrderedDict", "collections.defaultdict", "builtins.set")

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("megatron."):
            return _MCoreMetadata if name == "MCoreMetadata" else _Ignored
        known = module == "torch" and name in (*self._TORCH, *self._LAYOUTS)
        if known or module.startswith(self._MODULES) or f"{module}.{name}" in self._OTHERS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_metadata(file: Path) -> Metadata:
    """The index of a `weights/` folder. UserError for a file that is no such index."""
    try:
        metadata = _MetadataUnpickler(io.BytesIO(file.read_bytes())).load()
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError, IndexError, ValueError) as error:
        raise UserError(
            Problem(str(file), f"no readable index ({_first_line(error)})", "what torch.distributed.checkpoint writes")
        ) from None
    if not isinstance(metadata, Metadata):
        raise UserError(Problem(str(file), type(metadata).__name__, "what torch.distributed.checkpoint writes"))
    return metadata


class _YamlLoader(yaml.SafeLoader):
    """Python tags become None: context/ is read for its numbers, never to run code."""


_YamlLoader.add_constructor("tag:yaml.org,2002:python/tuple", yaml.SafeLoader.construct_yaml_seq)
_YamlLoader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def plain_values(node: Any) -> Any:
    """context/model.yaml's nodes without NeMo's wrapping: a class or function is its dotted name."""
    if isinstance(node, list):
        return [plain_values(item) for item in node]
    if not isinstance(node, dict):
        return node
    if "_target_" in node and set(node) <= {"_target_", "_call_", "_args_"}:
        return node["_target_"]
    return {key: plain_values(value) for key, value in node.items() if key != "_call_"}


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _first_few(problems: list[Problem], number: int = 10) -> list[Problem]:
    rest = len(problems) - number
    if rest <= 0:
        return problems
    more = Problem(problems[0].where, f"{rest} more of the same kind", "none")
    return [*problems[:number], more]


# --- writing ----------------------------------------------------------------------------------------------------------


def write_weights(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    advance: Callable[[int], Any] = lambda num_bytes: None,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write the parameters of a whole model, in any order, as the `weights/` folder of a checkpoint without optimizer.

    The result has the keys, shapes and pieces of one that training wrote, at any tensor-parallel size. Each tensor is
    written before the next is asked for, so memory is that of the largest.

    folder: is made, and must not exist
    tensors: (name, tensor) of each parameter
    advance: called with the bytes of each tensor written
    file_bytes: another file is begun when one has grown to this size
    Raises ValueError for a stack with a layer missing.
    """
    folder = Path(folder)
    folder.mkdir()
    with _Files(folder, file_bytes) as files:
        index = _Index()
        for name, tensor in tensors:
            for piece in _pieces(name, tensor):
                index.add_tensor(piece, files.save(piece.tensor))
            advance(tensor.numel() * tensor.element_size())
        for key in index.extra_states():
            index.add_object(key, files.save([None]))  # TransformerEngine's state without fp8
    torch.save(_TRAINER_STATE, folder / "common.pt")
    with open(folder / ".metadata", "wb") as file:
        pickle.dump(index.metadata(), file)
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    versions = {f"{name}_version": 1 for name in backends}
    (folder / "metadata.json").write_text(json.dumps({**backends, **versions}), encoding="utf-8")


_TRAINER_STATE: dict[str, Any] = {"epoch": 0, "global_step": 0, "state_dict": {}}
"""What Lightning would keep of a run that has not begun."""


@dataclass(frozen=True)
class _Piece:
    """Part of a parameter as it goes into a file.

    offsets: of the piece in the stored tensor, layer axis included; layer: its index on that axis, None without one
    shape: of the whole parameter
    """

    key: str
    layer: int | None
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    tensor: Tensor


def _pieces(name: str, tensor: Tensor) -> Iterator[_Piece]:
    """A gated MLP's gate and up halves are stored apart, so that tensor-parallel ranks find their share of each."""
    key, layer = stored_key(name)
    shape, lead = tuple(tensor.shape), () if layer is None else (layer,)
    parts = tensor.chunk(2) if _GATED_MLP.match(name) else (tensor,)
    start = 0
    for part in parts:
        offsets = (*lead, start, *(0 for _ in shape[1:]))
        yield _Piece(key, layer, offsets, shape, part if layer is None else part[None])
        start += part.shape[0]


class _Files:
    """The data files of one `weights/` folder."""

    def __init__(self, folder: Path, file_bytes: int):
        self._folder = folder
        self._file_bytes = file_bytes
        self._number = 0
        self._file: IO[bytes] | None = None

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def save(self, content: Any) -> _StorageInfo:
        """Append a tensor or object as torch.save writes it."""
        if self._file is not None and self._file.tell() >= self._file_bytes:
            self._close()
            self._number += 1
        name = f"__0_{self._number}.distcp"
        if self._file is None:
            self._file = open(self._folder / name, "xb")  # noqa: SIM115 # _close does
        offset = self._file.tell()
        if isinstance(content, Tensor):
            content = content.detach().contiguous()
            if content.untyped_storage().nbytes() != content.numel() * content.element_size():
                content = content.clone()  # torch.save writes the whole storage behind a view
        torch.save(content, self._file)
        return _StorageInfo(name, offset, self._file.tell() - offset)


@dataclass
class _Index:
    """What becomes the `.metadata` file."""

    tensors: dict[str, TensorStorageMetadata] = field(default_factory=dict)
    layers: dict[str, set[int]] = field(default_factory=dict)
    objects: list[str] = field(default_factory=list)
    storage: dict[MetadataIndex, _StorageInfo] = field(default_factory=dict)

    def add_tensor(self, piece: _Piece, info: _StorageInfo) -> None:
        if piece.key not in self.tensors:
            properties = TensorProperties.create_from_tensor(piece.tensor)
            size = piece.shape if piece.layer is None else (0, *piece.shape)
            self.tensors[piece.key] = TensorStorageMetadata(properties, torch.Size(size), [])
        if piece.layer is not None:
            self.layers.setdefault(piece.key, set()).add(piece.layer)
        chunk = ChunkStorageMetadata(torch.Size(piece.offsets), piece.tensor.shape)
        self.tensors[piece.key].chunks.append(chunk)
        self.storage[MetadataIndex(piece.key, chunk.offsets)] = info

    def add_object(self, key: str, info: _StorageInfo) -> None:
        self.objects.append(key)
        self.storage[MetadataIndex(key)] = info

    def extra_states(self) -> list[str]:
        """Keys of the empty `_extra_state` that each of TransformerEngine's modules has, one per layer of a stack."""
        keys = []
        for key in self.tensors:
            module, _, last = key.rpartition(".")
            if last != "weight" or module.endswith(("embedding", "embeddings", "output_layer")):
                continue
            number = len(self.layers[key]) if key in self.layers else 1
            keys += [f"{module}._extra_state/shard_{layer}_{number}" for layer in range(number)]
        return keys

    def metadata(self) -> Metadata:
        for key, layers in self.layers.items():
            if layers != set(range(len(layers))):
                raise ValueError(f"{key}: layers {sorted(layers)} are not all from 0")
            stored = self.tensors[key]
            stored.size = torch.Size((len(layers), *stored.size[1:]))
        return Metadata(
            state_dict_metadata={**self.tensors, **{key: BytesStorageMetadata() for key in self.objects}},
            storage_data=self.storage,
            storage_meta=StorageMeta(),
        )
