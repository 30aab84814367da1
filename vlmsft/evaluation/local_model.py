"""A model's folder checked before it is served: every tensor there, none cut short, a processor that fits.

Imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmsft.checkpoints.hf_folder import HFFolder
from vlmsft.checkpoints.lora import merged
from vlmsft.checkpoints.nemo import NemoCheckpoint
from vlmsft.data.encode import SampleEncoder
from vlmsft.errors import Problem, UserError

NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class Found:
    """folders: that the weights lie in, an adapter's base among them; dtype: that it is computed in"""

    folders: list[Path]
    dtype: str


def check(folder: Path, dtype: str, processor: str | None) -> Found:
    """Raises UserError with everything that is wrong with the weights and with the processor.

    folder: a Hugging Face model's or a checkpoint; dtype: "auto" = as stored; processor: None = the folder's own
    """
    is_hf = (folder / "config.json").is_file()
    own = processor or (str(folder) if is_hf else None)
    problems: list[Problem] = []
    found = None
    try:
        found = _hf(folder) if is_hf else _checkpoint(folder)
        own = own or found.processor
    except UserError as error:
        problems += error.problems
    try:
        image_token = SampleEncoder(own, NO_LIMIT).image_token_id if own else None
        if found is not None and image_token != found.vocab_size:
            expected = f"image token {found.vocab_size}, the first after the model's text tokens"
            problems.append(Problem(str(own), f"a processor whose image token is {image_token}", expected))
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)
    assert found is not None
    return Found(found.folders, found.dtype if dtype == "auto" else dtype)


@dataclass(frozen=True)
class _Read:
    folders: list[Path]
    dtype: str
    processor: str
    vocab_size: int


def _hf(folder: Path) -> _Read:
    weights = HFFolder(folder)
    weights.check()
    dtype = _name(weights.dtypes["lm_head.weight"])
    return _Read([folder], dtype, str(folder), weights.config["text_config"]["vocab_size"])


def _checkpoint(folder: Path) -> _Read:
    checkpoint = NemoCheckpoint(folder)
    whole = merged(checkpoint)
    output_layer = "language_model.output_layer.weight"
    base = checkpoint.base
    folders = [folder] if base is None else [folder, base.path]
    return _Read(folders, _name(whole.dtype(output_layer)), checkpoint.processor, whole.shape(output_layer)[0])


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
