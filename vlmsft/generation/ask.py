"""A file of questions through a generator: batches of like length, a bar, answers on disk as soon as they are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from vlmsft.data.records import capped
from vlmsft.errors import Problem, UserError
from vlmsft.generation.answers_file import AnswersFile
from vlmsft.generation.generate import Answer, Generator, Prompt, Sampling
from vlmsft.generation.questions import Question
from vlmsft.runtime.bar import Bar
from vlmsft.runtime.logging import console

NUM_EXAMPLES = 3
"""Answers that the report shows."""


def ask(
    generator: Generator,
    questions: Sequence[Question],
    sampling: Sampling,
    answers: AnswersFile,
    image_folder: str | None,
    batch_size: int,
) -> list[Problem]:
    """Answers all questions into `answers`; gives what is wrong with those that could not be asked.

    The longest go first: what doesn't fit into memory fails at once, and the time left is never too small.
    """
    ordered = sorted(questions, key=lambda q: (len(q.images), q.num_characters), reverse=True)
    failed: list[Problem] = []
    answers.begin()
    with Bar("answers", len(ordered)) as bar:
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            failed += _ask_batch(generator, batch, sampling, answers, image_folder)
            bar.advance(len(batch), cut=num_cut(answers), failed=len(failed))
    answers.finish()
    return failed


def _ask_batch(
    generator: Generator, batch: Sequence[Question], sampling: Sampling, answers: AnswersFile, image_folder: str | None
) -> list[Problem]:
    asked: list[tuple[Question, Prompt]] = []
    failed: list[Problem] = []
    for question in batch:
        try:
            asked.append((question, question.prompt(image_folder)))
        except UserError as error:
            failed += error.problems
    prompts = [prompt for _, prompt in asked]
    # a seed for each question: else all rows would draw the same numbers
    samplings = [replace(sampling, seed=_seed(sampling.seed, question.index)) for question, _ in asked]
    try:
        for (question, _), answer in zip(asked, generator.generate(prompts, samplings), strict=True):
            answers.add(answer_record(question, answer))
    except torch.OutOfMemoryError:
        found = f"{len(batch)}, for which the GPU's memory is too small"
        state = f"{len(answers.answered)} answers are in {answers.path}, and the same command goes on from there"
        raise UserError(Problem("batch_size", found, "fewer questions at once"), state) from None
    return failed


def _seed(seed: int, index: int) -> int:
    return (seed * 1_000_003 + index) % 2**63


def answer_record(question: Question, answer: Answer) -> dict:
    """A line of the output."""
    return {
        "index": question.index,
        "id": question.id,
        "image": list(question.images),
        "prompt": question.text,
        "reference": question.reference,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "num_tokens": answer.num_tokens,
    }


def num_cut(answers: AnswersFile) -> int:
    """Answers that max_new_tokens cut."""
    return sum(answer["finish_reason"] == "length" for answer in answers.answered.values())


def report(answers: AnswersFile, failed: Sequence[Problem], max_new_tokens: int) -> None:
    """A few of the answers, what became of the questions, and each that could not be asked."""
    out = console()
    for record in examples(list(answers.answered.values())):
        for name in ("image", "prompt", "reference", "answer"):
            shown = ", ".join(record[name]) if name == "image" else record[name]
            if shown:
                out.print(f"{name + ':':10} {shown}", markup=False, highlight=False)
        out.print()
    cut = num_cut(answers)
    text = f"{len(answers.answered)} answers in {answers.path}"
    if cut:
        text += f"; {cut} of them cut at max_new_tokens = {max_new_tokens} (finish_reason length)"
    out.print(text, markup=False, highlight=False)
    if failed:
        out.print(f"{len(failed)} questions could not be asked; the same command asks them again:", highlight=False)
    for problem in capped(list(failed)):
        out.print(f"  {problem}", markup=False, highlight=False)


def examples(records: Sequence[dict]) -> list[dict]:
    """NUM_EXAMPLES of the answers, spread over the file."""
    ordered = sorted(records, key=lambda record: record["index"])
    step = max(1, len(ordered) // NUM_EXAMPLES)
    return ordered[::step][:NUM_EXAMPLES]
