"""What all tests share."""

import logging
import signal
import sys
from collections.abc import Callable, Iterator

import pytest
from hydra.core.hydra_config import HydraConfig


def pytest_configure() -> None:
    """Ctrl-C works in the tests and what they start, also where the suite runs in the background of a script: a shell
    starts that with SIGINT ignored, and children inherit it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_hydra_left() -> Iterator[None]:
    """A command that ran in this process leaves its last job's Hydra config, which names a run's number."""
    yield
    HydraConfig.instance().cfg = None


@pytest.fixture
def run_main(monkeypatch, capfd) -> Callable[..., tuple[int, str, str]]:
    """Runs a command's main() with arguments in this process: exit code, stdout, stderr."""

    def run_main(main: Callable[[], None], *arguments: str) -> tuple[int, str, str]:
        # Hydra configures logging, which closes all handlers: pytest's too, and absl's with pytest's capture file
        monkeypatch.setattr(logging, "_handlerList", [])
        monkeypatch.setattr(sys, "argv", ["vlmsft", *arguments])
        loggers = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
        for logger in loggers:  # job_logging: disabled disables those that are there
            monkeypatch.setattr(logger, "disabled", logger.disabled)
        monkeypatch.setattr(logging.root, "level", logging.root.level)
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        return code, *capfd.readouterr()

    return run_main
