"""Run by llm-jp-eval-mm's own Python: it hands out a task's questions, and scores answers. Imports nothing of vlmsft's.

    driver.py samples <task id> <folder for pictures> [--tasks FILE] [--limit N] [--rotate-choices]
    driver.py scores [--tasks FILE]

Lines of JSON go to stdout, and come from stdin; what libraries print goes to stderr. `samples` writes
{"sample": {...}} for each question, then {"done": {"versions": {...}}}. `scores` reads lines

    {"metric": ..., "judge_model": ..., "references": [...], "answers": [...], "fields": [...]}

for each writes {"judge": [messages, ...]} whenever the scorer wants replies, reads {"replies": [text or null, ...]},
and at last writes {"scores": [...]}: what the scorer gave for each answer, null where a reply was null.

`--tasks FILE` is a Python file with TASKS = {id: class} and, if it likes, SCORERS = {metric: class}, of eval_mm's
classes Task and Scorer.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

PICTURE_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""Pillow's, that PNG has too."""


def main() -> None:
    arguments = parse()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # llm-as-a-judge prints every reply, datasets draws bars

    def write(line: dict[str, Any]) -> None:
        out.write(json.dumps(line, ensure_ascii=False) + "\n")
        out.flush()

    if arguments.command == "samples":
        for sample in samples(arguments):
            write({"sample": sample})
        write({"done": {"versions": versions()}})
    else:
        while line := sys.stdin.readline():
            write({"scores": scores(json.loads(line), arguments.tasks, write)})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    asking = commands.add_parser("samples")
    asking.add_argument("task")
    asking.add_argument("pictures", type=Path)
    asking.add_argument("--limit", type=int)
    asking.add_argument("--rotate-choices", action="store_true")
    for command in (asking, commands.add_parser("scores")):
        command.add_argument("--tasks", type=Path)
    return parser.parse_args()


def own(tasks: Path | None, name: str) -> dict[str, Any]:
    return {} if tasks is None else runpy.run_path(str(tasks)).get(name, {})


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("eval-mm", "datasets", "rouge-score", "sacrebleu")}


# --- questions --------------------------------------------------------------------------------------------------------


def samples(arguments: argparse.Namespace):
    """Not max_dataset_len: the task would fail where it has fewer."""
    from eval_mm import TaskConfig, TaskRegistry  # pyright: ignore[reportAttributeAccessIssue]

    config = TaskConfig(rotate_choices=arguments.rotate_choices)
    classes = own(arguments.tasks, "TASKS")
    if arguments.task in classes:
        task = classes[arguments.task](config)
    else:
        task = TaskRegistry.load_task(arguments.task, config)
    number = len(task.dataset) if arguments.limit is None else min(arguments.limit, len(task.dataset))
    arguments.pictures.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        doc = task.dataset[index]
        answer = task.doc_to_answer(doc)
        prompt = task.doc_to_text(doc).replace("<image>", "")  # as its examples/sample.py does
        fields = {name: value for name, value in doc.items() if is_plain(value)}
        yield {
            "id": str(task.doc_to_id(doc)),
            "prompt": prompt,
            "references": [str(each) for each in (answer if isinstance(answer, list) else [answer])],
            "images": [kept(picture, arguments.pictures) for picture in task.doc_to_visual(doc) or []],
            "fields": {"input_text": prompt, **fields},  # llm-as-a-judge reads it
        }


def is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    return value is None or isinstance(value, (str, int, float, bool))


def kept(picture: Any, folder: Path) -> str:
    """The picture's file, named by its pixels; as PNG, for eval-mm hands out decoded pictures."""
    if picture.mode not in PICTURE_MODES:
        picture = picture.convert("RGB")
    palette = repr(picture.getpalette()) if picture.mode == "P" else ""
    told = f"{picture.mode} {picture.size} {palette}".encode()
    path = folder / f"{hashlib.sha256(told + picture.tobytes()).hexdigest()[:20]}.png"
    if not path.exists():
        aside = path.with_suffix(f".{os.getpid()}")
        picture.save(aside, "PNG", compress_level=1)
        aside.replace(path)
    return str(path)


# --- scores -----------------------------------------------------------------------------------------------------------


class Docs(list):
    """A data set as scorers use it: rows by number, columns by name."""

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


class Judge:
    """In place of eval_mm.OpenAIChatAPI, which wants a key at once and makes "" of each failure."""

    def __init__(self, write: Any):
        self.write = write
        self.failed: list[bool] = []

    def batch_generate_chat_response(self, chat_messages_list: list[Any], **_: Any) -> list[str]:
        self.write({"judge": chat_messages_list})
        replies = json.loads(sys.stdin.readline())["replies"]
        self.failed += [reply is None for reply in replies]
        return ["" if reply is None else reply for reply in replies]


def scores(asked: dict[str, Any], tasks: Path | None, write: Any) -> list[Any]:
    """One of a reply's failures per answer: the scorers ask once for each answer, in order, in a single batch."""
    from eval_mm import ScorerConfig, ScorerRegistry  # pyright: ignore[reportAttributeAccessIssue]

    judge = Judge(write)
    answers, references = asked["answers"], asked["references"]
    config = ScorerConfig(
        docs=Docs(asked["fields"]),
        judge_model=asked["judge_model"],
        client=judge,
        batch_size=max(1, len(answers)),
    )
    classes = own(tasks, "SCORERS")
    metric = asked["metric"]
    scorer = classes[metric](config) if metric in classes else ScorerRegistry.load_scorer(metric, config)
    with contextlib.redirect_stdout(sys.stderr):
        found = scorer.score(references, answers)
    failed = judge.failed or [False] * len(answers)
    return [None if has_failed else score for score, has_failed in zip(found, failed, strict=True)]


if __name__ == "__main__":
    main()
