"""Submitting runs to Dagster the way its UI does: over GraphQL, into the run queue.

So the limits of the queue and of the pools hold for the command line and CI as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from llmops_assets.errors import StackError
from llmops_assets.local.stack import CODE_LOCATION
from llmops_assets.partitions import RELEASES

# The name that Dagster gives to the one unnamed repository of a code location.
REPOSITORY = "__repository__"
POLL_SECONDS = 0.5
EVENTS_PER_PAGE = 500
PATIENCE_SECONDS = 60.0
WAITING = {
    "QUEUED": "queued; if it stays so, look whether `llmops status` shows the daemon ready",
    "STARTING": "starting",
}
FINAL_STATUSES = ("SUCCESS", "FAILURE", "CANCELED")

ADD_PARTITION = """
mutation($partition: String!, $definition: String!, $repository: RepositorySelector!) {
  addDynamicPartition(
    partitionKey: $partition, partitionsDefName: $definition, repositorySelector: $repository
  ) {
    __typename
    ... on PythonError { message }
    ... on UnauthorizedError { message }
  }
}"""
LAUNCH = """
mutation($params: ExecutionParams!) {
  launchRun(executionParams: $params) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on RunConfigValidationInvalid { errors { message } }
    ... on PipelineNotFoundError { message }
    ... on PythonError { message }
    ... on UnauthorizedError { message }
  }
}"""
STATUS = """
query($run: ID!) { runOrError(runId: $run) { __typename ... on Run { status } } }"""
EVENTS = """
query($run: ID!, $after: String, $limit: Int!) {
  logsForRun(runId: $run, afterCursor: $after, limit: $limit) {
    __typename
    ... on EventConnection {
      cursor
      hasMore
      events {
        __typename
        ... on MessageEvent { message level stepKey }
        ... on ExecutionStepFailureEvent {
          error { message cause { message } }
          failureMetadata { description }
        }
        ... on AssetCheckEvaluationEvent {
          evaluation { checkName assetKey { path } success description }
        }
      }
    }
    ... on PythonError { message }
  }
}"""


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `failures` are the messages of failed steps."""

    run: str
    succeeded: bool
    failures: tuple[str, ...]


class _NoAnswerError(StackError):
    """Nobody answered, which may pass; unlike a refusal."""


class DagsterClient:
    """A Dagster web server, seen from the command line or CI."""

    def __init__(self, url: str, timeout_seconds: float, token: str | None = None) -> None:
        """
        Args:
            url: of the web server.
            timeout_seconds: limit of one call.
            token: sent as a bearer token, for a proxy that asks for one.
        """
        self.url = url.rstrip("/")
        self._client = httpx.Client(
            timeout=timeout_seconds,
            headers={"Authorization": f"Bearer {token}"} if token else {},
        )

    def add_release(self, release: str) -> None:
        """Makes the release a partition; one that is there already is fine.

        Raises:
            StackError: Dagster does not answer or refuses.
        """
        answer = self._call(
            ADD_PARTITION,
            {
                "partition": release,
                "definition": RELEASES.name,
                "repository": {
                    "repositoryName": REPOSITORY,
                    "repositoryLocationName": CODE_LOCATION,
                },
            },
        )["addDynamicPartition"]
        if answer["__typename"] not in (
            "AddDynamicPartitionSuccess",
            "DuplicateDynamicPartitionError",
        ):
            raise self._refused(f"to add the release {release}", answer)

    def launch(
        self,
        job: str,
        release: str,
        config: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Puts a run of a job for one release into the queue. Returns the run's id.

        Raises:
            StackError: Dagster does not answer or refuses.
        """
        all_tags = {"dagster/partition": release, **(tags or {})}
        answer = self._call(
            LAUNCH,
            {
                "params": {
                    "selector": {
                        "repositoryName": REPOSITORY,
                        "repositoryLocationName": CODE_LOCATION,
                        "jobName": job,
                    },
                    "runConfigData": dict(config or {}),
                    "executionMetadata": {
                        "tags": [{"key": key, "value": value} for key, value in all_tags.items()]
                    },
                }
            },
        )["launchRun"]
        if answer["__typename"] != "LaunchRunSuccess":
            raise self._refused(f"to launch {job} for {release}", answer)
        return answer["run"]["runId"]

    def follow(self, run: str, tell: Callable[[str], None]) -> Outcome:
        """Waits for a run's end and tells what it does.

        A server that is too busy to answer for a while does not end the waiting.

        Args:
            tell: gets a line for each change of state, step, check and report of progress.

        Raises:
            StackError: Dagster refused, or did not answer for a minute; the run may go on.
        """
        cursor: str | None = None
        failures: list[str] = []
        told: str | None = None
        answered = time.monotonic()
        while True:
            try:
                # The status first: events that come after it belong to the next round.
                status = self._call(STATUS, {"run": run})["runOrError"].get("status")
                more = True
                while more:
                    cursor, more = self._tell_page(run, cursor, failures, tell)
            except _NoAnswerError:
                if time.monotonic() - answered > PATIENCE_SECONDS:
                    raise
                time.sleep(POLL_SECONDS)
                continue
            answered = time.monotonic()
            if status in FINAL_STATUSES:
                return Outcome(run, status == "SUCCESS", tuple(dict.fromkeys(failures)))
            if status != told and status in WAITING:
                tell(f"  {WAITING[status]}")
            told = status
            time.sleep(POLL_SECONDS)

    def _tell_page(
        self, run: str, cursor: str | None, failures: list[str], tell: Callable[[str], None]
    ) -> tuple[str, bool]:
        """Tells a page of events after `cursor`. Returns where it ends, and whether more follow."""
        variables = {"run": run, "after": cursor, "limit": EVENTS_PER_PAGE}
        page = self._call(EVENTS, variables)["logsForRun"]
        if page["__typename"] != "EventConnection":
            raise self._refused(f"to show the run {run}", page)
        for event in page["events"]:
            failure, line = _read(event)
            if failure is not None:
                failures.append(failure)
            if line is not None:
                tell(line)
        return page["cursor"], page["hasMore"]

    def run_url(self, run: str) -> str:
        """The run's page."""
        return f"{self.url}/runs/{run}"

    def _call(self, query: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        try:
            response = self._client.post(
                f"{self.url}/graphql", json={"query": query, "variables": dict(variables)}
            )
            response.raise_for_status()
            content = response.json()
        except httpx.HTTPStatusError as error:
            kind = _NoAnswerError if error.response.is_server_error else StackError
            raise kind(
                f"Dagster at {self.url} refused a call",
                found=f"{error.response.status_code} {error.response.reason_phrase}",
                cure="check the address; for 401 or 403 also the token in LLMOPS_DAGSTER_TOKEN",
            ) from error
        except (httpx.HTTPError, ValueError) as error:
            raise _NoAnswerError(
                f"Dagster at {self.url} does not answer",
                found=error,
                cure="check it with `llmops status`, start it with `llmops up`",
            ) from error
        if not isinstance(content, dict) or content.get("errors") or "data" not in content:
            raise StackError(
                f"Dagster at {self.url} did not understand a query",
                found=content.get("errors") if isinstance(content, dict) else content,
                cure="check that the server has the Dagster version of this platform",
            )
        return content["data"]

    def _refused(self, what: str, answer: Mapping[str, Any]) -> StackError:
        messages = [answer.get("message")] + [e["message"] for e in answer.get("errors", [])]
        return StackError(
            f"Dagster refused {what}",
            found=f"{answer['__typename']}: {'; '.join(m for m in messages if m)}",
            cure=f"look at the deployment's page, {self.url}/deployment",
        )


def _read(event: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The failure that an event reports, and the line to show for it."""
    kind, step = event["__typename"], event.get("stepKey")
    if kind == "ExecutionStepStartEvent":
        return None, f"▸ {step}"
    if kind == "AssetCheckEvaluationEvent":
        evaluation = event["evaluation"]
        mark = "✓" if evaluation["success"] else "✗"
        return None, f"  {mark} {evaluation['checkName']}: {evaluation['description']}"
    if kind == "LogMessageEvent" and event["level"] in ("INFO", "WARNING", "ERROR", "CRITICAL"):
        # That steps behind a failed one do not run needs no line for each of them.
        skipped = event["message"].startswith("Dependencies for step ")
        return None, None if skipped else f"  {event['message']}"
    if kind == "ExecutionStepFailureEvent":
        error = event.get("error") or {}
        messages = (
            (event.get("failureMetadata") or {}).get("description"),
            (error.get("cause") or {}).get("message"),
            error.get("message"),
        )
        return next((f"{step}: {m.strip()}" for m in messages if m), f"{step} failed"), None
    if kind == "RunFailureEvent":
        return None, f"  {event['message']}"
    return None, None
