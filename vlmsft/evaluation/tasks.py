"""Tasks: their YAML found and filled in, their records made into samples.

A task is a YAML file; conf/evaluate.yaml (task_defaults) has its keys. Data come from a JSON, JSONL or Parquet file or
from a data set on the Hugging Face hub. Imports neither torch nor a web library.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image

from vlmsft.data.records import IMAGE_MARKER, RecordFile, Turn, capped, image_path
from vlmsft.errors import Problem, UserError, nearest
from vlmsft.evaluation.runner import Task
from vlmsft.evaluation.store import Sample, Store

FILE_SUFFIXES = (".json", ".jsonl", ".parquet")
SENT_AS_THEY_ARE = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp"}
"""Picture formats that every server reads, and their names in data URLs; others are sent as PNG."""
ID_COLUMNS = ("id", "question_id")
OPTION_PATHS = {"tasks_file"}
"""Options of runners that name a file."""

Picture = Path | Callable[[], bytes]
"""A file, or what gives a file's bytes."""


# --- the YAML ---------------------------------------------------------------------------------------------------------


def read_tasks(
    spec: Any, folders: Sequence[Path], defaults: Mapping[str, Any], scorers: Mapping[str, Any]
) -> tuple[list[Task], list[Problem]]:
    """The tasks that `tasks=[...]` names, and what is wrong with them.

    spec: a list of tasks' names (of YAML files in `folders`) and of paths to such files; or one of them
    folders: the folders "task" of the configuration's search path
    defaults, scorers: conf/evaluate.yaml: task_defaults and scorers
    """
    names = [spec] if isinstance(spec, str) else spec
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return [], [Problem("tasks", repr(spec), "a list with at least one task", "tasks=[sample]")]
    tasks: list[Task] = []
    problems: list[Problem] = []
    for name in names:
        try:
            path = find_task(name, folders)
            tasks.append(read_task(path, defaults, scorers))
        except UserError as error:
            problems += error.problems
    names = [task.name for task in tasks]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(Problem("tasks", f"{name} twice", "each task once", "Rename one of the YAML files"))
    return tasks, problems


def find_task(spec: str, folders: Sequence[Path]) -> Path:
    """Raises UserError naming the nearest task."""
    if spec.endswith((".yaml", ".yml")):
        path = Path(spec).expanduser()
        if path.is_file():
            return path
        raise UserError(Problem("tasks", f"{spec}, which is no file", "a task's YAML"))
    for folder in folders:
        path = folder / f"{spec}.yaml"
        if path.is_file():
            return path
    names = task_names(folders)
    remedy = nearest(spec, names) or "A task of your own: tasks=[path/to/my_task.yaml]"
    raise UserError(Problem("tasks", repr(spec), f"one of {', '.join(names)}", remedy))


def task_names(folders: Iterable[Path]) -> list[str]:
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def read_task(path: Path, defaults: Mapping[str, Any], scorers: Mapping[str, Any]) -> Task:
    """Raises UserError with every key that no task has, and every scorer that there is none of."""
    try:
        own = OmegaConf.load(path)
    except (OSError, ValueError, OmegaConfBaseException) as error:
        raise UserError(Problem(str(path), f"no YAML ({error})", "a task")) from None
    except Exception as error:  # yaml's own
        raise UserError(Problem(str(path), f"broken YAML ({error})", "a task")) from None
    if not isinstance(own, DictConfig):
        raise UserError(Problem(str(path), "no mapping", f"the keys {', '.join(defaults)}"))
    problems = [
        Problem(f"{path}: {key}", "no such key", f"one of {', '.join(defaults)}", nearest(str(key), defaults))
        for key in own
        if key not in defaults
    ]
    if problems:
        raise UserError(problems)
    try:
        values = OmegaConf.to_container(own, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(Problem(str(path), f"what can't be resolved ({error})", "a task")) from None
    config = {**defaults, **cast(dict[str, Any], values)}
    config["scorers"] = _scorers(config["scorers"], scorers, path)
    for key in ("data", "image_folder"):
        config[key] = _beside(config[key], path, is_file=key == "data")
    for key in OPTION_PATHS & config["options"].keys():
        config["options"][key] = _beside(config["options"][key], path, is_file=False)
    return Task(path.stem, config)


def _beside(value: str | None, yaml: Path, is_file: bool) -> str | None:
    """Relative names start at the YAML's folder; a hub id stays as it is."""
    if value is None or (is_file and not value.endswith(FILE_SUFFIXES)):
        return value
    return str((yaml.parent / Path(value).expanduser()).resolve())


def _scorers(named: Any, known: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """{metric: keys of its scorer} of a list of names or a mapping {name: changed keys}."""
    own = {name: {} for name in named} if isinstance(named, list) else named
    if not isinstance(own, dict):
        raise UserError(Problem(f"{path}: scorers", repr(named), "a list of names, or {name: {key: value}}"))
    problems, filled = [], {}
    for name, changes in own.items():
        values = {**known.get(name, {}), **(changes or {})}
        if "_target_" not in values:
            remedy = nearest(str(name), known) or "A scorer of your own has a _target_"
            problems.append(Problem(f"{path}: scorers.{name}", "no such scorer", f"one of {', '.join(known)}", remedy))
        filled[str(name)] = values
    if problems:
        raise UserError(problems)
    return filled


# --- samples ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A sample and its pictures, in the order of the prompt's markers."""

    sample: Sample
    pictures: tuple[Picture, ...]
    where: str


def load_questions(task: Task, limit: int | None) -> list[Question]:
    """All questions of a task, read once in this process. Raises UserError with all that is wrong with the data."""
    return _load(json.dumps([task.name, task.config]), limit)


@functools.cache
def _load(key: str, limit: int | None) -> list[Question]:
    name, config = json.loads(key)
    if config["data"] is None:
        raise UserError(
            Problem(f"tasks: {name}: data", "null", "a JSON, JSONL or Parquet file, or a hub data set's id")
        )
    if config["prompt"] is None:
        questions, problems = _from_records(config, limit)
    else:
        questions, problems = _from_columns(config, limit)
    problems += _picture_problems(questions)
    ids = [question.sample.id for question in questions]
    if len(set(ids)) < len(ids):
        twice = next(one for one in ids if ids.count(one) > 1)
        expected = "each id once"
        problems.append(
            Problem(str(config["data"]), f"the id {twice!r} twice", expected, "id_column=null numbers them")
        )
    if not questions and not problems:
        problems.append(Problem(str(config["data"]), "no record", "at least one question"))
    if problems:
        raise UserError(capped(problems))
    return questions


def _from_records(config: Mapping[str, Any], limit: int | None) -> tuple[list[Question], list[Problem]]:
    """Conversations, whose last answer is the reference, or {"id", "image", "prompt", "reference"}."""
    from vlmsft.generation.questions import read_questions

    if not str(config["data"]).endswith((".json", ".jsonl")):
        expected = "a template that makes a question of a record's columns"
        return [], [Problem("prompt", f"null for {config['data']}", expected, 'prompt: "{{ question }}"')]
    read, problems = read_questions(RecordFile(config["data"]))
    questions = []
    for question in read[:limit]:
        turns = tuple({"role": turn.role, "text": _marked(turn)} for turn in question.turns)
        sample = Sample(
            id=str(question.index if question.id is None else question.id),
            prompt=turns[-1]["text"],
            references=() if question.reference is None else (question.reference,),
            turns=turns,
        )
        pictures = tuple(image_path(name, config["image_folder"]) for name in question.images)
        questions.append(Question(replace(sample, images=tuple(map(str, pictures))), pictures, question.where))
    return questions, problems


def _marked(turn: Turn) -> str:
    return "".join(IMAGE_MARKER if part is None else part for part in turn.parts)


def _from_columns(config: Mapping[str, Any], limit: int | None) -> tuple[list[Question], list[Problem]]:
    import jinja2

    problems: list[Problem] = []
    questions: list[Question] = []
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    try:
        template = environment.from_string(config["prompt"])
    except jinja2.TemplateError as error:
        return [], [Problem("prompt", f"{config['prompt']!r} ({error})", "a Jinja template")]
    for number, (record, where) in enumerate(_records(config)):
        if limit is not None and number >= limit:
            break
        try:
            questions.append(_question(number, record, where, template, config))
        except jinja2.TemplateError as error:
            there = f"the record has {', '.join(map(str, record))}"
            problems.append(Problem(where, f"a prompt that can't be filled ({error})", "columns of the record", there))
        except UserError as error:
            problems += error.problems
    return questions, problems


def _records(config: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """(record, where it stands)."""
    data = config["data"]
    if data.endswith((".json", ".jsonl")):
        records = RecordFile(data)
        for index in range(len(records)):
            record = records[index]
            if not isinstance(record, dict):
                raise UserError(Problem(records.where(index), f"a {type(record).__name__}", "a JSON object"))
            yield record, records.where(index)
        return
    for index, record in enumerate(_data_set(config)):
        yield record, f"{data}[{index}]"


def _data_set(config: Mapping[str, Any]) -> Any:
    """A `datasets.Dataset` whose pictures are not decoded."""
    import datasets

    data = config["data"]
    try:
        if data.endswith(".parquet"):
            loaded = datasets.load_dataset("parquet", data_files=data, split="train")
        else:
            loaded = datasets.load_dataset(
                data, name=config["subset"], split=config["split"], revision=config["revision"]
            )
    except Exception as error:  # the hub's, the file system's, pyarrow's
        found = f"{data}, which can't be loaded ({type(error).__name__}: {str(error).splitlines()[0]})"
        raise UserError(Problem("data", found, "a Parquet file, or a data set's id on the hub")) from None
    for name, feature in loaded.features.items():
        if isinstance(feature, datasets.Image):
            loaded = loaded.cast_column(name, datasets.Image(decode=False))
    return loaded


def _question(number: int, record: dict[str, Any], where: str, template: Any, config: Mapping[str, Any]) -> Question:
    options = _options(record, where, config)
    text = template.render(**{**record, "options": options}).strip()
    pictures = tuple(_pictures(record, where, config))
    missing = len(pictures) - text.count(IMAGE_MARKER)
    if missing and IMAGE_MARKER in text:
        found = f"{text.count(IMAGE_MARKER)} {IMAGE_MARKER} for {len(pictures)} image(s)"
        raise UserError(Problem(where, found, "as many markers as images, or none: images then come first"))
    turn = {"role": "user", "text": IMAGE_MARKER * missing + text}
    sample = Sample(
        id=_identity(number, record, config),
        prompt=turn["text"],
        images=tuple(str(picture) if isinstance(picture, Path) else "" for picture in pictures),
        references=_references(record, where, options, config),
        options=options,
        turns=(turn,),
        fields={str(key): value for key, value in record.items() if _is_plain(value)},
    )
    return Question(sample, pictures, where)


def _identity(number: int, record: dict[str, Any], config: Mapping[str, Any]) -> str:
    names = ID_COLUMNS if config["id_column"] is None else (config["id_column"],)
    return str(next((record[name] for name in names if record.get(name) is not None), number))


def _options(record: dict[str, Any], where: str, config: Mapping[str, Any]) -> dict[str, str]:
    """{"A": text, ...} of a list of texts, or a mapping as it is."""
    if config["options_column"] is None:
        return {}
    value = record.get(config["options_column"])
    if isinstance(value, dict):
        return {str(letter): str(text) for letter, text in value.items()}
    if not isinstance(value, list) or not value:
        raise UserError(Problem(where, f"{config['options_column']} = {value!r}", "a list of choices"))
    return {chr(ord("A") + index): str(text) for index, text in enumerate(value)}


def _references(
    record: dict[str, Any], where: str, options: Mapping[str, str], config: Mapping[str, Any]
) -> tuple[str, ...]:
    """As texts; of a multiple-choice question the letters, also where the record has a number or the choice's text."""
    value = record.get(config["reference_column"])
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not options:
        return tuple(str(each) for each in values)
    letters = list(options)
    by_text = {text: letter for letter, text in options.items()}
    found = []
    for each in values:
        is_index = isinstance(each, int) and 0 <= each < len(letters)
        letter = letters[each] if is_index else each if each in options else by_text.get(str(each))
        if letter is None:
            raise UserError(Problem(where, f"{config['reference_column']} = {each!r}", f"one of {', '.join(letters)}"))
        found.append(letter)
    return tuple(found)


def _pictures(record: dict[str, Any], where: str, config: Mapping[str, Any]) -> Iterator[Picture]:
    for column in config["image_columns"]:
        value = record.get(column)
        for each in value if isinstance(value, list) else [value]:
            if each is None or each == "":
                continue
            if isinstance(each, dict) and each.get("bytes") is not None:
                yield functools.partial(bytes, each["bytes"])
            elif isinstance(each, (str, dict)) and (name := each if isinstance(each, str) else each.get("path")):
                yield image_path(name, config["image_folder"])
            elif isinstance(each, Image.Image):
                yield functools.partial(_png, each)
            else:
                raise UserError(Problem(where, f"{column} = a {type(each).__name__}", "a picture or its file's name"))


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))


def _picture_problems(questions: Iterable[Question]) -> list[Problem]:
    """Files that are missing or that Pillow doesn't open; headers are read, not pixels."""
    problems, seen = [], set()
    for question in questions:
        for picture in question.pictures:
            if not isinstance(picture, Path) or picture in seen:
                continue
            seen.add(picture)
            if not picture.is_file():
                problems.append(Problem(question.where, "no such image file", f"{picture}", "Check image_folder"))
                continue
            try:
                Image.open(picture).close()
            except Exception as error:  # PIL's plugins raise OSError, SyntaxError, ValueError, struct.error, ...
                problems.append(Problem(question.where, f"{picture} ({type(error).__name__})", "an image file"))
    return problems


# --- pictures ---------------------------------------------------------------------------------------------------------


def picture_bytes(picture: Picture) -> bytes:
    return picture.read_bytes() if isinstance(picture, Path) else picture()


def data_url(data: bytes) -> str:
    """The picture as a request carries it. Raises what Pillow raises for bytes that are none."""
    with Image.open(io.BytesIO(data)) as image:
        kind = SENT_AS_THEY_ARE.get(image.format or "")
        if kind is None:
            data, kind = _png(image.convert("RGB")), "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def fingerprint(questions: Iterable[Question]) -> dict[str, Any]:
    """Number of samples, and a hash over all that is asked and expected: texts, and the pictures' content.

    Where the data lie makes no difference.
    """
    digest, count = hashlib.sha256(), 0
    for question in questions:
        values = {key: value for key, value in asdict(question.sample).items() if key != "images"}
        digest.update(json.dumps(values, sort_keys=True, ensure_ascii=False).encode(errors="backslashreplace"))
        for picture in question.pictures:
            digest.update(hashlib.sha256(picture_bytes(picture)).digest())
        count += 1
    return {"num_samples": count, "sha256": digest.hexdigest()}


def store_samples(task: Task, questions: Sequence[Question], store: Store) -> None:
    """Writes the samples, and the pictures that lie in no file; does nothing where that is done."""
    if store.samples_path(task.name).exists():
        return
    stored = []
    for question in questions:
        images = tuple(_stored_picture(picture, store, task.name) for picture in question.pictures)
        stored.append(replace(question.sample, images=images))
    store.write_samples(task.name, stored)


def _stored_picture(picture: Picture, store: Store, task: str) -> str:
    if isinstance(picture, Path):
        return str(picture.resolve())
    data = picture_bytes(picture)
    with Image.open(io.BytesIO(data)) as image:
        suffix = (image.format or "png").lower()
    path = store.images_folder(task) / f"{hashlib.sha256(data).hexdigest()[:16]}.{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path.relative_to(store.folder).as_posix()
