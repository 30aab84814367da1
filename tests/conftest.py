"""What all tests share."""

import signal
from collections.abc import Iterator

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
