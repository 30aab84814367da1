"""python -m vlmsft.serve checkpoint=FOLDER key=value ...: an OpenAI-compatible endpoint for a model.

model=FOLDER means the same. It can't be the key's own name: Hydra takes model=... for a choice of the group conf/model.
"""

from __future__ import annotations

import sys
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
    if OmegaConf.is_missing(cfg, "checkpoint"):
        remedy = "python -m vlmsft.serve checkpoint=exports/11b"
        raise UserError(Problem("checkpoint", "nothing", "the folder of the model to serve", remedy))
    values = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    engine = values.pop("engine")
    serve = get_method(engine.pop("_target_"))
    serve(endpoint_problems(values), lambda: endpoint_from(values), **engine)


def with_checkpoint(argument: str) -> str:
    """The command-line argument `argument`, with checkpoint= for model=."""
    key, equals, value = argument.partition("=")
    return f"checkpoint={value}" if equals and key == "model" else argument


if __name__ == "__main__":
    sys.argv[1:] = map(with_checkpoint, sys.argv[1:])
    main()
