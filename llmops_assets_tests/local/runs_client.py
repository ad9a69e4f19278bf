"""Launching runs in the stack under test, over GraphQL as the UI does."""

from __future__ import annotations

import time
from typing import Any

import httpx

LAUNCH = """mutation($p: ExecutionParams!) { launchRun(executionParams: $p) {
    __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
STATUS = "query($i: ID!) { runOrError(runId: $i) { ... on Run { status } } }"
POOL = """{ instance { concurrencyLimit(concurrencyKey: "one") { activeSlotCount } } }"""


class RunsClient:
    """Talks to one web server."""

    def __init__(self, dagster_url: str) -> None:
        self._url = f"{dagster_url}/graphql"

    def launch(self, seconds: float, patience_seconds: float = 60.0) -> str:
        """Launches `waiting`, as soon as the code server is there. Returns the run's id."""
        selector = {
            "repositoryLocationName": "llmops_assets",
            "repositoryName": "__repository__",
            "jobName": "waiting",
        }
        config = {"ops": {"wait": {"config": {"seconds": seconds}}}}
        deadline = time.monotonic() + patience_seconds
        while True:
            answer = self._ask(LAUNCH, p={"selector": selector, "runConfigData": config})
            if "run" in answer["launchRun"]:
                return answer["launchRun"]["run"]["runId"]
            assert time.monotonic() < deadline, answer
            time.sleep(0.5)

    def wait(self, run_id: str, *statuses: str, timeout_seconds: float = 60.0) -> str:
        """Waits until the run has one of the statuses."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            status = self._ask(STATUS, i=run_id)["runOrError"]["status"]
            if status in statuses:
                return status
            assert time.monotonic() < deadline, f"{run_id} is {status}, not {statuses}"
            time.sleep(0.3)

    def places_taken(self) -> int:
        """Places taken in the pool."""
        return self._ask(POOL)["instance"]["concurrencyLimit"]["activeSlotCount"]

    def wait_place_taken(self, timeout_seconds: float = 30.0) -> None:
        """Waits until somebody has the pool's place, that is, the step runs."""
        deadline = time.monotonic() + timeout_seconds
        while self.places_taken() == 0:
            assert time.monotonic() < deadline, "the step did not start"
            time.sleep(0.3)

    def _ask(self, query: str, **variables: Any) -> dict[str, Any]:
        response = httpx.post(self._url, json={"query": query, "variables": variables}, timeout=30)
        return response.json()["data"]
