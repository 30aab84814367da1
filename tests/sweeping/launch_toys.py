"""`vlmsft.train` with trainings that cost nothing: python -m launch_toys -m key=value ... Imports no NeMo."""

from __future__ import annotations

import os
import time
from pathlib import Path


def train(run_dir: str, rate: float, fails: bool) -> None:
    """The loss is smallest at a learning rate of 3. Waits while there is a file `hold` beside runs/."""
    with open(Path(run_dir, "starts"), "a") as file:
        file.write(f"{os.getpid()}\n")
    Path(run_dir, "metrics.csv").write_text(f"step,val_loss\n1,{(rate - 3) ** 2}\n")
    while Path(run_dir).parents[2].joinpath("hold").exists():
        time.sleep(0.05)
    if fails:
        raise ValueError("a bug")


def main() -> None:
    import launch_toys
    import nemo_run as run

    from vlmsft import train as command

    def check(cfg, leave_out_infeasible=False):
        return (
            run.Partial(launch_toys.train, run_dir=cfg.run_dir, rate=cfg.optim.max_lr, fails=cfg.seed == 13),
            None,
            [],
        )

    command.check = check
    command.main()


if __name__ == "__main__":
    main()
