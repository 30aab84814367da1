"""Fine-tuning MLlama-11B on one GPU, three systems side by side: python benchmarks/train_gpu.py [--output lines.jsonl]

    nemo    NeMo's own recipe as shipped (nemo.collections.vlm.recipes.mllama_11b, peft_scheme=lora), at its micro batch
            of 1 and at larger ones; changed only: random weights, our samples, no checkpoints, logs and validation
    hf      HF transformers' MllamaForConditionalGeneration in bf16 with SDPA, PEFT, torch's fused AdamW, plain loop
    vlmsft  conf/train.yaml with model=mllama_11b peft=lora, through llm.finetune

LoRA of dim 8, alpha 32 and dropout 0.05 on the queries, keys and values of the text decoder (NeMo's recipe: of the
tower too), all gates 0.5, global batches of 8 (or of one micro batch, where that is larger) accumulated from micro
batches. All take the same random samples: text, half of it with labels, and one image. They lie in pinned host memory
in the form that each system's loader gives; decoding is no part of this. Each system runs in a process of its own, one
after the other, and takes its shapes in turn with one model.

The time of a step: GPU idle; some optimizer steps, after a few to warm up; GPU idle again; divided by their number. All
that a training does in between is part of it: taking micro batches, copies, forward, backward, optimizer, metrics.
The peak is torch.cuda.max_memory_allocated() of a shape; build that of all before the first step. The floor: model
FLOPs (vlmsft.mllama.flops) of what the system trains at 798 TFLOP/s, what a large bf16 matrix product reaches on an
H100. Speeds are divided by those of systems that train the same: NeMo's recipe is beside vlmsft-tower, not vlmsft.

    --cases main|more|all   the table; more shapes, LoRA on the tower, full fine-tuning of text layers; both
    --only NAME[,NAME]      these in this order: nemo, hf, vlmsft, vlmsft-fp8, vlmsft-fp8-all,
                            hf-long, vlmsft-shapes, vlmsft-tower, vlmsft-full
    --compare               instead: losses and LoRA gradients of vlmsft and of NeMo's stock model in bf16, and of
                            vlmsft with the tower and with all that is frozen in fp8, beside fp32
    --table lines.jsonl     prints the Markdown of an earlier run

Each result is a JSON line as soon as it is there, behind those of earlier runs into the same file. Without a GPU: tiny
models (no nemo, which needs one; its recipe is made and its samples go through NeMo's stock model), which shows that
the script works and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from hardware import versions
from train_gpu_cases import PEAK_TFLOPS, SETS, Case, Phase, compose, small, tflop_per_sample
from waiting import Waiting

PACKAGES = ("torch", "transformer_engine", "megatron-core", "nemo_toolkit", "transformers", "peft")
COMPARE = "compare"


def main() -> None:
    arguments = parse()
    if arguments.table is not None:
        print(table(read(arguments.table)))
    elif arguments.here is not None:
        run_here(arguments.here, arguments.output)
    else:
        names = [COMPARE] if arguments.compare else [case.name for case in chosen(arguments)]
        with tempfile.TemporaryDirectory() as folder:
            run_all(names, arguments.output, arguments.limit, Path(folder))
        print(table(read(arguments.output)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("train_gpu.jsonl"))
    parser.add_argument("--cases", choices=SETS, default="main")
    parser.add_argument("--only", default="")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for each process")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--here", help=argparse.SUPPRESS)  # the case that this process runs
    return parser.parse_args()


def chosen(arguments: argparse.Namespace) -> list[Case]:
    only = [name for name in arguments.only.split(",") if name]
    unknown = set(only) - {case.name for case in SETS["all"]}
    if unknown:
        raise SystemExit(f"--only {','.join(unknown)}: the cases are {', '.join(case.name for case in SETS['all'])}")
    named = {case.name: case for case in SETS["all"]}
    return [named[name] for name in only] if only else list(SETS[arguments.cases])


# --- the parent -------------------------------------------------------------------------------------------------------


def run_all(names: Sequence[str], output: Path, limit: float, folder: Path) -> None:
    """Each in a process of its own, whose talk goes to a file beside the output; the next one imports meanwhile."""

    def wait(name: str) -> Waiting:
        def start(words: list[str]) -> subprocess.Popen[bytes]:
            with open(log_of(name, output), "w") as talk:
                return subprocess.Popen(
                    [sys.executable, *words], stdout=talk, stderr=subprocess.STDOUT, start_new_session=True
                )

        return Waiting(start, folder, with_nemo=not name.startswith("hf"))

    with contextlib.ExitStack() as processes:
        case = processes.enter_context(wait(names[0]))
        for name, next_name in itertools.zip_longest(names, names[1:]):
            following = processes.enter_context(wait(next_name)) if next_name else case
            run(case, name, output, limit)
            case = following


def log_of(name: str, output: Path) -> Path:
    return output.with_suffix(f".{name}.log")


def run(case: Waiting, name: str, output: Path, limit: float) -> None:
    log, started = log_of(name, output), time.monotonic()
    before = len(read(output))
    process = case.run([__file__, "--here", name, "--output", str(output.absolute())])
    try:
        ended = f"exit code {process.wait(limit)}"
    except subprocess.TimeoutExpired:
        ended = f"ended after {limit:.0f} s"
        case.kill()
    print(f"{name}: {time.monotonic() - started:.0f} s, {ended}", flush=True)
    for result in read(output)[before:]:
        print("   ", describe(result), flush=True)
    if process.returncode != 0:
        print("\n".join(log.read_text(errors="replace").splitlines()[-25:]), flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def describe(result: dict[str, Any]) -> str:
    if result["case"] == COMPARE:
        return json.dumps({key: value for key, value in result.items() if key not in ("versions", "device", "command")})
    text = f"micro batch {result['micro_batch_size']}, {result['text_tokens']} tokens, {result['tiles']} tiles"
    if result["outcome"] != "measured":
        return f"{text}: {result['outcome']}"
    peak = "" if result["peak_gib"] is None else f", peak {result['peak_gib']:.1f} GiB"
    return f"{text}: {result['samples_per_second']:.2f} samples/s{peak}, loss {result['loss']:.3f}"


# --- a case's process -------------------------------------------------------------------------------------------------


def run_here(name: str, output: Path) -> None:
    import torch

    on_gpu = torch.cuda.is_available()

    def write(result: dict[str, Any]) -> None:
        where = {"date": str(date.today()), "device": device_name(on_gpu), "versions": versions(PACKAGES)}
        with open(output, "a") as lines:
            lines.write(json.dumps({"case": name, **result, **where}) + "\n")

    if name == COMPARE:
        import train_gpu_compare

        train_gpu_compare.compare(write, on_gpu)
        return
    case = next(case for case in SETS["all"] if case.name == name)
    case = case if on_gpu else small(case)
    if case.system == "nemo" and not on_gpu:
        import train_gpu_compare

        train_gpu_compare.check_nemo(case, write)
        return
    cfg = compose(case, on_gpu)
    layers = f"{cfg.model.config.language_model_config.num_layers} + "
    layers += f"{cfg.model.config.language_model_config.num_cross_attention_layers} text layers"

    def report(phase: Phase, result: dict[str, Any]) -> None:
        if "step_seconds" in result:
            result["samples_per_second"] = phase.global_batch_size / result["step_seconds"]
        note = f"{case.note}, {layers}" if case.fits else case.note
        tflop = tflop_per_sample(cfg, phase)
        write({"system": case.system, "note": note, **asdict(phase), "tflop_per_sample": tflop, **result})

    if case.system == "hf":
        from train_gpu_hf import measure
    else:
        from train_gpu_nemo import measure
    measure(case, cfg, report, on_gpu)


def device_name(on_gpu: bool) -> str:
    import torch

    return torch.cuda.get_device_name() if on_gpu else "CPU"


# --- the table --------------------------------------------------------------------------------------------------------


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown of the speeds, and of the comparison where there is one."""
    if not results:
        return "no results"
    parts = [f"{results[-1]['date']}, {results[-1]['device']}, {results[-1]['versions']}"]
    order = [case.name for case in SETS["all"]]
    speeds = sorted((r for r in results if r["case"] != COMPARE), key=lambda result: order.index(result["case"]))
    others = [result for result in results if result["case"] == COMPARE]
    if speeds:
        parts.append(speed_table(speeds))
    if others:
        parts.append(comparison_table(others))
    return "\n\n".join(parts)


def speed_table(results: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| system | micro batch | text tokens | tiles | samples/s | peak GiB | build GiB "
        "| of the floor | x HF's best | x NeMo's recipe |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        name = result["system"] + (f", {result['note']}" if result["note"] else "")
        name += ", recomputes the tower" if result["recompute"] else ""
        cells = [name, *(str(result[key]) for key in ("micro_batch_size", "text_tokens", "tiles"))]
        lines.append(f"| {' | '.join([*cells, *measured_cells(result, results)])} |")
    return "\n".join(lines)


def measured_cells(result: dict[str, Any], results: Sequence[dict[str, Any]]) -> list[str]:
    def gib(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    if result["outcome"] != "measured":
        return [result["outcome"], "", gib(result["build_gib"]), "", "", ""]
    speed = result["samples_per_second"]
    floor = PEAK_TFLOPS / result["tflop_per_sample"]
    alike = [other for other in results if same_work(other, result) and other["outcome"] == "measured"]
    hf = max((other["samples_per_second"] for other in alike if other["system"] == "hf"), default=None)
    # as shipped it has micro batches of 1
    nemo = next((r["samples_per_second"] for r in alike if r["system"] == "nemo" and r["micro_batch_size"] == 1), None)
    ratios = ["" if of is None else f"{speed / of:.2f}" for of in (hf, nemo)]
    share = f"{100 * speed / floor:.0f} % of {floor:.1f}"
    return [f"{speed:.2f}", gib(result["peak_gib"]), gib(result["build_gib"]), share, *ratios]


def same_work(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("text_tokens", "tiles", "note"))


def comparison_table(results: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| | mean loss | from fp32's | labels' losses, rms difference | LoRA gradients, relative difference |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        differences = [result[f"{of}_difference"] for of in ("loss", "label", "gradient")]
        cells = ["" if value is None else f"{value:.2e}" for value in differences]
        lines.append(f"| {' | '.join([result['model'], format(result['loss'], '.5f'), *cells])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
