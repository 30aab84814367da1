"""python -m vlmsft.serve model=FOLDER key=value ...: an OpenAI-compatible endpoint for a model."""

from __future__ import annotations

from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from vlmsft.cli import command, multirun_job
from vlmsft.errors import Problem, UserError


@command("serve")
def main(cfg: DictConfig) -> None:
    from hydra.utils import get_method

    from vlmsft.serving.endpoint import endpoint_from, endpoint_problems

    if multirun_job() is not None:
        raise UserError(Problem("-m", "a multirun", "one server for each command", "Start one for each port"))
    if OmegaConf.is_missing(cfg, "model"):
        remedy = "python -m vlmsft.serve model=exports/11b"
        raise UserError(Problem("model", "nothing", "the folder of the model to serve", remedy))
    values = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    engine = values.pop("engine")
    serve = get_method(engine.pop("_target_"))
    serve(endpoint_problems(values), lambda: endpoint_from(values), **engine)


if __name__ == "__main__":
    main()
