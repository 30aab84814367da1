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
from vlmsft.runtime.provenance import flatten
from vlmsft.serving.endpoint import Rule, number_problems

if TYPE_CHECKING:
    from vlmsft.evaluation.run import Plan
    from vlmsft.evaluation.runner import JudgeSettings

RULES = {
    "limit": Rule(1, or_null=True),
    "repeats": Rule(1),
    "generation.max_new_tokens": Rule(1),
    "generation.temperature": Rule(0, 2, is_whole=False),
    "generation.top_p": Rule(0.01, 1, is_whole=False),
    "generation.seed": Rule(0),
    "concurrency": Rule(1),
    "timeout_seconds": Rule(0.1, is_whole=False),
    "num_attempts": Rule(1),
    "serve.max_num_seqs": Rule(1),
    "serve.max_images": Rule(0),
    "judge.temperature": Rule(0, 2, is_whole=False),
    "judge.max_tokens": Rule(1),
    "judge.seed": Rule(0),
    "judge.timeout_seconds": Rule(0.1, is_whole=False),
    "judge.num_attempts": Rule(1),
    "judge.concurrency": Rule(1),
}
SWITCHES = ("dryrun", "force", "reuse_answers")
TEXTS = ("output", "serve.device", "serve.dtype", "judge.base_url", "judge.cache", "eval_mm.folder", "eval_mm.python")
TEXTS_OR_NULL = ("base", "id", "serve.processor", "judge.model", "judge.api_key_variable")
MAPPINGS = ("generation", "serve", "judge", "eval_mm", "task_defaults", "scorers")


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
    """The config as plain values; what is wrong with them is in the plan's problems.

    Raises UserError where values are of a kind that no plan can be made of.
    """
    from vlmsft.evaluation.models import Serve, read_models
    from vlmsft.evaluation.run import Plan
    from vlmsft.evaluation.runner import EvalMM, Generation, Settings
    from vlmsft.evaluation.tasks import read_tasks

    values = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    no_mappings = [
        Problem(key, repr(values[key]), "a mapping") for key in MAPPINGS if not isinstance(values[key], dict)
    ]
    if no_mappings:
        raise UserError(no_mappings)
    models, problems = read_models(values["models"])
    tasks, wrong = read_tasks(values["tasks"], folders, values["task_defaults"], values["scorers"])
    problems += wrong
    flat = flatten(values)
    problems += number_problems(flat, RULES)
    of_wrong_kind = kind_problems(flat)
    if of_wrong_kind:
        raise UserError([*of_wrong_kind, *problems])
    names = [model.name for model in models]
    if values["base"] not in (None, *names):
        problems.append(Problem("base", repr(values["base"]), f"one of {', '.join(names)}"))
    if "/" in (values["id"] or "") or (values["id"] or "x").startswith("."):
        problems.append(Problem("id", repr(values["id"]), "a folder's name"))
    generation = {**values["generation"], "stop": tuple(values["generation"]["stop"])}
    settings = Settings(
        generation=Generation(**generation),
        limit=values["limit"] if RULES["limit"].holds(values["limit"]) else None,  # so that the rest can be checked
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


def kind_problems(flat: dict[str, Any]) -> list[Problem]:
    """Values that are no text, or no switch."""
    problems = [Problem(key, repr(flat[key]), "true or false") for key in SWITCHES if not isinstance(flat[key], bool)]
    for key in (*TEXTS, *TEXTS_OR_NULL):
        value, or_null = flat[key], key in TEXTS_OR_NULL
        if not (isinstance(value, str) and value) and not (value is None and or_null):
            remedy = f"""Quote it: {key}='"{value}"'""" if isinstance(value, (int, float)) else ""
            problems.append(Problem(key, repr(value), f"a text{' or null' if or_null else ''}", remedy))
    stop = flat["generation.stop"]
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        problems.append(Problem("generation.stop", repr(stop), "a list of texts"))
    return problems


if __name__ == "__main__":
    main()
