"""Submitting runs to Dagster the way its UI does: over GraphQL, into the run queue.

So the limits of the queue and of the pools hold for the command line and CI as well.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import httpx

from llmops_assets.errors import StackError
from llmops_assets.local.stack import CODE_LOCATION
from llmops_assets.partitions import RELEASES
from llmops_assets.triggers.board import (
    LastRun,
    Tick,
    TickOutcome,
    Trigger,
    TriggerBoard,
    daemon_runs,
    first_sentence,
)
from llmops_assets.triggers.requests import EVENT_TAG

# The name that Dagster gives to the one unnamed repository of a code location.
REPOSITORY = "__repository__"
POLL_SECONDS = 0.5
EVENTS_PER_PAGE = 500
PATIENCE_SECONDS = 60.0
WAITING = {
    "QUEUED": "queued; if it stays so, look whether `llmops status` shows the daemon ready",
    "STARTING": "starting",
}
SUCCESS = "SUCCESS"
FINAL_STATUSES = (SUCCESS, "FAILURE", "CANCELED")
# More than a release is ever submitted while one of its runs is under way.
RUNS_LOOKED_AT = 25
PARTITION_TAG = "dagster/partition"
SENSOR_DAEMON = "SENSOR"
# What Dagster wraps around the error of a sensor.
WRAPPERS = ("SensorExecutionError", "DagsterUserCodeProcessError")
# Visible ASCII: what a header may hold (RFC 9110) without a space at either end.
TOKEN = re.compile(r"[\x21-\x7e]+")

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
TERMINATE = """
mutation($run: String!) {
  terminateRun(runId: $run, terminatePolicy: SAFE_TERMINATE) {
    __typename
    ... on TerminateRunFailure { message }
    ... on RunNotFoundError { message }
    ... on PythonError { message }
    ... on UnauthorizedError { message }
  }
}"""
RUNS = """
query($filter: RunsFilter!, $limit: Int!) {
  runsOrError(filter: $filter, limit: $limit) {
    __typename
    ... on Runs { results { runId status creationTime } }
    ... on PythonError { message }
    ... on InvalidPipelineRunsFilterError { message }
  }
}"""
TRIGGERS = """
query($repository: RepositorySelector!) {
  sensorsOrError(repositorySelector: $repository) {
    __typename
    ... on Sensors {
      results {
        name
        description
        nextTick { timestamp }
        sensorState {
          status
          ticks(limit: 2) {
            timestamp
            status
            skipReason
            error { className message cause { className message cause { className message } } }
          }
          runs(limit: 1) { runId jobName status creationTime tags { key value } }
        }
      }
    }
    ... on RepositoryNotFoundError { message }
    ... on PythonError { message }
  }
  instance { daemonHealth { allDaemonStatuses { daemonType healthy lastHeartbeatTime } } }
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


@dataclass(frozen=True, order=True)
class SubmittedRun:
    """A run that somebody submitted. The earlier one is the lesser."""

    created: float
    """Seconds since the epoch."""
    run: str
    status: str

    @property
    def under_way(self) -> bool:
        """Whether it can still succeed."""
        return self.status not in FINAL_STATUSES and not self.cancelled

    @property
    def cancelled(self) -> bool:
        return self.status in ("CANCELING", "CANCELED")

    @property
    def succeeded(self) -> bool:
        return self.status == SUCCESS


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

        Raises:
            StackError: the address is none, or the token could be read on its way there.
        """
        self.url = url.rstrip("/")
        self._client = httpx.Client(
            timeout=timeout_seconds,
            headers={"Authorization": f"Bearer {_sendable(token, self.url)}"} if token else {},
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
                "repository": _repository(),
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
        all_tags = {PARTITION_TAG: release, **(tags or {})}
        answer = self._call(
            LAUNCH,
            {
                "params": {
                    "selector": {**_repository(), "jobName": job},
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

    def runs(self, job: str, release: str) -> list[SubmittedRun]:
        """The newest runs of a job for one release, whoever asked for them, newest first.

        Raises:
            StackError: Dagster does not answer or refuses.
        """
        wanted = {"pipelineName": job, "tags": [{"key": PARTITION_TAG, "value": release}]}
        variables = {"filter": wanted, "limit": RUNS_LOOKED_AT}
        answer = self._call(RUNS, variables)["runsOrError"]
        if answer["__typename"] != "Runs":
            raise self._refused(f"to list the runs of {release}", answer)
        return [
            SubmittedRun(run["creationTime"], run["runId"], run["status"])
            for run in answer["results"]
        ]

    def terminate(self, run: str) -> None:
        """Ends a run; one that has ended is left as it is.

        Raises:
            StackError: Dagster does not answer or refuses.
        """
        answer = self._call(TERMINATE, {"run": run})["terminateRun"]
        if answer["__typename"] not in ("TerminateRunSuccess", "TerminateRunFailure"):
            raise self._refused(f"to end the run {run}", answer)

    def triggers(self) -> TriggerBoard:
        """What each sensor last did, as of now.

        Raises:
            StackError: Dagster does not answer or refuses.
        """
        content = self._call(TRIGGERS, {"repository": _repository()})
        sensors = content["sensorsOrError"]
        if sensors["__typename"] != "Sensors":
            raise self._refused("to list the triggers", sensors)
        daemon = next(
            (
                status
                for status in content["instance"]["daemonHealth"]["allDaemonStatuses"]
                if status["daemonType"] == SENSOR_DAEMON
            ),
            {"healthy": False, "lastHeartbeatTime": None},
        )
        seen = daemon["lastHeartbeatTime"]
        heartbeat = None if seen is None else _time(seen)
        found = [_trigger(sensor) for sensor in sensors["results"]]
        return TriggerBoard(
            triggers=tuple(sorted(found, key=lambda trigger: trigger.name)),
            heartbeat=heartbeat,
            daemon_runs=daemon_runs(heartbeat, bool(daemon["healthy"]), datetime.now(UTC)),
        )

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
                return Outcome(run, status == SUCCESS, tuple(dict.fromkeys(failures)))
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


def _repository() -> dict[str, str]:
    """The code location's one repository, as queries name it."""
    return {"repositoryName": REPOSITORY, "repositoryLocationName": CODE_LOCATION}


def _sendable(token: str, url: str) -> str:
    """The token, if it reaches `url` unread by others.

    Raises:
        StackError: it would not, or is none. The message does not show it.
    """
    address = urlsplit(url)
    if address.scheme != "https" and not _is_loopback(address.hostname):
        raise StackError(
            "The token was not sent",
            expected="an https address, or one on this machine, as others could read it",
            found=url,
            cure="put a proxy with a certificate before Dagster and give its https address; or "
            "unset LLMOPS_DAGSTER_TOKEN where nobody asks for one",
        )
    token = token.strip()  # secret stores like to end a value with a new line
    if not TOKEN.fullmatch(token):
        raise StackError(
            "The token cannot be sent",
            expected="letters, digits and signs of ASCII, without spaces inside",
            found=f"a value of {len(token)} characters, others among them",
            cure="set LLMOPS_DAGSTER_TOKEN to the token as it was given to you",
        )
    return token


def _is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host or "").is_loopback
    except ValueError:
        return False


def _trigger(sensor: Mapping[str, Any]) -> Trigger:
    state = sensor["sensorState"]
    # The newest may be under way.
    ended = [tick for tick in state["ticks"] if tick["status"] != "STARTED"]
    upcoming = sensor["nextTick"]
    return Trigger(
        name=sensor["name"],
        purpose=first_sentence(sensor["description"] or ""),
        switched_on=state["status"] == "RUNNING",
        last_tick=_tick(ended[0]) if ended else None,
        next_tick=_time(upcoming["timestamp"]) if upcoming else None,
        last_run=_last_run(state["runs"][0]) if state["runs"] else None,
    )


def _tick(tick: Mapping[str, Any]) -> Tick:
    outcome = {"SUCCESS": TickOutcome.ACTED, "FAILURE": TickOutcome.FAILED}.get(
        tick["status"], TickOutcome.SKIPPED
    )
    reason = tick["skipReason"]
    if outcome is TickOutcome.FAILED:
        reason = _first_line(tick["error"]) if tick["error"] else None
    return Tick(time=_time(tick["timestamp"]), outcome=outcome, reason=reason)


def _first_line(error: Mapping[str, Any]) -> str:
    """Of the sensor's own error, without its class and what Dagster wrapped around it."""
    while error["className"] in WRAPPERS and error.get("cause"):
        error = error["cause"]
    line = error["message"].strip().partition("\n")[0]
    kind, colon, message = line.partition(": ")
    return message if colon and kind.rpartition(".")[2] == error["className"] else line


def _last_run(run: Mapping[str, Any]) -> LastRun:
    tags = {tag["key"]: tag["value"] for tag in run["tags"]}
    return LastRun(
        run=run["runId"],
        event=tags.get(EVENT_TAG),
        job=run["jobName"],
        partition=tags.get(PARTITION_TAG),
        status=run["status"],
        time=_time(run["creationTime"]),
    )


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


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
