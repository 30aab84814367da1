"""Run by llm-jp-eval-mm's own Python: it hands out tasks' questions, and scores answers. Imports nothing of vlmsft's.

A line of JSON comes on stdin, lines of JSON go to stdout, until stdin ends; what libraries print goes to stderr.

    {"samples": task id, "tasks_file": ..., "limit": ..., "rotate_choices": ..., "pictures": folder}
        gives {"sample": {...}} for each question, then {"done": {"versions": {...}}}
    {"scores": metric, "tasks_file": ..., "judge_model": ..., "references": [...], "answers": [...], "fields": [...]}
        gives {"judge": [messages, ...]} whenever the scorer wants replies, reads {"replies": [text or null, ...]}, and
        at last gives {"done": [...]}: what the scorer gave for each answer, null where a reply was null

Either may give {"error": text} instead. `tasks_file` is null, or a Python file with TASKS = {id: class} and, if it
likes, SCORERS = {metric: class}, of eval_mm's classes Task and Scorer.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import runpy
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PICTURE_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""Pillow's, that PNG has too."""


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # llm-as-a-judge prints every reply, datasets draws bars

    def write(line: dict[str, Any]) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    while line := sys.stdin.readline():
        request = json.loads(line)
        try:
            if "samples" in request:
                for sample in samples(request):
                    write({"sample": sample})
                write({"done": {"versions": versions()}})
            else:
                write({"done": scores(request, write)})
        except Exception as error:  # whatever a task's or a scorer's code raises
            write({"error": told(error, request["tasks_file"])})


def told(error: Exception, tasks_file: str | None) -> str:
    """One line, and where in the user's own file it came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == tasks_file]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return " ".join(f"{type(error).__name__}: {error}".split()) + where


def own(request: dict[str, Any], name: str) -> dict[str, Any]:
    return {} if request["tasks_file"] is None else runpy.run_path(request["tasks_file"]).get(name, {})


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("eval-mm", "datasets", "rouge-score", "sacrebleu")}


# --- questions --------------------------------------------------------------------------------------------------------


def samples(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Not max_dataset_len: the task would fail where it has fewer."""
    from eval_mm import TaskConfig, TaskRegistry  # pyright: ignore[reportAttributeAccessIssue]

    name, pictures, limit = request["samples"], Path(request["pictures"]), request["limit"]
    config = TaskConfig(rotate_choices=request["rotate_choices"])
    classes = own(request, "TASKS")
    task = classes[name](config) if name in classes else TaskRegistry.load_task(name, config)
    number = len(task.dataset) if limit is None else min(limit, len(task.dataset))
    pictures.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        doc = task.dataset[index]
        answer = task.doc_to_answer(doc)
        prompt = task.doc_to_text(doc).replace("<image>", "")  # as its examples/sample.py does
        fields = {name: value for name, value in doc.items() if is_plain(value)}
        yield {
            "id": str(task.doc_to_id(doc)),
            "prompt": prompt,
            "references": [str(each) for each in (answer if isinstance(answer, list) else [answer])],
            "images": [kept(picture, pictures) for picture in task.doc_to_visual(doc) or []],
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


def scores(request: dict[str, Any], write: Any) -> list[Any]:
    """Scorers that judge ask once for each answer, in order, in a single batch: a reply's failure is its answer's."""
    from eval_mm import ScorerConfig, ScorerRegistry  # pyright: ignore[reportAttributeAccessIssue]

    judge = Judge(write)
    answers, references = request["answers"], request["references"]
    config = ScorerConfig(
        docs=Docs(request["fields"]),
        judge_model=request["judge_model"],
        client=judge,
        batch_size=max(1, len(answers)),
    )
    classes, metric = own(request, "SCORERS"), request["scores"]
    scorer = classes[metric](config) if metric in classes else ScorerRegistry.load_scorer(metric, config)
    with contextlib.redirect_stdout(sys.stderr):
        found = scorer.score(references, answers)
    failed = judge.failed or [False] * len(answers)
    return [None if has_failed else score for score, has_failed in zip(found, failed, strict=True)]


if __name__ == "__main__":
    main()
