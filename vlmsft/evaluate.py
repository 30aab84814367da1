"""python -m vlmsft.evaluate models=[...] tasks=[...]: models asked, answers scored, one table of it all."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from vlmsft.cli import command, multirun_job
from vlmsft.config_files import absolute_path
from vlmsft.errors import Problem, UserError

if TYPE_CHECKING:
    from vlmsft.evaluation.run import Plan
    from vlmsft.evaluation.runner import JudgeSettings

RULES = {
    "generation.max_new_tokens": (1, None, int),
    "generation.temperature": (0, 2, float),
    "generation.top_p": (0.01, 1, float),
    "generation.seed": (0, None, int),
    "repeats": (1, None, int),
    "concurrency": (1, None, int),
    "timeout_seconds": (0.1, None, float),
    "num_attempts": (1, None, int),
    "judge.timeout_seconds": (0.1, None, float),
    "judge.num_attempts": (1, None, int),
    "judge.concurrency": (1, None, int),
    "judge.max_tokens": (1, None, int),
}
"""{key: (least, most, kind)}"""


@command("evaluate")
def main(cfg: DictConfig) -> None:
    warnings.filterwarnings("ignore", "The pynvml package is deprecated", FutureWarning)  # torch's, at import
    if multirun_job() is not None:
        raise UserError(Problem("-m", "a multirun", "one evaluation of all models", "models=[one,other]"))
    missing = [key for key in ("models", "tasks") if OmegaConf.is_missing(cfg, key)]
    if missing:
        remedy = "python -m vlmsft.evaluate models=[base,sft] tasks=[sample]"
        raise UserError(Problem(key, "nothing", f"which {key} to evaluate", remedy) for key in missing)
    from vlmsft.evaluation.run import evaluate

    sys.exit(evaluate(plan_of(cfg, task_folders())))


def task_folders() -> list[Path]:
    """The folders of tasks below each folder of Hydra's search path, the user's --config-dir first."""
    from hydra.core.hydra_config import HydraConfig

    sources = HydraConfig.get().runtime.config_sources
    folders = [Path(source.path) / "task" for source in sources if source.schema == "file"]
    return [folder for folder in reversed(folders) if folder.is_dir()]


def plan_of(cfg: DictConfig, folders: list[Path]) -> Plan:
    """The config as plain values; what is wrong with them is in the plan's problems."""
    from vlmsft.evaluation.models import Serve, read_models
    from vlmsft.evaluation.run import Plan
    from vlmsft.evaluation.runner import EvalMM, Generation, Settings
    from vlmsft.evaluation.tasks import read_tasks

    values = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    problems = value_problems(values)
    models, wrong = read_models(values["models"])
    problems += wrong
    specs = [values["tasks"]] if isinstance(values["tasks"], str) else values["tasks"]
    tasks, wrong = read_tasks(specs, folders, values["task_defaults"], values["scorers"])
    problems += wrong
    if not specs:
        problems.append(Problem("tasks", "none", "at least one task"))
    names = [model.name for model in models]
    if values["base"] not in (None, *names):
        problems.append(Problem("base", repr(values["base"]), f"one of {', '.join(names)}"))
    generation = {**values["generation"], "stop": tuple(values["generation"]["stop"])}
    settings = Settings(
        generation=Generation(**generation),
        limit=values["limit"] if is_limit(values["limit"]) else None,  # so that the rest can be checked
        repeats=values["repeats"],
        timeout_seconds=values["timeout_seconds"],
        num_attempts=values["num_attempts"],
        judge=judge_of(values["judge"], values["dryrun"]),
        eval_mm=EvalMM(**values["eval_mm"]),
    )
    return Plan(
        models=models,
        tasks=tasks,
        settings=settings,
        serve=Serve(**values["serve"]),
        concurrency=values["concurrency"],
        base=values["base"],
        id=values["id"],
        output=Path(absolute_path(values["output"])),
        force=values["force"],
        reuse_answers=values["reuse_answers"],
        dryrun=values["dryrun"],
        problems=problems,
    )


def judge_of(values: dict[str, Any], is_dryrun: bool) -> JudgeSettings | None:
    """None where no judge is named, or its key isn't set; a dry run needs none."""
    from vlmsft.evaluation.runner import JudgeSettings

    given = dict(values)
    variable = given.pop("api_key_variable")
    key = "-" if variable is None or is_dryrun else os.environ.get(variable)
    if given["model"] is None or not key:
        return None
    return JudgeSettings(**{**given, "base_url": given["base_url"].rstrip("/"), "api_key": key})


def is_limit(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)


def value_problems(values: dict[str, Any]) -> list[Problem]:
    """Numbers out of their range, and an id that is no file name."""
    problems = []
    for key, (least, most, kind) in RULES.items():
        value: Any = values
        for part in key.split("."):
            value = value[part]
        is_number = isinstance(value, kind if kind is int else (int, float)) and not isinstance(value, bool)
        if not is_number or value < least or (most is not None and value > most):
            limits = f"from {least} to {most}" if most is not None else f"of at least {least}"
            problems.append(Problem(key, repr(value), f"a {'whole ' if kind is int else ''}number {limits}"))
    limit, id = values["limit"], values["id"]
    if not is_limit(limit):
        problems.append(Problem("limit", repr(limit), "a number of questions, or null for all"))
    if id is not None and (not isinstance(id, str) or "/" in id or id.startswith(".") or not id):
        problems.append(Problem("id", repr(id), "a folder's name"))
    return problems


if __name__ == "__main__":
    main()
