"""README.md of an exported model: how to load it, what it was trained on and with, how far it was checked."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmsft.checkpoints.verify import MAX_NEW_TOKENS, Report

SHOWN_METRICS = ("step", "consumed_samples", "reduced_train_loss", "val_loss")

_LOAD = """```python
from PIL import Image
from transformers import AutoProcessor
{imports}

folder = "."  # this folder, or its name on the hub
processor = AutoProcessor.from_pretrained(folder)
{load}
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is in this photo?"}}]}}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(Image.open("photo.jpg"), prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
print(processor.decode(model.generate(**inputs, max_new_tokens=256)[0]))
```"""
_LOAD_MERGED = """from vlmsft.mllama import hf_reference

model = hf_reference.load(folder, dtype="auto")  # MllamaForConditionalGeneration, repaired"""
_LOAD_ADAPTER = """from peft import PeftModel
from vlmsft.mllama import hf_reference

base = hf_reference.load("{base}", dtype="auto")  # MllamaForConditionalGeneration, repaired
model = PeftModel.from_pretrained(base, folder)"""
_WARNING = """**transformers 4.55 and newer computes this architecture differently from how it was trained**: it hands
the projector the vision tower's intermediate states from one layer too late (4.55: the last layer's, five times), and
text in front of an image still attends to it. `MllamaForConditionalGeneration.from_pretrained` loads this folder, but
answers are worse than they should be. `vlmsft.mllama.hf_reference.load` repairs both, as do `vlmsft generate` and the
builtin engine of `vlmsft serve`; vLLM (up to 0.10.2, the last release with this model) takes the right layers' states.
"""


@dataclass(frozen=True)
class Run:
    """What is known of the training that a checkpoint comes from; empty where the checkpoint lies alone."""

    name: str = ""
    config: str = ""  # YAML
    provenance: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Path) -> Run:
        """Of the run folder that `checkpoint` lies in (RUN/checkpoints/NAME)."""
        folder = checkpoint.resolve().parent.parent
        if checkpoint.resolve().parent.name != "checkpoints" or not (folder / "config.yaml").is_file():
            return cls()
        provenance = folder / "provenance.json"
        return cls(
            name=f"{folder.parent.name}/{folder.name}",
            config=(folder / "config.yaml").read_text(encoding="utf-8"),
            provenance=json.loads(provenance.read_text(encoding="utf-8")) if provenance.is_file() else {},
            metrics=metrics_at(folder / "metrics.csv", checkpoint.name),
        )


def metrics_at(path: Path, checkpoint: str) -> dict[str, str]:
    """{metric: value} of metrics.csv at the step that a checkpoint's name gives, as last written by then."""
    match = re.search(r"step=(\d+)", checkpoint)
    if match is None or not path.is_file():
        return {}
    last: dict[str, str] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if int(row["step"]) <= int(match[1]) + 1:  # the name counts from 0
                last |= {name: value for name, value in row.items() if value}
    return {name: value for name, value in last.items() if name in SHOWN_METRICS or name.startswith("val_loss")}


def card(checkpoint: str, run: Run, report: Report | None, base: str | None, versions: dict[str, str]) -> str:
    """README.md.

    checkpoint: its folder's name
    report: of the export gate; None where it was skipped
    base: for an adapter folder what it belongs to, None for a whole model
    versions: of the packages that exported
    """
    parts = [
        _front_matter(base),
        f"# {run.name or checkpoint}",
        f"{'LoRA adapter' if base is not None else 'Llama-3.2-Vision'}, fine-tuned with vlmsft and exported from the "
        f"checkpoint `{checkpoint}`.",
        "## How to load",
        _load(base),
        _WARNING.strip(),
        "## Compared with the checkpoint",
        _gate(report),
        *_training(run),
        "## Exported with",
        _list(versions),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(base: str | None) -> str:
    lines = ["library_name: " + ("transformers" if base is None else "peft"), "pipeline_tag: image-text-to-text"]
    if base:
        lines.append(f"base_model: {json.dumps(base)}")
    return "\n".join(["---", *lines, "tags: [mllama, vlmsft]", "---"])


def _load(base: str | None) -> str:
    code = _LOAD_MERGED if base is None else _LOAD_ADAPTER.format(base=base or "the exported base model")
    imports, _, load = code.partition("\n\n")
    return _LOAD.format(imports=imports, load=load)


def _gate(report: Report | None) -> str:
    if report is None:
        return "Not compared: exported with `verify=false`."
    tensors = f"All {report.num_tensors} tensors equal the checkpoint's bit for bit. " if report.num_tensors else ""
    lines = [
        f"{tensors}Logits over prompt and answer, and the "
        f"greedy answer (up to {MAX_NEW_TOKENS} tokens), of the repaired Hugging Face model against the model that was "
        f"trained, both in {str(report.dtype).removeprefix('torch.')} on a CPU; differences are root mean squares in "
        f"standard deviations of the logits, and up to {report.tolerance:g} was allowed. The vision tower's GELU is "
        "exact in both; the last column has it approximated by tanh, as NeMo's fused GPU kernel does in training.",
        "",
        "| question | answer | equal tokens | difference | with tanh |",
        "|---|---|---|---|---|",
    ]
    for one in report.comparisons:
        cells = (_cell(one.question), _cell(one.answer), f"{one.num_equal_tokens} of {one.num_tokens}")
        lines.append(f"| {' | '.join(cells)} | {one.difference:.1e} | {one.approximate_difference:.1e} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    printable = "".join(character if character.isprintable() else " " for character in text)  # a model may say anything
    return printable.replace("|", "\\|")


def _training(run: Run) -> list[str]:
    if not run.config:
        return ["## Training", "The checkpoint lay in no run folder: its training is not known."]
    parts = ["## Training"]
    if run.metrics:
        parts.append(_list(run.metrics))
    data = run.provenance.get("data", {})
    if data:
        parts += ["Data:", _list(_fingerprint(data))]
    if run.provenance:
        code, packages = run.provenance.get("code", {}), run.provenance.get("packages", {})
        parts += ["Trained with:", _list({"code": json.dumps(code), **packages})]
    return [*parts, f"<details><summary>Config</summary>\n\n```yaml\n{run.config.strip()}\n```\n\n</details>"]


def _fingerprint(data: dict[str, Any]) -> dict[str, str]:
    described = {Path(name).name: json.dumps(values) for name, values in data.get("files", {}).items()}
    images = {name: value for name, value in (data.get("images") or {}).items() if name != "folder"}
    return {**described, **({"images": json.dumps(images)} if images else {})}


def _list(values: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in values.items())
