"""Wait for something that another process or thread does."""

from __future__ import annotations

import time
from collections.abc import Callable

EVERY_SECONDS = 0.02


def wait_for(
    condition: Callable[[], bool], what: str = "what was expected", seconds: float = 30
) -> None:
    """Return once `condition` holds; fail, naming `what`, when it does not in `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(EVERY_SECONDS)
