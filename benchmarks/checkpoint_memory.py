"""Host memory of importing and exporting, beside NeMo's own: python benchmarks/checkpoint_memory.py [import] [export]

Makes a random Hugging Face model of about a billion parameters (the real tower under a narrow text decoder: NeMo's
importer takes no other tower), then imports and exports it with vlmsft's commands and with NeMo's HFMLlamaImporter and
HFMLlamaExporter, each in a fresh process, and prints rows for benchmarks/RESULTS.md. NeMo's run on vlmsft's layers and
its emulation of a GPU, as NeMo's own layers need one; what is loaded, converted and saved, and how, is NeMo's code.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import psutil
from hardware import processor, versions

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("nemo_toolkit", "megatron-core", "torch", "transformers")
GB = 1e9
SAMPLE_SECONDS = 0.1

TEXT = {
    "vocab_size": 128256,  # NeMo's exporter takes no smaller one
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 10,
    "cross_attention_layers": [3, 8],
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "rope_theta": 500000,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
VISION = {"image_size": 28, "num_hidden_layers": 32, "num_global_layers": 8}  # 1280 wide, as by default


def main() -> None:
    parts = sys.argv[1:] or ["import", "export"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        measure(folder, [__file__, "--worker", "make"])
        weights = sum(path.stat().st_size for path in (folder / "hf").glob("*.safetensors")) / GB
        imports = measure(folder, ["-c", "import vlmsft.checkpoints.context"])[0]
        runs: dict[str, list[str]] = {
            "import, NeMo": [__file__, "--worker", "nemo_import"],
            "import, vlmsft": ["-m", "vlmsft.import_ckpt", "source=hf", "output=ours"],
            "export, NeMo": [__file__, "--worker", "nemo_export"],
            "export, vlmsft": ["-m", "vlmsft.export_ckpt", "checkpoint=ours", "output=exported", "verify=false"],
        }
        print(f"\n{weights:.2f} GB of weights; importing NeMo and torch alone takes {imports:.2f} GB\n")
        print("| date | what | hardware | versions | peak memory | per GB of weights | without imports | seconds |")
        print("|---|---|---|---|---|---|---|---|")
        for name, arguments in runs.items():
            if name.split(",")[0] in parts or name == "import, vlmsft":  # what the exports start from
                peak, seconds = measure(folder, arguments)
                numbers = f"{peak:.2f} GB | {peak / weights:.2f} | {(peak - imports) / weights:.2f} | {seconds:.0f}"
                print(f"| {date.today()} | {name} | {processor()} | {versions(PACKAGES)} | {numbers} |", flush=True)
        for part, outputs in (("import", ("nemo", "ours")), ("export", ("nemo_exported", "exported"))):
            if part in parts:
                measure(folder, [__file__, "--worker", f"compare_{part}s", *outputs])
                print(f"{part}: the same tensors, bit for bit")


def measure(folder: Path, arguments: list[str]) -> tuple[float, float]:
    """(peak memory in GB, seconds) of a Python process and its children; ends the benchmark where it fails.

    Memory is the proportional set size: file pages that are mapped count, pages that processes share count once
    (Megatron's writers are forked, and touch what the first process only maps). Sampled, so a lower bound.
    """
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    log = folder / "log"
    started, peak = time.perf_counter(), 0
    with log.open("w") as output:
        process = psutil.Popen(
            [sys.executable, *arguments], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            peak = max(peak, tree_bytes(process))
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{log.read_text()[-5000:]}")
    return peak / GB, time.perf_counter() - started


def tree_bytes(process: psutil.Process) -> int:
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                total += one.memory_full_info().pss
    return total


# --- in processes of their own ----------------------------------------------------------------------------------------


def make() -> None:
    """A model at random in bf16, with the sample processor, at hf/."""
    import torch
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    from vlmsft.config_files import sample_set

    torch.set_default_dtype(torch.bfloat16)
    model = MllamaForConditionalGeneration(MllamaConfig(text_config=TEXT, vision_config=VISION))
    model.save_pretrained("hf", max_shard_size="1GB")
    for file in Path(sample_set(), "processor").iterdir():
        shutil.copyfile(file, Path("hf", file.name))


def nemo_import() -> None:
    """HFMLlamaImporter, hf/ to nemo/."""
    from nemo import lightning as nl
    from nemo.collections.vlm.mllama.model.mllama import HFMLlamaImporter

    from vlmsft.runtime import cpu

    cpu.activate()

    class Importer(HFMLlamaImporter):
        def init(self) -> Any:
            return our_model()

        def nemo_setup(self, model: Any, trainer: Any = None, *args: Any, **kwargs: Any) -> Any:
            strategy = cpu.CpuMegatronStrategy(
                ckpt_save_optimizer=False, always_save_context=True, ckpt_async_save=False
            )
            trainer = nl.Trainer(devices=1, accelerator="cpu", strategy=strategy)
            return super().nemo_setup(model, trainer, *args, **kwargs)

    Importer(str(Path("hf").absolute())).apply(Path("nemo"))


def our_model() -> Any:
    """MLlamaModel of hf/'s config: NeMo's class and names, layers that need no GPU."""
    import json

    import fiddle as fdl
    import torch

    from vlmsft.checkpoints.context import model_of_values
    from vlmsft.checkpoints.hf_config import model_values

    model = model_of_values(model_values(json.loads(Path("hf/config.json").read_text())))
    model.config.params_dtype = torch.bfloat16
    model.config.bf16 = True
    return fdl.build(model)


def nemo_export() -> None:
    """HFMLlamaExporter, ours/ to nemo_exported/."""
    from nemo.collections.vlm.mllama.model.mllama import HFMLlamaExporter

    from vlmsft.runtime import cpu

    cpu.activate()
    HFMLlamaExporter(str(Path("ours").absolute())).apply(Path("nemo_exported"))


def compare_imports(*folders: str) -> None:
    from vlmsft.checkpoints.nemo import NemoCheckpoint

    compare(*(NemoCheckpoint(folder) for folder in folders))


def compare_exports(*folders: str) -> None:
    from vlmsft.checkpoints.hf_folder import HFFolder

    compare(*(HFFolder(folder) for folder in folders))


def compare(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    import torch

    assert set(theirs) == set(ours), sorted(set(theirs) ^ set(ours))[:5]
    for name in ours:
        assert torch.equal(theirs[name], ours[name]), name


WORKERS: dict[str, Callable[..., None]] = {
    worker.__name__: worker for worker in (make, nemo_import, nemo_export, compare_imports, compare_exports)
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        WORKERS[sys.argv[2]](*sys.argv[3:])
    else:
        main()
