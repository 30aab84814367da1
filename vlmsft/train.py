"""python -m vlmsft.train key=value ...: fine-tune a model."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from vlmsft.cli import command
from vlmsft.errors import Problem, UserError

if TYPE_CHECKING:
    import nemo_run as run


@command("train")
def main(cfg: DictConfig) -> None:
    recipe, executor, problems = check(cfg)
    if problems:
        raise UserError(problems)
    assert recipe is not None

    from vlmsft.runtime import job
    from vlmsft.runtime.logging import rank_from_environment

    if rank_from_environment() == 0:
        keep_record(cfg)
    if executor is None:
        job.run_here(recipe, cfg.run_dir)
    else:
        job.launch(recipe, cfg.run_dir, cfg.name, executor)


def check(cfg: DictConfig) -> tuple[run.Partial | None, run.Executor | None, list[Problem]]:
    """The recipe and the executor (None: this process), and everything that is wrong with the config and its data."""
    from vlmsft import checks
    from vlmsft.runtime.logging import console, quiet, rank_from_environment

    if rank_from_environment() == 0:
        console().print("checking configuration and data, importing NeMo ...", style="dim", highlight=False)
    problems = checks.find_problems(cfg)
    made = {}
    with tempfile.TemporaryDirectory() as scratch, quiet(scratch):
        from vlmsft.recipe import finetune_recipe, translate

        for name, translate_part in (("recipe", finetune_recipe), ("executor", lambda cfg: translate(cfg.launch))):
            try:
                made[name] = translate_part(cfg)
            except UserError as error:
                problems += [problem for problem in error.problems if problem not in problems]
    return made.get("recipe"), made.get("executor", {}).get("executor"), problems


def keep_record(cfg: DictConfig) -> None:
    """The run folder with the resolved config, the state of the code and the fingerprint of the data."""
    from hydra.core.hydra_config import HydraConfig

    from vlmsft.runtime.logging import console
    from vlmsft.runtime.provenance import write_run_folder

    folder = write_run_folder(
        cfg.run_dir,
        OmegaConf.to_yaml(cfg, resolve=True),
        overrides=HydraConfig.get().overrides.task,
        data_files=[path for path in (cfg.data.train_path, cfg.data.validation_path) if path is not None],
        image_folder=cfg.data.image_folder,
    )
    for key, (old, new) in folder.config_changes.items():
        console().print(f"continuing with {key}: {old} -> {new}", highlight=False)


if __name__ == "__main__":
    main()
