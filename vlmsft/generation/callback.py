"""A few validation questions, answered by the model as it trains: with pictures in TensorBoard, W&B and a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor

from vlmsft.data.collate import collate
from vlmsft.data.encode import IGNORE, EncodedSample, SampleEncoder
from vlmsft.runtime.logging import console

if TYPE_CHECKING:
    from vlmsft.mllama.model import MLlamaModel

COLUMNS = ("step", "number", "question", "reference", "answer", "image")


class ValidationAnswers(pl.Callback):
    """After each validation: greedy answers to the first `num_samples` questions that data-parallel rank 0 validated.

    Training is left as it was: no random number is drawn, nothing is read from a loader, no state is kept. Each token
    costs a forward pass of the text decoder (there is no key-value cache in training), the tower runs once.

    num_samples: questions; max_new_tokens: most tokens of an answer
    processor: folder or hub id of the processor that the data was encoded with
    path: the file, a line for each answer (COLUMNS); the pictures lie in a folder of its name without suffix
    """

    def __init__(self, num_samples: int, max_new_tokens: int, processor: str, path: str):
        self.num_samples = num_samples
        self.max_new_tokens = max_new_tokens
        self.path = Path(path)
        self._encoder = SampleEncoder(processor, decoder_seq_length=1 << 30)
        self._questions: list[Question] = []
        self._is_collecting = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            drop_after(self.path, trainer.global_step)

    def on_megatron_microbatch_start(self, step: Any, batch: Any) -> None:
        """NeMo's hook: Lightning's see only the last micro batch of a global one."""
        if self._is_collecting and step.trainer is not None and step.trainer.validating and isinstance(batch, dict):
            missing = self.num_samples - len(self._questions)
            self._questions += questions_of(batch, missing)
            self._is_collecting = len(self._questions) < self.num_samples

    @torch.no_grad()
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or not self._questions or not takes_part():
            return
        self._is_collecting = False  # the same questions at each validation
        was_training = pl_module.training
        pl_module.eval()
        answers = generate(
            cast("MLlamaModel", pl_module), self._questions, self.max_new_tokens, self._ends, self._encoder.pad_token_id
        )
        pl_module.train(was_training)
        if trainer.is_global_zero:
            self._log(trainer, [self._decode(ids) for ids in answers])

    @property
    def _ends(self) -> set[int]:
        """The tokens that end references, and the tokenizer's own end."""
        ends = {self._encoder.processor.tokenizer.eos_token_id}
        return ends | {question.reference[-1] for question in self._questions if not question.is_cut}

    def _decode(self, ids: list[int]) -> str:
        return self._encoder.processor.tokenizer.decode(ids, skip_special_tokens=True)

    def _log(self, trainer: pl.Trainer, answers: list[str]) -> None:
        step = trainer.global_step
        rows = []
        for number, (question, answer) in enumerate(zip(self._questions, answers, strict=True)):
            images = self._save_pictures(number, question)
            prompt = question_text(self._decode(question.sample.tokens.tolist()))
            values = (step, number, prompt, self._decode(question.reference), answer, images)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                log_to_tensorboard(logger, rows, self._questions)
            elif isinstance(logger, WandbLogger):
                log_to_wandb(logger, rows, self._questions)
        console().print(short_line(rows), markup=False, highlight=False)

    def _save_pictures(self, number: int, question: Question) -> list[str]:
        """File names relative to the folder of `path`."""
        folder = self.path.with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"{number}-{place}.jpg" for place in range(len(question.pictures))]
        for name, picture in zip(names, question.pictures, strict=True):
            if not (folder / name).exists():
                Image.fromarray(picture).save(folder / name, quality=90)
        return [f"{folder.name}/{name}" for name in names]


@dataclass(frozen=True)
class Question:
    """A validation sample up to its first answer.

    sample: the prompt, with the images that stand in it
    reference: the answer's tokens, the one that ends it included unless is_cut
    is_cut: decoder_seq_length cut the sample off within this answer
    """

    sample: EncodedSample
    reference: list[int]
    is_cut: bool
    pictures: list[np.ndarray] = field(repr=False)  # (height, width, 3) uint8 each


def questions_of(batch: dict[str, Any], limit: int) -> list[Question]:
    """Up to `limit` questions of a micro batch (see vlmsft.data.collate); samples without an answer are left out."""
    found = [_question(batch, row) for row in range(len(batch["tokens"]))]
    return [question for question in found if question is not None][:limit]


def _question(batch: dict[str, Any], row: int) -> Question | None:
    labels = batch["labels"][row].cpu()
    learned = (labels != IGNORE).nonzero().flatten()
    if not len(learned):
        return None
    start = int(learned[0])  # of the answer among the labels: the last token of the prompt
    gaps = (labels[start:] == IGNORE).nonzero().flatten()
    length = int(gaps[0]) if len(gaps) else len(labels) - start
    cut = int(batch["num_truncated_tokens"][row]) > 0 and start + length > int(learned[-1])
    is_first = batch["visible_from"] <= start
    chosen = (batch["image_sample"] == row) & is_first
    tiles = batch["tiles"].cpu().split(batch["num_tiles"].tolist())
    own = [tiles[image] for image in chosen.nonzero().flatten().tolist()]
    until = batch["visible_until"][chosen]
    sample = EncodedSample(
        tokens=batch["tokens"][row, : start + 1].cpu(),
        labels=torch.full((start + 1,), IGNORE),
        tiles=torch.cat([batch["tiles"][:0].cpu(), *own]),
        num_tiles=batch["num_tiles"][chosen],
        aspect_ratio_ids=batch["aspect_ratio_ids"][chosen],
        visible_from=batch["visible_from"][chosen],
        visible_until=until.clamp(max=start + 1),
    )
    ratios = sample.aspect_ratio_ids.tolist()
    pictures = [picture(of_image, ratio) for of_image, ratio in zip(own, ratios, strict=True)]
    return Question(sample, labels[start : start + length].tolist(), cut, pictures)


def picture(tiles: Tensor, aspect_ratio_id: int) -> np.ndarray:
    """(T, 3, tile, tile) uint8 and HF's id of their arrangement -> (height, width, 3), black border cut off."""
    from transformers.models.mllama.image_processing_mllama import get_all_supported_aspect_ratios

    ratios = get_all_supported_aspect_ratios(max(4, len(tiles)))
    rows, columns = ratios[aspect_ratio_id - 1]
    size = tiles.shape[-1]
    grid = tiles.numpy().reshape(rows, columns, 3, size, size)
    canvas = grid.transpose(0, 3, 1, 4, 2).reshape(rows * size, columns * size, 3)
    filled = canvas.any(axis=2)
    height, width = (int(np.flatnonzero(filled.any(axis=axis)).max(initial=0)) + 1 for axis in (1, 0))
    return canvas[:height, :width]


def generate(
    model: MLlamaModel, questions: list[Question], max_new_tokens: int, ends: set[int], pad_token_id: int
) -> list[list[int]]:
    """Greedy answers' tokens, without the ones that end them. All tensor-parallel ranks call it together."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    answers: list[list[int]] = [[] for _ in questions]
    unfinished = set(range(len(questions)))
    with tower_runs_once(model):
        for _ in range(max_new_tokens):
            samples = [grown(question.sample, answer) for question, answer in zip(questions, answers, strict=True)]
            batch = model.data_step(iter([collate(samples, pad_token_id)]))
            del batch["labels"]
            logits = model.forward_step(batch)  # (B, S, vocab_size / TP)
            last = torch.tensor([len(sample.tokens) - 1 for sample in samples], device=logits.device)
            logits = logits[torch.arange(len(samples), device=logits.device), last]
            tokens = gather_from_tensor_model_parallel_region(logits).argmax(-1).tolist()
            for row in sorted(unfinished):
                if tokens[row] in ends:
                    unfinished.remove(row)
                else:
                    answers[row].append(tokens[row])
            if not unfinished:
                break
    return answers


def grown(sample: EncodedSample, answer: list[int]) -> EncodedSample:
    """The prompt and the tokens so far; images that its last token sees are seen by those as well."""
    length = len(sample.tokens)
    sees = sample.visible_until == length
    return replace(
        sample,
        tokens=torch.cat([sample.tokens, torch.tensor(answer, dtype=torch.int64)]),
        labels=torch.full((length + len(answer),), IGNORE),
        visible_until=torch.where(sees, length + len(answer), sample.visible_until),
    )


@contextmanager
def tower_runs_once(model: MLlamaModel) -> Iterator[None]:
    """Keeps the vision tower's output from the first forward pass for the others: the images stay the same."""
    from vlmsft.mllama.model import MLlamaBase

    base = next(module for module in model.modules() if isinstance(module, MLlamaBase))
    tower, kept = base.vision_model, []
    forward = tower.forward

    def first_result(*args: Any, **kwargs: Any) -> Any:
        if not kept:
            kept.append(forward(*args, **kwargs))
        return kept[0]

    tower.forward = first_result
    try:
        yield
    finally:
        del tower.forward  # the class's own shows again


def takes_part() -> bool:
    """Whether this rank is of the first data-parallel replica; its tensor-parallel ranks generate together."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0


def question_text(prompt: str) -> str:
    """What the user said, from a decoded prompt without special tokens: role names stand alone on their lines."""
    body = prompt.rpartition("assistant\n\n")[0]
    return body.partition("user\n\n")[2].strip() or prompt.strip()


def log_to_tensorboard(logger: TensorBoardLogger, rows: list[dict[str, Any]], questions: list[Question]) -> None:
    writer: Any = logger.experiment
    for row, question in zip(rows, questions, strict=True):
        name, step = f"answers/{row['number']}", row["step"]
        lines = [f"**{key}**: {_markdown(row[key])}" for key in ("question", "reference", "answer")]
        writer.add_text(name, "\n\n".join(lines), step)
        for place, array in enumerate(question.pictures):
            writer.add_image(f"{name}/{place}", array, step, dataformats="HWC")


def _markdown(text: str) -> str:
    return "".join(f"\\{character}" if character in "\\`*_{}[]<>#|" else character for character in text)


def log_to_wandb(logger: WandbLogger, rows: list[dict[str, Any]], questions: list[Question]) -> None:
    import wandb

    columns = ["step", "question", "reference", "answer", "images"]
    data = [
        [*(row[key] for key in columns[:-1]), [wandb.Image(array) for array in question.pictures]]
        for row, question in zip(rows, questions, strict=True)
    ]
    logger.log_table("answers", columns=columns, data=data, step=rows[0]["step"])


def short_line(rows: list[dict[str, Any]], width: int = 40) -> str:
    """How many answers are right to the letter, and the first that isn't."""
    wrong = [row for row in rows if row["answer"].strip() != row["reference"].strip()]
    shown = (wrong or rows)[0]
    question, answer, reference = (_short(shown[key], width) for key in ("question", "answer", "reference"))
    right = f"{len(rows) - len(wrong)} of {len(rows)} answers equal their reference"
    return f"{right}; {question} -> {answer}" + (f" (reference: {reference})" if wrong else "")


def _short(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 3]}..."


def drop_after(path: Path, step: int) -> None:
    """Takes out the lines of steps that a resumed run is about to do again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if len(kept) < len(lines):
        path.write_text("".join(kept), encoding="utf-8")
