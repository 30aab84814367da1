"""python -m vlmsft.export_ckpt checkpoint=... output=...: a Hugging Face folder, proven to equal the checkpoint."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from vlmsft.cli import command
from vlmsft.errors import Problem, UserError
from vlmsft.generate import quote_texts

if TYPE_CHECKING:
    from vlmsft.checkpoints.card import Run
    from vlmsft.checkpoints.lora import Merged
    from vlmsft.checkpoints.nemo import NemoCheckpoint
    from vlmsft.checkpoints.verify import Report

FORMATS = ("merged", "adapter")
WHICH = ("best", "last")
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE, OLD_TEMPLATE = "chat_template.jinja", "chat_template.json"
NOT_COPIED = (CONFIG, "README.md", "model.safetensors.index.json")


@command("export_ckpt")
def main(cfg: DictConfig) -> None:
    warnings.filterwarnings("ignore", "The pynvml package is deprecated", FutureWarning)  # torch's, at import
    problems = list(problems_of_keys(cfg))
    if problems:
        raise UserError(problems)
    export(
        cfg.checkpoint,
        cfg.output,
        which=cfg.which,
        format=cfg.format,
        base=cfg.base,
        verify=cfg.verify,
        verify_samples=cfg.verify_samples,
    )


def problems_of_keys(cfg: DictConfig) -> list[Problem]:
    rules = [
        ("which", cfg.which in WHICH, " or ".join(WHICH)),
        ("format", cfg.format in FORMATS, " or ".join(FORMATS)),
        ("verify", isinstance(cfg.verify, bool), "true or false"),
        ("verify_samples", isinstance(cfg.verify_samples, int) and cfg.verify_samples >= 1, "at least 1"),
    ]
    found = [Problem(key, repr(cfg[key]), expected) for key, holds, expected in rules if not holds]
    if cfg.base is not None and cfg.format != "adapter":
        found.append(Problem("base", repr(cfg.base), "null: only format=adapter names a base"))
    return found


def export(
    checkpoint: str, output: str, *, which: Any, format: str, base: str | None, verify: bool, verify_samples: int
) -> None:
    """Write the folder; arguments are conf/export_ckpt.yaml's keys. A UserError leaves nothing behind."""
    from vlmsft.checkpoints.aside import readable_bytes, refuse_existing, written_aside
    from vlmsft.checkpoints.card import Run
    from vlmsft.checkpoints.find import resolve_checkpoint
    from vlmsft.checkpoints.lora import merged
    from vlmsft.checkpoints.nemo import NemoCheckpoint
    from vlmsft.checkpoints.verify import require_nemo

    refuse_existing(output)
    saved = NemoCheckpoint(resolve_checkpoint(checkpoint, which))
    if format == "adapter" and not saved.is_adapter:
        expected = "a LoRA checkpoint, or format=merged"
        raise UserError(Problem("format", f"adapter, but {saved.path} holds a whole model", expected))
    if verify:
        require_nemo()
    if verify and format == "adapter":
        require_peft()
    run = Run.of(saved.path)
    weights = merged(saved)
    num_bytes = weights.num_bytes if format == "merged" else saved.num_bytes
    with written_aside(output, num_bytes) as folder:
        write_processor(folder, saved, original_files(saved, run))
        if format == "merged":
            report = export_model(folder, saved, weights, run, verify, verify_samples)
        else:
            report = export_adapter(folder, saved, base or source_of(saved), run, verify, verify_samples)
        named_base = (base or source_of(saved)) if format == "adapter" else None
        write_card(folder, saved, run, report, named_base)
    say(f"{readable_bytes(num_bytes)} exported to {output}. {summary(report)}")


# --------------------------------------------------------------------------------------------------------- whole model


def export_model(
    folder: Path, saved: NemoCheckpoint, weights: NemoCheckpoint | Merged, run: Run, verify: bool, number: int
) -> Report | None:
    from vlmsft.checkpoints.hf_folder import shard_bytes, write_weights
    from vlmsft.checkpoints.progress import byte_progress
    from vlmsft.mllama import hf_reference
    from vlmsft.mllama.hf_mapping import to_hf

    write_configs(folder, saved, original_files(saved, run))
    with byte_progress("exporting", weights.num_bytes) as advance:
        tensors = reported(to_hf(weights, weights.sizes), advance)
        write_weights(folder, tensors, shard_bytes(weights.num_bytes))
    if not verify:
        return None

    def load() -> Any:
        return hf_reference.load(str(folder), dtype="auto", low_cpu_mem_usage=True)

    num_tensors = compare_files(folder, weights)
    return compare_answers(load, folder, saved, run, number, num_tensors)


def compare_files(folder: Path, weights: NemoCheckpoint | Merged) -> int:
    from vlmsft.checkpoints.hf_folder import HFFolder
    from vlmsft.checkpoints.progress import byte_progress
    from vlmsft.checkpoints.verify import compare_tensors

    with byte_progress("comparing", weights.num_bytes) as advance:
        return compare_tensors(HFFolder(folder), weights, weights.sizes, advance)


def compare_answers(load: Any, folder: Path, saved: NemoCheckpoint, run: Run, number: int, num_tensors: int) -> Report:
    from transformers.utils.logging import disable_progress_bar

    from vlmsft.checkpoints.verify import Report, compare_outputs, questions

    disable_progress_bar()  # its "Loading checkpoint shards" says nothing to a user who exports
    say("comparing answers with the checkpoint's own model, importing NeMo ...", style="dim")
    data = run_data(run)
    asked = questions(data.get("validation_path"), data.get("image_folder"), number)
    comparisons = compare_outputs(load, folder, saved, asked)
    return Report(comparisons, num_tensors, weights_dtype(saved))


def reported(tensors: Any, advance: Any) -> Any:
    """The same (name, tensor) pairs, with progress."""
    for name, tensor in tensors:
        yield name, tensor
        advance(tensor.nbytes)


def write_configs(folder: Path, saved: NemoCheckpoint, original: Path | None) -> None:
    """config.json, and generation_config.json unless the original model's was copied."""
    from transformers import AutoTokenizer

    from vlmsft.checkpoints.hf_config import SpecialIds, generation_config, hf_config

    special = SpecialIds.of_tokenizer(AutoTokenizer.from_pretrained(folder))
    dtype = str(weights_dtype(saved)).removeprefix("torch.")
    config = None
    if original is not None and (original / CONFIG).is_file():
        config = json.loads((original / CONFIG).read_text(encoding="utf-8"))
    where = f"{saved.path}/context/model.yaml: config"
    write_json(folder / CONFIG, hf_config(saved.model_config, special, dtype, config, where))
    if not (folder / GENERATION_CONFIG).is_file():
        write_json(folder / GENERATION_CONFIG, generation_config(special))


def weights_dtype(saved: NemoCheckpoint) -> Any:
    return (saved.base or saved).dtype("language_model.output_layer.weight")


# ------------------------------------------------------------------------------------------------------------- adapter


def export_adapter(
    folder: Path, saved: NemoCheckpoint, base: str, run: Run, verify: bool, number: int
) -> Report | None:
    from vlmsft.checkpoints.lora import write_adapter

    whole = saved.base
    assert whole is not None  # or it is no adapter
    write_adapter(folder, saved, whole.sizes, base)
    if not verify:
        return None

    def load() -> Any:
        from peft import PeftModel

        from vlmsft.generation.model import load_model

        return PeftModel.from_pretrained(load_model(whole.path, "cpu").model, str(folder)).eval()

    return compare_answers(load, folder, saved, run, number, 0)


def require_peft() -> None:
    from importlib.util import find_spec

    if find_spec("peft") is None:
        raise UserError(
            Problem("verify", "no peft here", "peft, to load the adapter: pip install peft, or verify=false")
        )


def source_of(saved: NemoCheckpoint) -> str:
    """What an adapter's base was imported from, '' where that isn't known."""
    record = (saved.base or saved).path / "import.json"
    if not record.is_file():
        return ""
    return json.loads(record.read_text(encoding="utf-8"))["source"].removeprefix("hf://").partition("@")[0]


# --------------------------------------------------------------------------------------------------- beside the weights


def original_files(saved: NemoCheckpoint, run: Run) -> Path | None:
    """The small files of the Hugging Face model that the training started from, where they were kept."""
    from vlmsft.checkpoints.nemo import HF_FILES

    started_from = OmegaConf.select(OmegaConf.create(run.config), "restore_from") if run.config else None
    candidates = [saved.path, saved.base.path if saved.base else None, started_from and Path(started_from)]
    return next((path / HF_FILES for path in candidates if path and (path / HF_FILES).is_dir()), None)


def run_data(run: Run) -> Mapping[str, Any]:
    """The run's data node; empty where there is none."""
    data = OmegaConf.select(OmegaConf.create(run.config), "data") if run.config else None
    if data is None:
        return {}
    return {name: data[name] for name in ("validation_path", "image_folder") if isinstance(data.get(name), str)}


def write_processor(folder: Path, saved: NemoCheckpoint, original: Path | None) -> None:
    """The original model's small files; over them the tokenizer and image processor that the run used."""
    if original is not None:
        copy_files(original, folder)
    processor = Path(saved.processor)
    if processor.is_dir():
        copy_files(processor, folder)
    else:
        from transformers import AutoProcessor

        AutoProcessor.from_pretrained(saved.processor).save_pretrained(folder)
    if (folder / TEMPLATE).is_file():
        (folder / OLD_TEMPLATE).unlink(missing_ok=True)  # transformers refuses a folder with both
    name_model_inputs(folder / TOKENIZER_CONFIG)


def name_model_inputs(path: Path) -> None:
    """A tokenizer that doesn't say so returns token_type_ids too, which the model's `generate` refuses."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    if "model_input_names" not in settings:
        write_json(path, {**settings, "model_input_names": ["input_ids", "attention_mask"]})


def copy_files(source: Path, folder: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in NOT_COPIED:
            shutil.copyfile(path, folder / path.name)


def write_card(folder: Path, saved: NemoCheckpoint, run: Run, report: Report | None, base: str | None) -> None:
    from vlmsft.checkpoints.card import card
    from vlmsft.runtime.provenance import package_versions

    names = ("python", "vlmsft", "torch", "transformers")
    versions = {name: version for name, version in package_versions().items() if name in names}
    text = card(saved.path.name, run, report, base, versions)
    (folder / "README.md").write_text(text, encoding="utf-8")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def summary(report: Report | None) -> str:
    if report is None:
        return "Not compared with the checkpoint: verify=false"
    tokens = sum(one.num_tokens for one in report.comparisons)
    equal = sum(one.num_equal_tokens for one in report.comparisons)
    worst = max(one.difference for one in report.comparisons)
    tensors = f"{report.num_tensors} tensors equal to the bit, " if report.num_tensors else ""
    return (
        f"Compared with the checkpoint: {tensors}{equal} of {tokens} greedy tokens equal, logits within {worst:.1e} "
        f"standard deviations ({report.tolerance:g} allowed)"
    )


def say(text: str, style: str | None = None) -> None:
    from vlmsft.runtime.logging import console

    console().print(text, style=style, markup=False, highlight=False)


if __name__ == "__main__":
    sys.argv[1:] = quote_texts(sys.argv[1:])
    main()
