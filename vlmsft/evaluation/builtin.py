"""The runner of tasks that are a file or data set with a prompt: asks the model's endpoint, and scores here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.utils import instantiate

from vlmsft.data.records import IMAGE_MARKER
from vlmsft.errors import Problem, UserError
from vlmsft.evaluation.chat import chat, client_of, content_parts, error_text, is_of_server
from vlmsft.evaluation.judge import num_uncached
from vlmsft.evaluation.runner import Counts, Endpoint, Settings, Task, judge_facts
from vlmsft.evaluation.scorers import Judge, Scorer, package_problems
from vlmsft.evaluation.store import Answer, Sample, Score, Store
from vlmsft.evaluation.tasks import Question, data_url, fingerprint, load_questions, picture_bytes, store_samples
from vlmsft.runtime.bar import Bar

MAX_ERRORS_IN_A_ROW = 20
"""After so many the endpoint counts as gone: each costs num_attempts with growing waits between them."""
BYTES_PER_TOKEN = 3.0
"""Of UTF-8: a Japanese character, three bytes, is about one token for current judges; English text has fewer tokens."""
TOKENS_OF_VERDICT = 8


def scorers_of(task: Task) -> dict[str, Scorer]:
    """{metric: scorer}. Raises UserError for one that can't be made."""
    scorers, problems = {}, []
    for name, keys in task.config["scorers"].items():
        try:
            scorers[name] = instantiate(keys)
        except Exception as error:  # an import, a wrong key: whatever the class says
            said = str(error.__cause__ or error).strip().splitlines()[0]
            where = f"tasks: {task.name}: scorers.{name}"
            problems.append(Problem(where, f"{keys} ({said})", "a class and its arguments"))
    if problems:
        raise UserError(problems)
    return scorers


def problems(task: Task, settings: Settings) -> list[Problem]:
    """See vlmsft.evaluation.runner.Runner."""
    found: list[Problem] = []
    scorers: dict[str, Scorer] = {}
    if not task.config["scorers"]:
        found.append(Problem(f"tasks: {task.name}: scorers", "none", "at least one"))
    try:
        scorers = scorers_of(task)
    except UserError as error:
        found += error.problems
    found += package_problems(scorers)
    if settings.judge is None and any("judge" in scorer.needs for scorer in scorers.values()):
        expected = f"a judge for the task {task.name}"
        found.append(Problem("judge", "no API key", expected, "Set the variable that judge.api_key_variable names"))
    try:
        questions = load_questions(task, settings.limit)
    except UserError as error:
        return found + error.problems
    for need in ("references", "options"):
        naming = [name for name, scorer in scorers.items() if need in scorer.needs]
        without = [question for question in questions if not getattr(question.sample, need)]
        if naming and without:
            expected = f"{need} in each record: the scorer {naming[0]} needs them"
            remedy = f"See {'reference_column' if need == 'references' else 'options_column'} of the task"
            found.append(Problem(without[0].where, f"{len(without)} records without {need}", expected, remedy))
    return found


def describe(task: Task, settings: Settings) -> dict[str, Any]:
    """See vlmsft.evaluation.runner.Runner."""
    scorers = scorers_of(task)
    needs_judge = any("judge" in scorer.needs for scorer in scorers.values())
    return {
        "data": fingerprint(load_questions(task, settings.limit)),
        "scorers": {name: scorer.describe() for name, scorer in scorers.items()},
        "judge": judge_facts(settings.judge) if needs_judge else None,
    }


def count(task: Task, model: str, store: Store, settings: Settings) -> Counts:
    """See vlmsft.evaluation.runner.Runner."""
    questions = load_questions(task, settings.limit)
    todo = unanswered(questions, task, model, store, settings.repeats)
    judges = [scorer for scorer in scorers_of(task).values() if isinstance(scorer, Judge)]
    requests = [
        judge.messages(*item) for judge in judges for item in _expected_items(questions, task, model, store, settings)
    ]
    num_tokens = sum(len(part["content"].encode(errors="replace")) for messages in requests for part in messages)
    num_requests = num_uncached(requests, settings.judge) if settings.judge else len(requests)
    share = num_requests / len(requests) if requests else 0
    tokens = round(share * (num_tokens / BYTES_PER_TOKEN + TOKENS_OF_VERDICT * len(requests)))
    return Counts(len(questions), len(todo), num_requests, tokens)


def _expected_items(
    questions: Sequence[Question], task: Task, model: str, store: Store, settings: Settings
) -> Iterator[tuple[Sample, str]]:
    """What would be judged; an answer that isn't there is taken to be as long as its reference."""
    answers = store.answers(model, task.name)
    for question in questions:
        for repeat in range(settings.repeats):
            answer = answers.get((question.sample.id, repeat))
            # different texts, for equal requests are made once
            guess = f"{question.sample.references[0]} {model} {repeat}" if question.sample.references else ""
            yield question.sample, guess if answer is None or answer.answer is None else answer.answer


def unanswered(
    questions: Sequence[Question], task: Task, model: str, store: Store, repeats: int
) -> list[tuple[Question, int]]:
    """(question, repeat) of all that is still to be asked; what gave an error before comes last, for it may again."""
    answers = store.answers(model, task.name)
    places = [(question, repeat) for repeat in range(repeats) for question in questions]
    todo = [(question, repeat) for question, repeat in places if why_missing(answers, question.sample, repeat)]
    return sorted(todo, key=lambda place: (place[0].sample.id, place[1]) in answers)


# --- asking -----------------------------------------------------------------------------------------------------------


def ask(task: Task, model: str, endpoint: Endpoint, store: Store, settings: Settings) -> None:
    """See vlmsft.evaluation.runner.Runner. Raises UserError where the endpoint is gone."""
    ask_questions(load_questions(task, settings.limit), task, model, endpoint, store, settings)


def ask_questions(
    questions: Sequence[Question], task: Task, model: str, endpoint: Endpoint, store: Store, settings: Settings
) -> None:
    """`ask` with the questions of any runner."""
    store_samples(task, questions, store)
    todo = unanswered(questions, task, model, store, settings.repeats)
    if todo:
        asyncio.run(_ask_all(todo, task, model, endpoint, store, settings))


async def _ask_all(
    todo: Sequence[tuple[Question, int]], task: Task, model: str, endpoint: Endpoint, store: Store, settings: Settings
) -> None:
    places = asyncio.Semaphore(endpoint.concurrency)
    client = client_of(endpoint.base_url, endpoint.api_key, settings.timeout_seconds, settings.num_attempts)
    counts = {"cut": 0, "failed": 0}
    in_a_row = 0
    with Bar(f"{model}, {task.name}", len(todo)) as bar:
        async with client:

            async def ask_one(question: Question, repeat: int) -> None:
                nonlocal in_a_row
                async with places:
                    answer, is_the_servers = await _answer(client, question, repeat, endpoint, settings)
                store.add_answer(model, task.name, answer)
                counts["cut"] += answer.finish_reason == "length"
                counts["failed"] += answer.error is not None
                in_a_row = in_a_row + 1 if is_the_servers else 0
                bar.advance(**counts)
                if in_a_row >= MAX_ERRORS_IN_A_ROW:
                    raise UserError(_gone(model, task, answer), "all answers are kept; the same command goes on")

            await asyncio.gather(*(ask_one(question, repeat) for question, repeat in todo))


def _gone(model: str, task: Task, answer: Answer) -> Problem:
    found = f"{MAX_ERRORS_IN_A_ROW} errors in a row, the last: {answer.error}"
    return Problem(f"models: {model}, task {task.name}", found, "answers")


async def _answer(
    client: Any, question: Question, repeat: int, endpoint: Endpoint, settings: Settings
) -> tuple[Answer, bool]:
    """The answer, and whether it is an error that others would get too."""
    start = time.monotonic()
    identity = question.sample.id
    try:
        messages = await asyncio.to_thread(messages_of, question)
        reply = await chat(client, **request(messages, repeat, endpoint.model, settings))
    except Exception as error:  # a picture that breaks, or what is left after all attempts
        return Answer(identity, repeat, None, error_text(error), seconds=_since(start)), is_of_server(error)
    return Answer(identity, repeat, reply.text, None, _since(start), reply.finish_reason, reply.num_tokens), False


def _since(start: float) -> float:
    return round(time.monotonic() - start, 3)


def request(messages: list[dict[str, Any]], repeat: int, model: str, settings: Settings) -> dict[str, Any]:
    """Each repeat has a seed of its own: at temperature 0 servers ignore it."""
    generation = settings.generation
    stop = {"stop": list(generation.stop)} if generation.stop else {}
    return {
        "model": model,
        "messages": messages,
        "max_tokens": generation.max_new_tokens,
        "temperature": generation.temperature,
        "top_p": generation.top_p,
        "seed": generation.seed + repeat,
        **stop,
    }


def messages_of(question: Question) -> list[dict[str, Any]]:
    """The question's turns with its pictures as data URLs. Raises what Pillow raises for a broken one."""
    urls = iter([data_url(picture_bytes(picture)) for picture in question.pictures])
    messages = []
    for turn in question.sample.turns:
        text = turn["text"]
        num_images = text.count(IMAGE_MARKER) if turn["role"] == "user" else 0
        content = content_parts(text, [next(urls) for _ in range(num_images)]) if num_images else text
        messages.append({"role": turn["role"], "content": content})
    return messages


# --- scoring ----------------------------------------------------------------------------------------------------------


def score(task: Task, model: str, store: Store, settings: Settings) -> list[Score]:
    """See vlmsft.evaluation.runner.Runner."""
    questions = load_questions(task, settings.limit)
    answers = store.answers(model, task.name)
    places = [(question.sample, repeat) for repeat in range(settings.repeats) for question in questions]
    answered = [(sample, repeat) for sample, repeat in places if why_missing(answers, sample, repeat) is None]
    items = [(sample, answers[sample.id, repeat].answer or "") for sample, repeat in answered]
    scores = []
    for metric, scorer in scorers_of(task).items():
        outcomes = dict(
            zip(((sample.id, repeat) for sample, repeat in answered), scorer.score(items, settings.judge), strict=True)
        )
        for sample, repeat in places:
            outcome = outcomes.get((sample.id, repeat))
            value, reason = (None, why_missing(answers, sample, repeat)) if outcome is None else outcome
            scores.append(Score(model, task.name, sample.id, repeat, metric, value, reason))
    return scores


def why_missing(answers: Mapping[tuple[str, int], Answer], sample: Sample, repeat: int) -> str | None:
    """Why there is no answer; None where there is one."""
    answer = answers.get((sample.id, repeat))
    if answer is None:
        return "not asked"
    return None if answer.answer is not None else f"no answer: {answer.error}"
