"""The demo: the example model from nothing into production, on this machine."""

from __future__ import annotations

import getpass
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime

from llmops_assets.local import stack
from llmops_assets.local.releasing import (
    Decision,
    client_for,
    package_digest,
    start_promotion,
    start_release,
)
from llmops_assets.platform import Platform
from llmops_assets.release import Release
from llmops_assets.serving import triton
from llmops_assets.serving.slots import Environment
from llmops_assets.settings import Settings
from llmops_assets.spec import read_spec

MODEL = "date-normalizer"


def run_demo(settings: Settings, tell: Callable[[str], None]) -> bool:
    """Starts the stack, makes a release, approves it, and asks it a question.

    A second call finds the release serving and only asks.

    Returns:
        Whether the model answered as it should.

    Raises:
        LLMOpsError: something is in the way; the message says what.
    """
    started = time.monotonic()
    tell("Starting the local stack")
    info = stack.up(settings, lambda step: tell(f"  {step}"))
    for problem in info.problems:
        tell(f"  problem: {problem}")
    tell(f"  Dagster's UI: {info.endpoints.dagster_url}")
    tell(f"  MLflow:       {info.endpoints.mlflow_url}")
    serving = _serving(settings)
    if serving is not None:
        tell(f"{serving} serves the spec as it is now; nothing to do")
    elif not _release(settings, tell):
        return False
    known = read_spec(settings.models / f"{MODEL}.yaml").serving.known_answers[0]
    answer = triton.generate(info.endpoints.gateway_url, MODEL, known.prompt)["text_output"]
    tell(f"Asked for {known.prompt!r} through the gateway, it answers {answer!r}")
    body = json.dumps({"text_input": known.prompt})
    tell(f"Done in {time.monotonic() - started:.0f} s. Try it yourself:")
    tell("")
    tell(f"  curl -s -d '{body}' {info.endpoints.gateway_url}/v2/models/{MODEL}/generate")
    tell("")
    tell(f"Look around: {info.endpoints.dagster_url}/asset-groups  Stop everything: make down")
    return answer == known.answer


def _release(settings: Settings, tell: Callable[[str], None]) -> bool:
    client = client_for(settings)
    release = Release.by_hand(MODEL, datetime.now(UTC)).key
    tell(f"Releasing {release}: training takes about a minute, everything about three")
    outcome = client.follow(start_release(client, release, "llmops demo"), tell)
    if outcome.succeeded:
        decision = Decision(
            approver=getpass.getuser(),
            reason="the demo, started by hand",
            approve=True,
            package=package_digest(settings, release),
        )
        tell(f"Approving package {decision.package} and putting it into production")
        outcome = client.follow(start_promotion(client, release, decision), tell)
    for failure in outcome.failures:
        tell(f"failed: {failure}")
    return outcome.succeeded


def _serving(settings: Settings) -> str | None:
    """The release that serves, if its spec is the file's as it is now."""
    platform = Platform(settings)
    route, _ = platform.routes.current(Environment.PRODUCTION, MODEL)
    if route is None or route.serving is None:
        return None
    same = platform.spec(route.serving.release) == read_spec(settings.models / f"{MODEL}.yaml")
    return route.serving.release if same else None
