"""python -m vlmsft.generate checkpoint=... image=... prompt=...: a model's answer to a question or a file of them."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig

from vlmsft.cli import command, quoted
from vlmsft.config_files import absolute_path
from vlmsft.errors import Problem, UserError

if TYPE_CHECKING:
    from vlmsft.generation.generate import Generator, Sampling

TEXT_KEYS = ("prompt", "image", "input", "output", "image_folder", "checkpoint")
SAMPLING_KEYS = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")


def quote_texts(arguments: list[str]) -> list[str]:
    """Command line arguments with the values of TEXT_KEYS quoted for Hydra, where its grammar can't read them.

    Unquoted, Hydra takes few characters beside ASCII letters: prompt="何ですか？" would be refused.
    """
    return [_quoted(argument) for argument in arguments]


def _quoted(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if not equals or key not in TEXT_KEYS or (key == "image" and value.startswith("[")):
        return argument
    try:
        OverridesParser.create().parse_override(argument)
        readable = key != "prompt" or value == "null" or value[:1] in ("'", '"')
    except (OverrideParseException, HydraException):
        readable = False
    if readable:
        return argument
    return f"{key}={quoted(value)}"


@command("generate")
def main(cfg: DictConfig) -> None:
    warnings.filterwarnings("ignore", "The pynvml package is deprecated", FutureWarning)  # torch's, at import
    problems = problems_of_keys(cfg)
    if problems:
        raise UserError(problems)
    if cfg.input is not None:
        sys.exit(answer_file(cfg))
    answer_one(cfg)


def problems_of_keys(cfg: DictConfig) -> list[Problem]:
    """Which of the two ways to ask is meant, and what it lacks."""
    from omegaconf import OmegaConf

    problems = []
    if OmegaConf.is_missing(cfg, "checkpoint"):
        problems.append(Problem("checkpoint", "nothing", "a run's name, a checkpoint or a Hugging Face folder"))
    if (cfg.prompt is None) == (cfg.input is None):
        found = "neither" if cfg.prompt is None else "both"
        problems.append(Problem("prompt, input", found, "one of them: a question, or a file of questions"))
    if cfg.input is not None and cfg.output is None:
        problems.append(Problem("output", "null", "the file that the answers go to", "output=answers.jsonl"))
    if cfg.input is not None and cfg.image is not None:
        problems.append(Problem("image", str(cfg.image), "null with input: its records name their images"))
    if cfg.batch_size < 1:
        problems.append(Problem("batch_size", str(cfg.batch_size), "at least 1"))
    return problems


def sampling_of(cfg: DictConfig) -> Sampling:
    from vlmsft.generation.generate import Sampling

    return Sampling(**{key: cfg[key] for key in SAMPLING_KEYS}, stop=tuple(cfg.stop))


def find_problems(cfg: DictConfig) -> list[Problem]:
    """What is wrong with the model's place and with the values, all at once."""
    from vlmsft.generation.model import resolve_device, resolve_dtype, resolve_source

    problems = sampling_of(cfg).problems()
    checks = ((resolve_source, cfg.checkpoint), (resolve_device, cfg.device), (resolve_dtype, cfg.dtype))
    for check, value in checks:
        try:
            check(value)
        except UserError as error:
            problems += error.problems
    return problems


def load(cfg: DictConfig) -> Generator:
    from transformers.utils import logging as transformers_logging

    from vlmsft.generation.generate import Generator
    from vlmsft.generation.model import load_model

    transformers_logging.set_verbosity_error()
    return Generator(load_model(cfg.checkpoint, cfg.device, cfg.dtype, cfg.processor))


def answer_one(cfg: DictConfig) -> None:
    """The answer on stdout as it comes, and a line on stderr if it was cut."""
    from vlmsft.data.encode import load_image
    from vlmsft.generation.generate import Prompt, raise_problems

    problems, images = find_problems(cfg), []
    names = [] if cfg.image is None else [cfg.image] if isinstance(cfg.image, str) else list(cfg.image)
    for name in names:
        try:
            images.append(load_image(absolute_path(name), "image"))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    prompt = Prompt.from_text(cfg.prompt, images)
    sampling = sampling_of(cfg)
    raise_problems([prompt], [sampling])
    stream = load(cfg).stream(prompt, sampling)
    for piece in stream:
        print(piece, end="", flush=True)
    print(flush=True)
    assert stream.answer is not None
    if stream.answer.finish_reason == "length":
        print(f"The answer was cut at max_new_tokens = {cfg.max_new_tokens}.", file=sys.stderr)


def answer_file(cfg: DictConfig) -> int:
    """Answers what is not answered yet; 1 if a question couldn't be asked."""
    from vlmsft.data.records import RecordFile, capped
    from vlmsft.generation.ask import ask, report
    from vlmsft.generation.questions import image_problems, read_questions
    from vlmsft.runtime.logging import console

    folder = None if cfg.image_folder is None else absolute_path(cfg.image_folder)
    problems = find_problems(cfg)
    answers, todo = None, []
    try:
        records = RecordFile(absolute_path(cfg.input))
        questions, wrong = read_questions(records)
        problems += wrong
        if not problems:
            answers = answers_file(cfg, records)
            todo = [question for question in questions if question.index not in answers.answered]
        problems += image_problems(todo if answers else questions, folder, cfg.verify_images)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(capped(problems))
    assert answers is not None
    if not todo:
        console().print(f"{answers.path} holds all {len(answers.answered)} answers already; nothing was asked")
        return 0
    if answers.answered:
        console().print(f"{len(answers.answered)} questions are answered already, {len(todo)} are left")
    generator = load(cfg)
    failed = ask(generator, todo, sampling_of(cfg), answers, folder, cfg.batch_size)
    report(answers, failed, cfg.max_new_tokens)
    return 1 if failed else 0


def answers_file(cfg: DictConfig, records: Any):
    """The output, with everything in its settings that an answer depends on."""
    from vlmsft.generation.answers_file import AnswersFile
    from vlmsft.generation.model import resolve_source

    settings = {
        "checkpoint": str(resolve_source(cfg.checkpoint).resolve()),
        "processor": cfg.processor,
        "dtype": cfg.dtype,
        "input_sha256": records.sha256,
        **{key: cfg[key] for key in SAMPLING_KEYS},
        "stop": list(cfg.stop),
    }
    return AnswersFile(absolute_path(cfg.output), settings)


if __name__ == "__main__":
    sys.argv[1:] = quote_texts(sys.argv[1:])
    main()
