"""What a user writes to name one dataset or several.

The plain form, for `data.train_path`, `data.validation_path` and Energon's `data.path`:

    train.jsonl                                    one dataset
    [a.jsonl, b.jsonl]                             several; each sample once an epoch
    {chat: a.jsonl, ocr: {path: b.jsonl}}          several with names: validation logs val_loss_chat and val_loss_ocr
    {chat: {path: a.jsonl, weight: 3}, ocr: {path: b.jsonl, weight: 1, image_folder: scans}}

`weight` is a dataset's share of the samples of each step (here 3 of 4), by all datasets or by none. A weighted dataset
has epochs of its own: it starts over when all its samples have come by, however far the others are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmsft.errors import Problem, UserError, nearest


@dataclass(frozen=True)
class Source:
    """One dataset as the user named it.

    key: of the config, for messages, e.g. data.train_path.chat
    name: None where the user gave a path only
    weight: share of each step's samples, relative to the others'; None = by the number of samples
    """

    key: str
    name: str | None
    path: str
    weight: float | None = None
    image_folder: str | None = None


def sources(value: Any, key: str, image_folder: str | None = None, *, has_image_folders: bool = True) -> list[Source]:
    """The datasets that `value` (a path, a list or a mapping: see above) names, in its order; [] for None.

    key: of the config, for messages
    image_folder: of the datasets that name none
    has_image_folders: False where images lie with the records
    Raises UserError with all that can't be understood.
    """
    known = ("path", "weight", "image_folder") if has_image_folders else ("path", "weight")
    if value is None:
        return []
    if isinstance(value, str):
        return [Source(key, None, value, image_folder=image_folder)]
    problems: list[Problem] = []
    if isinstance(value, Mapping) and value:
        found = [
            _named_source(name, entry, f"{key}.{name}", image_folder, known, problems) for name, entry in value.items()
        ]
        problems += _weight_problems(found, key)
    elif isinstance(value, Sequence) and value:
        found = [_listed_source(entry, f"{key}[{n}]", image_folder, problems) for n, entry in enumerate(value)]
    else:
        raise UserError(Problem(key, repr(value), "a path, a list of paths or a mapping of names to paths"))
    if problems:
        raise UserError(problems)
    return found


def _listed_source(entry: Any, key: str, image_folder: str | None, problems: list[Problem]) -> Source:
    if not isinstance(entry, str):
        problems.append(Problem(key, repr(entry), "a path", "With more than a path, datasets are a mapping by name"))
    return Source(key, None, str(entry), image_folder=image_folder)


def _named_source(
    name: Any, entry: Any, key: str, image_folder: str | None, known: Sequence[str], problems: list[Problem]
) -> Source:
    if not str(name).replace("-", "_").isidentifier():
        problems.append(Problem(key, repr(name), "a name of letters, digits, - and _: it becomes part of a metric's"))
    if isinstance(entry, str):
        return Source(key, str(name), entry, image_folder=image_folder)
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        problems.append(Problem(key, repr(entry), "a path, or a mapping with `path`"))
        return Source(key, str(name), "")
    for other in entry:
        if other not in known:
            hint = nearest(str(other), known)
            problems.append(Problem(f"{key}.{other}", repr(entry[other]), " or ".join(known), hint))
    weight = entry.get("weight")
    if weight is not None and not (type(weight) in (int, float) and 0 < weight < math.inf):
        problems.append(Problem(f"{key}.weight", repr(weight), "a positive number, or no weight at all"))
        weight = None
    return Source(key, str(name), entry["path"], weight, entry.get("image_folder", image_folder))


def _weight_problems(found: list[Source], key: str) -> list[Problem]:
    without = [source.name for source in found if source.weight is None]
    if not without or len(without) == len(found):
        return []
    return [Problem(key, f"no weight for {', '.join(map(str, without))}", "a weight for every dataset, or for none")]


def label(source: Source, number: int) -> str:
    """A dataset's name, or its place in the list."""
    return source.name if source.name is not None else str(number)
