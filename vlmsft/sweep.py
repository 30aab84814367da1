"""python -m vlmsft.sweep ACTION [ID] [key=value ...]: look after the sweeps that `vlmsft.train -m` launched."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from omegaconf import DictConfig

from vlmsft.cli import command
from vlmsft.errors import Problem, UserError, nearest
from vlmsft.sweeping.ledger import JobRow, Ledger, find_sweep

WORDS = ("action", "sweep")
"""The keys that words without a `=` stand for, in this order."""


def with_keys(arguments: list[str]) -> list[str]:
    """`status 3f2a watch=true` as Hydra takes it: `action=status sweep='3f2a' watch=true`.

    The id is quoted: 12345678 and 1e123456 are text.
    """
    names, words = iter(WORDS), []
    for argument in arguments:
        is_word = "=" not in argument and not argument.startswith("-") and not _belongs_to_option(words)
        name = next(names, None) if is_word else None
        words.append(argument if name is None else f"{name}='{argument}'")
    return words


def _belongs_to_option(before: list[str]) -> bool:
    """Whether the word before is an option of Hydra's that takes one: --cfg job."""
    return bool(before) and before[-1] in ("--cfg", "-c", "--package", "-p", "--info", "-i", "--config-dir", "-cd")


@command("sweep")
def main(cfg: DictConfig) -> None:
    if cfg.action not in ACTIONS:
        remedy = nearest(str(cfg.action), ACTIONS)
        raise UserError(Problem("action", str(cfg.action), f"one of {', '.join(ACTIONS)}", remedy))
    ledger = Ledger(find_sweep(cfg.sweeps_dir, None if cfg.sweep is None else str(cfg.sweep)))
    sys.exit(ACTIONS[cfg.action](ledger, cfg))


def status(ledger: Ledger, cfg: DictConfig) -> int:
    from vlmsft.runtime.logging import console
    from vlmsft.sweeping import show
    from vlmsft.sweeping.control import refresh

    refresh(ledger)
    if cfg.watch and console().is_terminal:
        show.watch(ledger)
    else:
        console().print(show.table_of(ledger))
    return 0


def resume(ledger: Ledger, cfg: DictConfig) -> int:
    return _run(ledger, cfg, ["cancelled"])


def retry(ledger: Ledger, cfg: DictConfig) -> int:
    return _run(ledger, cfg, ["failed"] if cfg.job is not None else ["failed", "cancelled"])


def _run(ledger: Ledger, cfg: DictConfig, again: list[str]) -> int:
    from vlmsft.sweeping import show
    from vlmsft.sweeping.schedule import Interrupted, read_options, write_options

    if cfg.max_parallel is not None:
        if type(cfg.max_parallel) is not int or cfg.max_parallel < 1:
            raise UserError(Problem("max_parallel", repr(cfg.max_parallel), "null or a whole number from 1 on"))
        write_options(ledger, replace(read_options(ledger), max_parallel=cfg.max_parallel))
    rows = chosen(ledger, cfg)
    for row in rows:
        ledger.move(row.num, "pending", again, reason="")
    try:
        return show.run_and_show(ledger, [row.num for row in rows])
    except Interrupted as interrupted:
        return 128 + interrupted.number


def cancel(ledger: Ledger, cfg: DictConfig) -> int:
    from vlmsft.sweeping import show
    from vlmsft.sweeping.control import cancel_jobs

    left = cancel_jobs(ledger, chosen(ledger, cfg))
    show.say_end(ledger, [row.num for row in ledger.written()])
    for row in left:
        show.say(f"job {row.num} runs on {row.host}: cancel it there")
    return 1 if left else 0


def logs(ledger: Ledger, cfg: DictConfig) -> int:
    from vlmsft.sweeping import show

    if type(cfg.lines) is not int or cfg.lines < 1:
        raise UserError(Problem("lines", repr(cfg.lines), "a whole number from 1 on"))
    rows = [row for row in chosen(ledger, cfg) if row.started is not None]
    for row in rows:
        for path in show.output_of(ledger, row):
            show.say(f"== job {row.num}: {path}")
            with open(path, encoding="utf-8", errors="replace") as file:
                show.say("".join(deque(file, maxlen=cfg.lines)).rstrip())
    return 0


def chosen(ledger: Ledger, cfg: DictConfig) -> list[JobRow]:
    """The job of `job=N`, or all."""
    return ledger.written() if cfg.job is None else [ledger.job(cfg.job)]


ACTIONS: dict[str, Callable[[Ledger, DictConfig], int]] = {
    "status": status,
    "resume": resume,
    "retry": retry,
    "cancel": cancel,
    "logs": logs,
}

if __name__ == "__main__":
    sys.argv[1:] = with_keys(sys.argv[1:])
    main()
