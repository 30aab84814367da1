"""The export gate: what was exported computes what the checkpoint computes.

Two comparisons, either of which ends the export:
- each tensor of the files, taken back to our names, equals the checkpoint's to the bit;
- on a few questions with images, Hugging Face's repaired model (vlmsft.mllama.hf_reference), loaded from the exported
  folder, gives the logits and the greedy answer of the checkpoint's own model (vlmsft.checkpoints.as_trained), which
  shares neither mapping nor config nor merging with the export.

Memory: one of the two models at a time.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmsft.checkpoints.hf_folder import HFFolder
from vlmsft.checkpoints.nemo import NemoCheckpoint
from vlmsft.config_files import sample_set
from vlmsft.data.encode import NO_DATE, SampleEncoder, load_image, visible_until
from vlmsft.data.records import IMAGE, RecordFile, Turn, image_path, parse
from vlmsft.errors import Problem, UserError
from vlmsft.mllama.hf_mapping import Sizes, to_ours

STATE = "nothing was exported"
MAX_NEW_TOKENS = 16
NO_LIMIT = 1 << 30
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest root mean square of the logits' differences, in units of the logits' standard deviation."""


@dataclass(frozen=True)
class Question:
    """What both sides are asked: the text of one user turn behind its images. name: for messages."""

    name: str
    text: str
    images: tuple[Image.Image, ...]

    @property
    def turn(self) -> Turn:
        return Turn("user", (*(IMAGE for _ in self.images), self.text))


@dataclass(frozen=True)
class Answer:
    """tokens: (S,) prompt and greedy answer; logits: (S, vocabulary) fp32 of a forward over them."""

    tokens: Tensor
    num_prompt_tokens: int
    logits: Tensor
    text: str


@dataclass(frozen=True)
class Comparison:
    """One question's result. difference: root mean square, in standard deviations of the logits

    approximate_difference: the same with the tower's GELU approximated by tanh, as training on a GPU has it
    worst_gap: how much less likely the checkpoint finds a token of the answer than its own choice, in the same units
    """

    question: str
    answer: str
    num_tokens: int
    num_equal_tokens: int
    difference: float
    approximate_difference: float
    worst_gap: float


@dataclass(frozen=True)
class Report:
    """What the model card says of the gate. num_tensors: compared bit by bit; 0 for an adapter, which has others"""

    comparisons: tuple[Comparison, ...]
    num_tensors: int
    dtype: torch.dtype

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]


# ------------------------------------------------------------------------------------------------------------ questions


def questions(record_file: str | None, image_folder: str | None, number: int) -> list[Question]:
    """`number` first questions with images of a run's validation file, spread over it; of the packaged sample set where
    the file isn't there."""
    if record_file is None or not Path(record_file).is_file():
        record_file, image_folder = f"{sample_set()}/validation.jsonl", f"{sample_set()}/images"
    records = RecordFile(record_file)
    found: list[Question] = []
    for index in _spread(len(records), number):
        conversation = parse(records[index])
        if not conversation.images:
            continue
        turn = next(turn for turn in conversation.turns if turn.role == "user")
        names = conversation.images[: turn.num_images]
        paths = [image_path(name, image_folder) for name in names]
        if names and all(path.is_file() for path in paths):
            images = tuple(load_image(path) for path in paths)
            found.append(Question(f"{Path(record_file).name} {index + 1} ({', '.join(names)})", turn.text, images))
    if not found:
        if record_file.startswith(sample_set()):
            raise FileNotFoundError(f"no question with an image in {record_file}: the installation is broken")
        return questions(None, None, number)
    return found


def _spread(length: int, number: int) -> list[int]:
    return sorted({index * length // number for index in range(number)})


# -------------------------------------------------------------------------------------------------------------- tensors


def compare_tensors(exported: HFFolder, weights: Mapping[str, Tensor], sizes: Sizes, advance: Any) -> int:
    """Each tensor of `exported` against the checkpoint's, bit by bit; returns their number.

    advance: called with the bytes of each. Raises UserError that names the tensor that differs most.
    """
    exported.check()
    worst: tuple[float, str] | None = None
    number = 0
    for name, tensor in to_ours(exported, sizes):
        expected = weights[name]
        number += 1
        advance(expected.nbytes)
        if tensor.dtype == expected.dtype and torch.equal(tensor, expected):
            continue
        difference = (tensor.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30)
        worst = max(worst or (-1.0, ""), (float(difference), name))
    if worst is not None:
        found = f"an exported tensor that differs by {worst[0]:.2g} of its size, the most of all"
        raise UserError(Problem(worst[1], found, "the checkpoint's tensor, bit for bit"), STATE)
    return number


# -------------------------------------------------------------------------------------------------------------- outputs


def compare_outputs(
    model: Any, folder: Path, checkpoint: NemoCheckpoint, asked: Sequence[Question]
) -> tuple[Comparison, ...]:
    """The exported model's answers and logits against the checkpoint's.

    model: a function without arguments that loads the exported model, so that it can be let go
    folder: of the exported processor
    Raises UserError that names the question with the largest difference.
    """
    require_nemo()
    encoder = SampleEncoder(checkpoint.processor, NO_LIMIT)
    loaded = model()
    dtype = loaded.dtype
    answers = [exported_answer(loaded, folder, encoder, question) for question in asked]
    del loaded
    gc.collect()
    batches = [micro_batch(encoder, question, answer.tokens) for question, answer in zip(asked, answers, strict=True)]
    logits = checkpoint_logits(checkpoint.path, batches)
    comparisons = tuple(
        compare(question, answer, exact[0], approximate[0])
        for question, answer, exact, approximate in zip(
            asked, answers, logits["logits"], logits["approximate"], strict=True
        )
    )
    raise_differences(comparisons, TOLERANCE[dtype])
    return comparisons


def require_nemo() -> None:
    """Raises UserError where the checkpoint's own model can't be built."""
    if find_spec("nemo") is None:
        remedy = "verify=false exports without the comparison"
        raise UserError(Problem("verify", "no NeMo here", "NeMo, to compute what the checkpoint does", remedy), STATE)


def exported_answer(model: Any, folder: Path, encoder: SampleEncoder, question: Question) -> Answer:
    """The greedy answer and the logits, through the exported processor and the model's own `generate`."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    content = [*({"type": "image"} for _ in question.images), {"type": "text", "text": question.text}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False, date_string=NO_DATE
    )
    inputs = processor(images=list(question.images), text=prompt, add_special_tokens=False, return_tensors="pt")
    ids, expected = inputs["input_ids"][0].tolist(), encoder.prompt_ids([question.turn])
    if ids != expected:
        found = f"{question.name}: a prompt of {len(ids)} tokens that differs from training's {len(expected)}"
        raise UserError(Problem("the exported tokenizer or chat template", found, "training's prompt"), STATE)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.inference_mode():
        tokens = model.generate(
            **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, temperature=None, top_p=None, top_k=None
        )
        mask = inputs["cross_attention_mask"]
        grown = mask[:, -1:].expand(-1, tokens.shape[1] - mask.shape[1], -1, -1)
        whole = {
            **inputs,
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "cross_attention_mask": torch.cat([mask, grown], dim=1),
        }
        logits = model(**whole, use_cache=False).logits[0].float()
    text = processor.tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True)
    return Answer(tokens[0], len(ids), logits, text)


def micro_batch(encoder: SampleEncoder, question: Question, tokens: Tensor) -> dict[str, Tensor]:
    """What MLlamaBase.forward takes for one prompt with its answer."""
    tiled = [encoder.tile_image(image) for image in question.images]
    starts = (tokens == encoder.image_token_id).nonzero()[:, 0].tolist()
    return {
        "tokens": tokens[None].clone(),
        "position_ids": torch.arange(len(tokens))[None],
        "tiles": torch.cat([torch.from_numpy(tiles) for tiles, _ in tiled]),
        "image_sample": torch.zeros(len(tiled), dtype=torch.int64),
        "num_tiles": torch.tensor([len(tiles) for tiles, _ in tiled]),
        "aspect_ratio_ids": torch.tensor([ratio for _, ratio in tiled]),
        "visible_from": torch.tensor(starts),
        "visible_until": torch.tensor(visible_until(starts, len(tokens))),
    }


def checkpoint_logits(checkpoint: Path, batches: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """as_trained's logits, from a process of its own."""
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        torch.save(batches, f"{folder}/batches.pt")
        command = [sys.executable, "-m", "vlmsft.checkpoints.as_trained", str(checkpoint.absolute()), folder]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, errors="replace"
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
        return torch.load(f"{folder}/logits.pt")


def compare(question: Question, answer: Answer, exact: Tensor, approximate: Tensor) -> Comparison:
    """The exported answer against the checkpoint's logits (S, vocabulary)."""
    scale = float(exact.std())
    rows = slice(answer.num_prompt_tokens - 1, len(answer.tokens) - 1)  # each says what it expects next
    said = answer.tokens[answer.num_prompt_tokens :]
    chosen = exact[rows].max(-1)
    gaps = chosen.values - exact[rows].gather(-1, said[:, None])[:, 0]
    return Comparison(
        question=f"{question.name}: {question.text}",
        answer=answer.text,
        num_tokens=len(said),
        num_equal_tokens=int((chosen.indices == said).sum()),
        difference=_rms(answer.logits - exact) / scale,
        approximate_difference=_rms(answer.logits - approximate) / scale,
        worst_gap=float(gaps.max()) / scale,
    )


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def raise_differences(comparisons: Sequence[Comparison], tolerance: float) -> None:
    """Raises UserError for the worst question where logits or greedy tokens differ by more than rounding.

    Of two tokens that are equally likely up to the tolerance either may be chosen.
    """
    worst = max(comparisons, key=lambda comparison: max(comparison.difference, comparison.worst_gap / 10))
    if worst.difference <= tolerance and worst.worst_gap <= 10 * tolerance:
        return
    found = (
        f"logits that differ from the checkpoint's by {worst.difference:.2g} of their standard deviation, and "
        f"{worst.num_equal_tokens} of {worst.num_tokens} greedy tokens equal"
    )
    raise UserError(Problem(worst.question, found, f"at most {tolerance:g}, and the same answer"), STATE)
