"""The runner of llm-jp-eval-mm's tasks (https://github.com/llm-jp/llm-jp-eval-mm, Apache-2.0), the released 0.4.1.

Its questions, references and scorers are used; asking is vlmsft's own (vlmsft.evaluation.builtin), and so are judge
calls, intervals and tables. llm-jp-eval-mm runs as another process in an environment of its own, since it asks for
Python 3.12.1 and for packages that NeMo can't live with: `environment` makes it, `driver` is what runs there, `bridge`
talks with it. A task of yours runs too: options.tasks_file is a Python file with TASKS = {id: class}.

What its 0.4.1 does otherwise, and what is done here:

- It has no adapter for OpenAI-compatible models, and its wheel no runner: the tutorial patched examples/gpt4o.py. Asked
  here are the same prompts with the same parameters. Pictures go as PNG, not as JPEG of quality 75; before the text, as
  in training, unless options.images_last, which is gpt4o.py's order.
- It writes predictions when all are there, and resumes whole files only: each answer is kept as it comes.
- A judge call that fails counts as 0 (llm-as-a-judge) or -1 (heron-bench) in the mean, as does a reply without a
  number. Here both are missing, counted, and asked again at the next start. So is a number off the scale (1 to 5, 1 to
  10), which it takes as it is: of "10" llm-as-a-judge takes 1.
- heron-bench averages over three categories also where `limit` leaves one out: here over those that are there. Its
  denominators are the same judge's points for a reference answer (by gpt-4-0125-preview, announced to the judge as
  GPT-4o's), given anew for each model: its numbers aren't those of the original benchmark.
- A second metric overwrites evaluation.jsonl: all metrics stand in one store here.
- It wants an API key for metrics that ask no judge: not here.
- max_new_tokens is 256 in its command: conf/evaluate.yaml says 1024.
- jic-vqa, mecha-ja and the short answers of jdocqa are right where the reference is contained in the answer: talkative
  models gain. That is kept, for it is what its published numbers mean.
- jic-vqa reads dataset/jic_vqa.parquet below the working folder, which its scripts/prepare_jic_vqa.py downloads.
- llava-bench-in-the-wild is the English one; there is no Japanese one.
- pip installs torch, av and scipy with it, which nothing in its wheel imports: requirements.lock leaves them out.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vlmsft.data.records import IMAGE_MARKER
from vlmsft.errors import Problem, UserError, nearest
from vlmsft.evaluation import builtin
from vlmsft.evaluation.eval_mm import bridge
from vlmsft.evaluation.eval_mm.environment import environment_of, lock_digest
from vlmsft.evaluation.eval_mm.metrics import JUDGED, METRICS, score_of, verdict_of
from vlmsft.evaluation.judge import ask_judge
from vlmsft.evaluation.runner import Counts, Endpoint, Settings, Task, judge_facts
from vlmsft.evaluation.store import Sample, Score, Store
from vlmsft.evaluation.tasks import Question, fingerprint


@dataclass(frozen=True)
class Options:
    """`options` of a task's YAML.

    task: llm-jp-eval-mm's id, or one of tasks_file
    metrics: its ids
    tasks_file: a Python file with TASKS = {id: class of its Task} and, if need be, SCORERS = {id: class of its Scorer}
    rotate_choices: mecha-ja's four orders of the choices instead of one
    images_last: pictures after the text, as its examples send them; else before it, as in training
    """

    task: str
    metrics: tuple[str, ...]
    tasks_file: str | None
    rotate_choices: bool
    images_last: bool


def problems(task: Task, settings: Settings) -> list[Problem]:
    """See vlmsft.evaluation.runner.Runner. The environment is made later, by `describe`; tasks are loaded there."""
    found = _option_problems(task)
    if found:
        return found
    options = _options(task)
    where = f"tasks: {task.name}: options"
    if options.tasks_file is None:
        unknown = [metric for metric in options.metrics if metric not in METRICS]
        remedy = "One of your own stands in tasks_file"
        found += [
            Problem(f"{where}.metrics", repr(name), f"one of {', '.join(METRICS)}", nearest(name, METRICS) or remedy)
            for name in unknown
        ]
    elif not Path(options.tasks_file).is_file():
        found.append(Problem(f"{where}.tasks_file", f"{options.tasks_file}, which is no file", "a Python file"))
    judged = [metric for metric in options.metrics if metric in JUDGED]
    if judged and settings.judge is None:
        expected = f"a judge for {', '.join(judged)} of the task {task.name}"
        found.append(Problem("judge", "no API key", expected, "Set the variable that judge.api_key_variable names"))
    return found + environment_of(settings.eval_mm).problems()


def describe(task: Task, settings: Settings) -> dict[str, Any]:
    """See vlmsft.evaluation.runner.Runner. Makes the environment and loads the task's data."""
    options = _options(task)
    loaded = _load(task, settings)
    scorer = {"scorer": "llm-jp-eval-mm", "versions": loaded.versions, "environment": lock_digest()}
    return {
        "data": fingerprint(loaded.questions),  # the order of picture and text is in it
        "scorers": {metric: scorer for metric in options.metrics},
        "judge": judge_facts(settings.judge) if JUDGED & set(options.metrics) else None,
    }


def count(task: Task, model: str, store: Store, settings: Settings) -> Counts:
    """See vlmsft.evaluation.runner.Runner. Judge requests that the cache answers are counted too."""
    questions = _load(task, settings).questions
    num_judged = len(JUDGED & set(_options(task).metrics)) * settings.repeats
    texts = [[question.sample.prompt, *question.sample.references * 2] for question in questions]
    num_bytes = sum(len(text.encode(errors="replace")) for of_question in texts for text in of_question)
    per_request = TOKENS_OF_INSTRUCTION + builtin.TOKENS_OF_VERDICT
    tokens = num_bytes / builtin.BYTES_PER_TOKEN + per_request * len(questions)
    todo = builtin.unanswered(questions, task, model, store, settings.repeats)
    return Counts(len(questions), len(todo), num_judged * len(questions), round(num_judged * tokens))


TOKENS_OF_INSTRUCTION = 300
"""Of either judge's, about."""


def ask(task: Task, model: str, endpoint: Endpoint, store: Store, settings: Settings) -> None:
    """See vlmsft.evaluation.runner.Runner."""
    builtin.ask_questions(_load(task, settings).questions, task, model, endpoint, store, settings)


def score(task: Task, model: str, store: Store, settings: Settings) -> list[Score]:
    """See vlmsft.evaluation.runner.Runner. Needs no data but the store's."""
    options = _options(task)
    answers = store.answers(model, task.name)
    places = [(sample, repeat) for repeat in range(settings.repeats) for sample in store.samples(task.name)]
    answered = [(sample, answers[sample.id, repeat].answer or "", repeat) for sample, repeat in places
                if builtin.why_missing(answers, sample, repeat) is None]  # fmt: skip
    items = [(sample, text) for sample, text, _ in answered]
    scores = []
    for metric, outcomes in zip(options.metrics, _outcomes(items, options, settings), strict=True):
        found = {(sample.id, repeat): one for (sample, _, repeat), one in zip(answered, outcomes, strict=True)}
        for sample, repeat in places:
            place = {"model": model, "task": task.name, "id": sample.id, "repeat": repeat, "metric": metric}
            given, reason = found.get((sample.id, repeat), (None, builtin.why_missing(answers, sample, repeat)))
            scores.append(Score(**place, **score_of(metric, given, sample.fields), reason=reason))
    return scores


Outcome = tuple[Any, str | None]
"""What llm-jp-eval-mm's scorer gave for an answer, None for nothing; the judge's words, or why there are none."""


def _outcomes(items: Sequence[tuple[Sample, str]], options: Options, settings: Settings) -> list[list[Outcome]]:
    """For each metric, of each (sample, answer)."""
    return [_metric_outcomes(metric, items, options, settings) if items else [] for metric in options.metrics]


def _metric_outcomes(
    metric: str, items: Sequence[tuple[Sample, str]], options: Options, settings: Settings
) -> list[Outcome]:
    judge = settings.judge
    reasons: list[str | None] = []

    def replies(requests: list[list[dict[str, str]]]) -> list[str | None]:
        if judge is None:
            raise UserError(Problem("judge", "no API key", f"a judge for the metric {metric}"))
        verdicts = ask_judge(requests, functools.partial(verdict_of, metric), judge)
        reasons.extend(verdict.reply if verdict.error is None else verdict.error for verdict in verdicts)
        return [verdict.reply if verdict.error is None else None for verdict in verdicts]

    request = {
        "scores": metric,
        "tasks_file": options.tasks_file,
        "judge_model": judge.model if judge else None,
        "references": [_reference(sample) for sample, _ in items],
        "answers": [text for _, text in items],
        "fields": [sample.fields for sample, _ in items],
    }
    found = bridge.scores(_python(settings), request, replies)
    return list(zip(found, reasons or [None] * len(found), strict=True))


def _reference(sample: Sample) -> str | list[str]:
    return sample.references[0] if len(sample.references) == 1 else list(sample.references)


# --- questions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """versions: of llm-jp-eval-mm and the packages that its numbers depend on"""

    questions: list[Question]
    versions: dict[str, str]


def _load(task: Task, settings: Settings) -> Loaded:
    """Read once in this process. Makes the environment if need be."""
    return _load_once(task.name, json.dumps(task.config["options"]), settings)


@functools.cache
def _load_once(name: str, options: str, settings: Settings) -> Loaded:
    wanted = Options(**{**json.loads(options), "metrics": tuple(json.loads(options)["metrics"])})
    pictures = Path(settings.eval_mm.folder).expanduser().absolute() / "pictures" / name
    read, versions = bridge.samples(_python(settings), wanted, pictures, settings.limit)
    if not read:
        raise UserError(Problem(f"tasks: {name}", "no question", "at least one"))
    return Loaded([_question(values, wanted) for values in read], versions)


def _question(values: dict[str, Any], options: Options) -> Question:
    pictures = tuple(map(Path, values["images"]))
    markers = IMAGE_MARKER * len(pictures)
    prompt = values["prompt"] + markers if options.images_last else markers + values["prompt"]
    sample = Sample(
        id=values["id"],
        prompt=prompt,
        images=tuple(map(str, pictures)),
        references=tuple(values["references"]),
        turns=({"role": "user", "text": prompt},),
        fields=values["fields"],
    )
    return Question(sample, pictures, f"{options.task}[{values['id']}]")


def _python(settings: Settings) -> Path:
    environment = environment_of(settings.eval_mm)
    if not environment.is_complete:
        environment.make()
    return environment.program("python")


# --- options ----------------------------------------------------------------------------------------------------------


def _options(task: Task) -> Options:
    values = task.config["options"]
    return Options(**{**values, "metrics": tuple(values["metrics"])})


def _option_problems(task: Task) -> list[Problem]:
    """Keys and types."""
    where, values = f"tasks: {task.name}: options", task.config["options"]
    names = [field.name for field in fields(Options)]
    found = [
        Problem(f"{where}.{key}", "no such key", f"one of {', '.join(names)}", nearest(str(key), names))
        for key in values
        if key not in names
    ]
    for name in names:
        if name not in values:
            found.append(Problem(f"{where}.{name}", "nothing", "a value: conf/task/mecha-ja.yaml shows all keys"))
        elif not _is_right(name, values[name]):
            found.append(Problem(f"{where}.{name}", repr(values[name]), EXPECTED[name]))
    return found


EXPECTED = {
    "task": "llm-jp-eval-mm's id of a task",
    "metrics": "a list of metrics",
    "tasks_file": "a Python file's name, or null",
    "rotate_choices": "true or false",
    "images_last": "true or false",
}


def _is_right(name: str, value: Any) -> bool:
    if name == "metrics":
        return isinstance(value, list) and len(value) > 0 and all(isinstance(each, str) for each in value)
    if name == "tasks_file":
        return value is None or isinstance(value, str)
    return isinstance(value, str if name == "task" else bool)
