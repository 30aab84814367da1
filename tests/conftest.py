"""What all tests share."""

import signal


def pytest_configure() -> None:
    """Ctrl-C works in the tests and what they start, also where the suite runs in the background of a script: a shell
    starts that with SIGINT ignored, and children inherit it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
