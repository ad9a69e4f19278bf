"""How an error with a known cure looks in Dagster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from llmops_assets.errors import LLMOpsError


@contextmanager
def explained() -> Iterator[None]:
    """Shows an error with a known cure as its message alone, in place of a stack trace.

    For `with`, or as a decorator of a function that is not a generator.

    Raises:
        dagster.Failure: in place of an `LLMOpsError`.
    """
    try:
        yield
    except LLMOpsError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from error
