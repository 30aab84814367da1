"""An evaluation from end to end: everything checked, each model asked, all answers scored, tables written.

Killed at any time, the same command goes on: answers lie in appended files, verdicts in the judges' cache, and the rest
is made of them anew.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from vlmsft.errors import Problem, UserError
from vlmsft.evaluation import manifest as manifests
from vlmsft.evaluation import models as model_parts
from vlmsft.evaluation.engines import numerics_warnings
from vlmsft.evaluation.models import Model, Serve
from vlmsft.evaluation.runner import Counts, Runner, Score, Settings, Task
from vlmsft.evaluation.store import Store
from vlmsft.runtime.logging import console
from vlmsft.runtime.provenance import Scrubber

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Plan:
    """What is asked for, with everything named in it found.

    base: the model that others are compared with; None = the one that the evaluation has already, else the first
    id: of the evaluation, None = made of what its numbers depend on
    output: folder of all evaluations
    """

    models: Sequence[Model]
    tasks: Sequence[Task]
    settings: Settings
    serve: Serve
    concurrency: int
    base: str | None
    id: str | None
    output: Path
    force: bool
    reuse_answers: bool
    dryrun: bool
    problems: Sequence[Problem] = ()


def evaluate(plan: Plan) -> int:
    """Exit code: 0, or 1 where answers or verdicts are missing (the same command asks for them again).

    Raises UserError with all problems before anything is asked.
    """
    manifest = describe(plan)
    id = plan.id or manifests.identity(manifest)
    folder = plan.output / id
    manifest = {"id": id, **_with_kept(manifest, folder, plan.base)}
    if not plan.force and (problems := manifests.engine_problems(manifest, manifest["base"])):
        raise UserError(problems)
    _warn(manifest)
    store = Store(folder)
    if plan.dryrun:
        show_cost(plan, store)
        return 0
    with _alone(folder):
        _write_json(folder / MANIFEST, manifest)
        if plan.reuse_answers:
            _reuse_answers(manifest, plan, store)
        ask(plan, manifest, store)
        scores = score(plan, store)
        store.write_scores(scores)
        results = write_results(folder)
    write_to_runs(plan, manifest, results)
    return _report(plan, store, scores, folder)


@functools.cache
def runner_of(name: str) -> Runner:
    """The module that a task's `runner` names. Raises UserError where there is none."""
    try:
        module: Any = importlib.import_module(name)
    except ImportError as error:
        raise UserError(Problem("runner", f"{name} ({error})", "a module, as vlmsft.evaluation.builtin")) from None
    return module


# --- before anything is asked -----------------------------------------------------------------------------------------


def describe(plan: Plan) -> dict[str, Any]:
    """The manifest. Raises UserError with everything that is wrong with models, tasks and settings together."""
    problems = list(plan.problems)
    models: dict[str, Any] = {}
    tasks: dict[str, Any] = {}
    for task in plan.tasks:
        try:
            runner = runner_of(task.config["runner"])
            found = runner.problems(task, plan.settings)
            problems += found
            if not found:
                facts = runner.describe(task, plan.settings)
                tasks[task.name] = {"runner": task.config["runner"], "prompt": task.config["prompt"], **facts}
        except UserError as error:
            problems += error.problems
    for model in plan.models:
        try:
            with console().status(f"checking {model.name} ..."):
                models[model.name] = model_parts.describe(model, plan.serve)
        except UserError as error:
            problems += error.problems
    if not problems:
        return manifests.make(plan.settings, models, tasks)
    raise UserError(list(dict.fromkeys(problems)))


def _with_kept(manifest: dict[str, Any], folder: Path, base: str | None) -> dict[str, Any]:
    """With time, command and base, and the models and tasks that the folder has already."""
    path = folder / MANIFEST
    scrubber = Scrubber.from_environment()
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    manifest = {**manifest, "created": now, "command": [scrubber.override(word) for word in sys.argv]}
    if not path.exists():
        return {**manifest, "base": base or next(iter(manifest["models"]))}
    kept = json.loads(path.read_text(encoding="utf-8"))
    problems = manifests.folder_problems(kept, manifest, folder)
    if problems:
        raise UserError(problems)
    return {**manifests.merged(kept, manifest), "base": base or kept["base"]}


def _warn(manifest: Mapping[str, Any]) -> None:
    for name, facts in manifest["models"].items():
        for warning in numerics_warnings(facts["engine"], facts["engine_version"]):
            said = " ".join(filter(None, (facts["engine"], facts["engine_version"])))
            _tell(f"{name} ({said}): {warning}")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Raises UserError where another process works in the folder."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        found = f"{folder}, which another evaluate works in"
        raise UserError(Problem("id", found, "one at a time", "Wait for it, or give another id")) from None
    with lock:
        yield


def _reuse_answers(manifest: Mapping[str, Any], plan: Plan, store: Store) -> None:
    """Copies answers that another evaluation has to the very same questions of the very same model and settings."""
    others: dict[tuple[str, str], Path] = {}
    for path in sorted(plan.output.glob(f"*/{MANIFEST}"), key=os.path.getmtime):
        other = json.loads(path.read_text(encoding="utf-8"))
        with contextlib.suppress(KeyError):  # another version's manifest
            for model, task in itertools.product(other["models"], other["tasks"]):
                answers = Store(path.parent).answers_path(model, task)
                if path.parent != store.folder and answers.exists():
                    others[task, manifests.answers_key(other, model, task)] = answers
    for model, task in itertools.product(plan.models, plan.tasks):
        target = store.answers_path(model.name, task.name)
        source = others.get((task.name, manifests.answers_key(dict(manifest), model.name, task.name)))
        if source is not None and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = target.with_name(f"{target.name}.partial")
            shutil.copyfile(source, aside)
            os.replace(aside, target)
            text = f"{model.name}, {task.name}: answers of evaluation {source.parents[2].name}"
            console().print(f"{text} (reuse_answers=false asks anew)", markup=False, highlight=False)


# --- what it would cost -----------------------------------------------------------------------------------------------


def show_cost(plan: Plan, store: Store) -> None:
    """Numbers of requests and of judges' tokens; asks nothing."""
    table = Table("model", "task", "questions", "requests", "judge requests", "judge tokens", box=None, pad_edge=False)
    rows = [(model.name, task.name, _count(plan, model, task, store)) for model in plan.models for task in plan.tasks]
    for model, task, counts in rows:
        table.add_row(model, task, *map(_number, vars(counts).values()))
    totals = [sum(getattr(counts, name) or 0 for *_, counts in rows) for name in vars(rows[0][2])]
    if len(rows) > 1:
        table.add_row("all", "", *map(_number, totals))
    console().print(table)
    console().print(
        "nothing was asked; judge tokens are about those sent and received, for answers as long as references"
    )


def _count(plan: Plan, model: Model, task: Task, store: Store) -> Counts:
    return runner_of(task.config["runner"]).count(task, model.name, store, plan.settings)


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


# --- asking and scoring -----------------------------------------------------------------------------------------------


def ask(plan: Plan, manifest: Mapping[str, Any], store: Store) -> None:
    """Each model is served once, and only where something is left to ask it."""
    for model in plan.models:
        todo = [task for task in plan.tasks if _count(plan, model, task, store).num_requests != 0]
        if not todo:
            continue
        facts = manifest["models"][model.name]
        log = store.folder / "logs" / f"{model.name}.log"
        with model_parts.serving(model, facts, plan.serve, plan.concurrency, log) as endpoint:
            for task in todo:
                runner_of(task.config["runner"]).ask(task, model.name, endpoint, store, plan.settings)


def score(plan: Plan, store: Store) -> list[Score]:
    """Of this start's models and tasks; those of earlier starts in this folder are kept."""
    scores: list[Score] = []
    for model in plan.models:
        for task in plan.tasks:
            scores += runner_of(task.config["runner"]).score(task, model.name, store, plan.settings)
    anew = {(model.name, task.name) for model in plan.models for task in plan.tasks}
    return [each for each in store.scores() if (each.model, each.task) not in anew] + scores


def write_results(folder: Path) -> Mapping[str, Any]:
    """results.json, tables and gallery; gives {model: {task: {metric: {...}}}}."""
    from vlmsft.evaluation import results

    return results.write(folder)


def write_to_runs(plan: Plan, manifest: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """<run_dir>/evaluation/<id>.json for models that belong to a run, what vlmsft.compare reads; and to its W&B run.

    Each set of scores goes to W&B once. What can't be written is named: the evaluation's own folder has all of it.
    """
    for model in plan.models:
        if model.run_dir is None:
            continue
        scores = {
            task: {
                metric: {name: values[name] for name in ("score", "num", "num_missing")}
                for metric, values in metrics.items()
            }
            for task, metrics in results[model.name].items()
        }
        content = {
            "id": manifest["id"],
            "manifest": manifests.of_model(dict(manifest), model.name),
            "scores": scores,
        }
        path = model.run_dir / "evaluation" / f"{manifest['id']}.json"
        try:
            is_logged = _was_logged(path, scores) or _log_to_wandb(model, scores)
            _write_json(path, {**content, "in_wandb": is_logged})
        except OSError as error:
            _tell(f"{model.name}: its scores are not in its run's folder ({error})")


def _was_logged(path: Path, scores: Mapping[str, Any]) -> bool:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        return before["in_wandb"] and before["scores"] == scores
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def _log_to_wandb(model: Model, scores: Mapping[str, Any]) -> bool:
    """Whether the run's W&B run has them now."""
    from vlmsft.runtime.wandb_scores import log_scores

    try:
        return log_scores(str(model.run_dir), scores)
    except Exception as error:  # W&B's client raises a dozen kinds
        said = (str(error) or type(error).__name__).splitlines()[0]
        _tell(f"{model.name}: its scores are not in W&B ({said}); the same command logs them")
        return False


def _tell(text: str) -> None:
    console().print(f"warning: {text}", style="yellow", markup=False, highlight=False)


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.partial")
    aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


def _report(plan: Plan, store: Store, scores: Sequence[Score], folder: Path) -> int:
    """What is missing and what was cut, and where all lies."""
    out = console()
    missing = False
    for model in plan.models:
        for task in plan.tasks:
            answers = store.answers(model.name, task.name).values()
            failed = sum(answer.error is not None for answer in answers)
            cut = sum(answer.finish_reason == "length" for answer in answers)
            own = [each for each in scores if (each.model, each.task) == (model.name, task.name) and each.score is None]
            unjudged = [each for each in own if not (each.reason or "").startswith(("no answer", "not asked"))]
            limit = plan.settings.generation.max_new_tokens
            texts = [f"{cut} answers cut at max_new_tokens = {limit}"] if cut else []
            texts += [f"{failed} without an answer, the last: {_last_error(answers)}"] if failed else []
            texts += [f"{len(unjudged)} scores missing, the last: {unjudged[-1].reason}"] if unjudged else []
            if texts:
                out.print(f"{model.name}, {task.name}: {'; '.join(texts)}", markup=False, highlight=False)
            missing = missing or bool(own)
    if missing:
        out.print("the same command asks again for what is missing", highlight=False)
    out.print(f"{folder}", markup=False, highlight=False)
    return 1 if missing else 0


def _last_error(answers: Any) -> str | None:
    return [answer.error for answer in answers if answer.error is not None][-1]
