"""python -m vlmsft.import_ckpt source=FOLDER: a NeMo 2.0 checkpoint of a Hugging Face model, for restore_from."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from vlmsft.cli import command
from vlmsft.errors import Problem, UserError

if TYPE_CHECKING:
    import nemo_run as run
    import torch
    from torch import Tensor

    from vlmsft.checkpoints.hf_folder import HFFolder

DTYPES = ("bfloat16", "float16", "float32")
TOKENIZER, PREPROCESSOR = "tokenizer_config.json", "preprocessor_config.json"


@command("import_ckpt")
def main(cfg: DictConfig) -> None:
    from vlmsft.runtime.logging import quiet

    output = Path(cfg.output)
    with tempfile.TemporaryDirectory() as scratch, quiet(scratch):
        import_model(cfg.source, output, cfg.dtype, cfg if cfg.model is not None else None)


def import_model(source: str, output: Path, dtype: str | None, cfg: DictConfig | None) -> None:
    """Write `source` (a folder or hf://...) to `output`; nothing happens where it is there already.

    dtype: of the weights; the source's where None
    cfg: whose `model` node must agree with the source; the source's own config where None

    Raises UserError for a source that is incomplete or that our model can't take, and for an output that holds
    something else.
    """
    from vlmsft.checkpoints.hf_config import model_values

    raise_wrong_dtype(dtype)
    folder = open_source(source, output)
    values = model_values(folder.config, str(folder.path / "config.json"))
    values["vision_model_config"] |= image_values(folder.path)
    model = agreed_model(cfg, values, str(folder.path / "config.json"))
    with only_one(output):
        if os.path.lexists(output):
            raise_unless_the_same(output, folder, values, dtype)
            say(f"{output} is there already, and holds the same model bit for bit: nothing to do")
            return
        write_checkpoint(output, folder, model, dtype, source)


def raise_wrong_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise UserError(Problem("dtype", repr(dtype), f"{', '.join(DTYPES)}, or null for the source's"))


# --- the source -------------------------------------------------------------------------------------------------------


def open_source(source: str, output: Path) -> HFFolder:
    """The source's folder, downloaded if need be, with every problem of its files found."""
    from vlmsft.checkpoints.aside import refuse_existing
    from vlmsft.checkpoints.download import download, parse_source
    from vlmsft.checkpoints.find import is_checkpoint
    from vlmsft.checkpoints.hf_folder import HFFolder

    if os.path.lexists(output) and not is_checkpoint(output):
        refuse_existing(output)  # before hours of downloading
    hub = parse_source(source)
    folder = HFFolder(download(hub) if hub is not None else source)
    problems = list(processor_problems(folder.path))
    try:
        folder.check()
    except UserError as error:
        problems = [*error.problems, *problems]
    if problems:
        raise UserError(problems)
    return folder


def processor_problems(folder: Path) -> Iterator[Problem]:
    """What training and serving need beside the weights."""
    for name in (TOKENIZER, PREPROCESSOR):
        if not (folder / name).is_file():
            remedy = "Copy it from the model that this one comes from"
            yield Problem(str(folder / name), "no such file", "the processor of the model beside its weights", remedy)


def image_values(folder: Path) -> dict[str, Any]:
    """The values of VisionConfig that Hugging Face keeps in preprocessor_config.json.

    Raises UserError for others that our model has built in.
    """
    path = folder / PREPROCESSOR
    settings = json.loads(path.read_text(encoding="utf-8"))
    factor = settings.get("rescale_factor", 1 / 255)
    if abs(factor * 255 - 1) > 1e-6:
        raise UserError(Problem(f"{path}: rescale_factor", str(factor), f"{1 / 255}: pixels in units of 0..1"))
    missing = [name for name in ("image_mean", "image_std") if name not in settings]
    if missing:
        raise UserError(Problem(str(path), f"no {' and no '.join(missing)}", "the normalisation of the images"))
    return {name: settings[name] for name in ("image_mean", "image_std")}


def agreed_model(cfg: DictConfig | None, values: dict[str, Any], where: str) -> run.Config:
    """The model as NeMo-Run builds it. UserError with each value in which `cfg.model` differs from the source's."""
    say("importing NeMo ...", style="dim")
    from vlmsft.checkpoints.context import differences, model_of_values
    from vlmsft.recipe import translate

    if cfg is None:
        return model_of_values(values)
    model = translate(cfg.model)
    problems = list(differences(model, values, where))
    if problems:
        raise UserError(problems)
    return model


# --- the checkpoint ---------------------------------------------------------------------------------------------------


@contextmanager
def only_one(output: Path) -> Iterator[None]:
    """Waits for another process that imports to the same place; then removes what killed ones left beside it."""
    from filelock import FileLock, Timeout

    output.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output.parent / f".{output.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process is importing to {output}: waiting for it ...")
        lock.acquire()
    try:
        for stale in output.parent.glob(f".{output.name}.*.unfinished"):  # aside.written_aside's
            shutil.rmtree(stale, ignore_errors=True)
        yield
    finally:
        lock.release()


def write_checkpoint(output: Path, folder: HFFolder, model: run.Config, dtype: str | None, source: str) -> None:
    from vlmsft.checkpoints.aside import readable_bytes, written_aside
    from vlmsft.checkpoints.context import write_context
    from vlmsft.checkpoints.nemo import CONTEXT, HF_FILES, WEIGHTS, write_weights
    from vlmsft.checkpoints.progress import byte_progress

    num_bytes = sum(shape_bytes(folder, name, dtype) for name in folder)
    with written_aside(output, num_bytes) as aside:
        copy_hf_files(folder.path, aside / HF_FILES)
        write_context(
            aside / CONTEXT, model, aside / HF_FILES, torch_dtype(dtype) or next(iter(folder.dtypes.values()))
        )
        with byte_progress("importing", num_bytes) as advance:
            write_weights(aside / WEIGHTS, our_tensors(folder, dtype), advance=advance)
        record = {"source": source, "folder": str(folder.path.resolve())}
        (aside / "import.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    say(f"{readable_bytes(num_bytes)} of weights imported. To start from them: restore_from={output}")


def our_tensors(folder: HFFolder, dtype: str | None) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor) one after the other; no more than one rule's tensors are in memory."""
    from vlmsft.mllama.hf_mapping import to_ours

    target = torch_dtype(dtype)
    for name, tensor in to_ours(folder, sizes_of(folder)):
        yield name, tensor if target is None else tensor.to(target)


def sizes_of(folder: HFFolder) -> Any:
    from transformers import MllamaConfig

    from vlmsft.mllama.hf_mapping import Sizes

    return Sizes.from_hf(MllamaConfig.from_dict(folder.config))


def torch_dtype(name: str | None) -> torch.dtype | None:
    import torch

    return None if name is None else getattr(torch, name)


def shape_bytes(folder: HFFolder, name: str, dtype: str | None) -> int:
    import math

    return math.prod(folder.shapes[name]) * (torch_dtype(dtype) or folder.dtypes[name]).itemsize


def copy_hf_files(source: Path, target: Path) -> None:
    """The small files of a Hugging Face folder: configs, tokenizer, chat template, licence."""
    from vlmsft.checkpoints.download import BESIDE

    target.mkdir()
    for path in source.iterdir():
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in BESIDE):
            shutil.copyfile(path, target / path.name)  # not copy: the hub's cache is read-only


def raise_unless_the_same(output: Path, folder: HFFolder, values: dict[str, Any], dtype: str | None) -> None:
    """UserError if the checkpoint at `output` isn't what would be written now: another model, weights or config."""
    import torch

    from vlmsft.checkpoints.nemo import NemoCheckpoint
    from vlmsft.checkpoints.progress import byte_progress

    say(f"{output} is there already: comparing ...")
    remedy = "Choose another output, or remove it yourself"
    existing = NemoCheckpoint(output)
    for part, wanted in values.items():
        for key, value in wanted.items():
            found = existing.model_config[part].get(key)
            if key != "seq_length" and found != value:
                where = f"{output}: {part}.{key}"
                raise UserError(Problem(where, f"a checkpoint with {found!r}", f"{value!r}, or no folder", remedy))
    with byte_progress("comparing", existing.num_bytes) as advance:
        for name, tensor in our_tensors(folder, dtype):
            if existing.dtype(name) != tensor.dtype or not torch.equal(existing[name], tensor):
                raise UserError(
                    Problem("output", f"{output}, where {name} differs", "the same model, or no folder", remedy)
                )
            advance(tensor.nbytes)


def say(text: str, style: str | None = None) -> None:
    from vlmsft.runtime.logging import console

    console().print(text, style=style, markup=False, highlight=False)


if __name__ == "__main__":
    main()
