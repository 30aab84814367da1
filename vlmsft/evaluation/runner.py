"""How a task is run: what every runner is given, and what it gives back. Types only.

`runner` of a task's YAML names a module: vlmsft.evaluation.builtin asks and scores here; vlmsft.evaluation.eval_mm lets
llm-jp-eval-mm do both in an environment of its own. When all is done vlmsft.evaluate calls
`vlmsft.evaluation.results.write(folder, ...)`, which reads no more than the folder's files (vlmsft.evaluation.store).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from vlmsft.errors import Problem
from vlmsft.evaluation.store import Score, Store


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible model that answers while it is used.

    base_url: up to and with /v1; model: what requests call it; api_key: "-" where none is asked for
    concurrency: requests at once
    """

    base_url: str
    model: str
    api_key: str = field(default="-", repr=False)
    concurrency: int = 16


@dataclass(frozen=True)
class Generation:
    """How answers are generated; conf/evaluate.yaml: generation."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class JudgeSettings:
    """conf/evaluate.yaml: judge. `api_key` comes from the environment and is never written."""

    base_url: str
    model: str
    api_key: str = field(repr=False)
    temperature: float
    max_tokens: int
    seed: int
    timeout_seconds: float
    num_attempts: int
    concurrency: int
    cache: str


def judge_facts(judge: JudgeSettings | None) -> dict[str, Any] | None:
    """What its verdicts depend on, for `describe`."""
    if judge is None:
        return None
    names = ("base_url", "model", "temperature", "max_tokens", "seed")
    return {name: getattr(judge, name) for name in names}


@dataclass(frozen=True)
class EvalMM:
    """conf/evaluate.yaml: eval_mm. The environment of llm-jp-eval-mm's own.

    folder: of environments and pictures; made on first use. python: a version, or an interpreter's path
    """

    folder: str
    python: str


@dataclass(frozen=True)
class Settings:
    """What holds for all models and tasks of an evaluation.

    limit: first so many samples of each task; None = all
    repeats: how often each question is asked
    timeout_seconds, num_attempts: of a request to a model
    judge: None where no judge is set up; a task that needs one was refused before
    """

    generation: Generation
    limit: int | None
    repeats: int
    timeout_seconds: float
    num_attempts: int
    judge: JudgeSettings | None
    eval_mm: EvalMM


@dataclass(frozen=True)
class Task:
    """A task of the command line, with the defaults filled in (conf/evaluate.yaml: task_defaults).

    name: its YAML's, without suffix; that of its files too
    config: the YAML's keys, resolved; runner-specific ones are in config["options"]
    """

    name: str
    config: dict[str, Any]


class Runner(Protocol):
    """vlmsft.evaluation.builtin and vlmsft.evaluation.eval_mm are modules with these functions."""

    def problems(self, task: Task, settings: Settings) -> list[Problem]:
        """All that can be known to be wrong before a model is asked (packages, data, keys)."""
        ...

    def describe(self, task: Task, settings: Settings) -> dict[str, Any]:
        """What the task's numbers depend on, as JSON for the manifest: data fingerprint, versions of scorers, ..."""
        ...

    def count(self, task: Task, model: str, store: Store, settings: Settings) -> Counts:
        """What a run would cost, for dryrun; asks nothing and makes no file."""
        ...

    def ask(self, task: Task, model: str, endpoint: Endpoint, store: Store, settings: Settings) -> None:
        """Asks what store.answers(model, task.name) lacks or has as an error; writes samples and answers into `store`.

        Called for each model and task while the model is served. A sample's error is recorded, not raised.
        """
        ...

    def score(self, task: Task, model: str, store: Store, settings: Settings) -> list[Score]:
        """All scores of the answers that are there; called when no model is served any more. Judges are asked here."""
        ...


@dataclass(frozen=True)
class Counts:
    """What a task of a model would cost.

    num_samples: None where it isn't known without running
    num_requests: questions that are still to be asked
    num_judge_requests: at most; num_judge_tokens: about so many, sent and received
    """

    num_samples: int | None
    num_requests: int | None
    num_judge_requests: int | None
    num_judge_tokens: int | None
