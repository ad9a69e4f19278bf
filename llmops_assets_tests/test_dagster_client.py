"""The client of Dagster's GraphQL: what it sends, and that every kind of refusal is explained.

Against a double of the web server; the lifecycle tests use the real one.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from llmops_assets import dagster_client
from llmops_assets.dagster_client import DagsterClient, Outcome
from llmops_assets.errors import StackError

from .conftest import free_port
from .fakes import HttpDouble

pytestmark = pytest.mark.timeout(60)
SUCCESS = {"launchRun": {"__typename": "LaunchRunSuccess", "run": {"runId": "run-1"}}}


class DagsterDouble(HttpDouble):
    """A double of the web server: answers queries in order with `replies`, a status and a body."""

    def __init__(self) -> None:
        self.replies: list[tuple[int, Any]] = []
        super().__init__(lambda path, body: self._next(path))

    def says(self, *data: Any) -> None:
        """Queues good answers with these data."""
        self.replies += [(200, {"data": item}) for item in data]

    def _next(self, path: str) -> tuple[int, Any]:
        assert path == "/graphql"
        return self.replies.pop(0)


@pytest.fixture
def dagster() -> Iterator[DagsterDouble]:
    with DagsterDouble() as double:
        yield double


@pytest.fixture
def client(dagster: DagsterDouble) -> DagsterClient:
    return DagsterClient(dagster.url + "/", timeout_seconds=5, token="secret")


def events(*items: Mapping[str, Any], cursor: str = "1", more: bool = False) -> dict[str, Any]:
    page = {"__typename": "EventConnection", "cursor": cursor, "hasMore": more}
    return {"logsForRun": {**page, "events": list(items)}}


def status(value: str) -> dict[str, Any]:
    return {"runOrError": {"__typename": "Run", "status": value}}


def failure(step: str, **error: Any) -> dict[str, Any]:
    return {"__typename": "ExecutionStepFailureEvent", "stepKey": step, "message": "", **error}


def test_launch_sends_job_partition_tags_and_config(
    dagster: DagsterDouble, client: DagsterClient
) -> None:
    """The queue's limits and the release's column depend on each of them."""
    dagster.says(SUCCESS)
    config = {"ops": {"model_spec": {"config": {"commit": "abc"}}}}
    assert client.launch("release", "m.v1", config, {"llmops/requested_by": "ada"}) == "run-1"
    ((_, body, headers),) = dagster.requests
    params = body["variables"]["params"]
    assert params["selector"]["jobName"] == "release"
    assert params["selector"]["repositoryLocationName"] == "llmops_assets"
    assert params["runConfigData"] == config
    tags = {tag["key"]: tag["value"] for tag in params["executionMetadata"]["tags"]}
    assert tags == {"dagster/partition": "m.v1", "llmops/requested_by": "ada"}
    assert headers["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("kind", ["AddDynamicPartitionSuccess", "DuplicateDynamicPartitionError"])
def test_adding_a_release_twice_is_fine(
    dagster: DagsterDouble, client: DagsterClient, kind: str
) -> None:
    """A release that failed half-way is submitted again."""
    dagster.says({"addDynamicPartition": {"__typename": kind}})
    client.add_release("m.v1")
    assert dagster.requests[0][1]["variables"]["partition"] == "m.v1"
    assert dagster.requests[0][1]["variables"]["definition"] == "releases"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"__typename": "PythonError", "message": "no code server"}, "no code server"),
        ({"__typename": "PipelineNotFoundError", "message": "no job"}, "no job"),
        (
            {"__typename": "RunConfigValidationInvalid",
             "errors": [{"message": "one"}, {"message": "two"}]},
            "one; two",
        ),
        ({"__typename": "UnauthorizedError", "message": "read-only"}, "read-only"),
    ],
)  # fmt: skip
def test_refused_launch_says_why(
    dagster: DagsterDouble, client: DagsterClient, answer: dict[str, Any], said: str
) -> None:
    """Dagster answers 200 to what it refuses."""
    dagster.says({"launchRun": answer})
    with pytest.raises(StackError, match=f"refused to launch release for m.v1.*{said}"):
        client.launch("release", "m.v1")


def test_refused_partition_says_why(dagster: DagsterDouble, client: DagsterClient) -> None:
    """A read-only web server is what auditors have."""
    answer = {"__typename": "UnauthorizedError", "message": "read-only"}
    dagster.says({"addDynamicPartition": answer})
    with pytest.raises(StackError, match=r"refused to add the release m.v1.*read-only"):
        client.add_release("m.v1")


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ((401, "who are you"), "401 Unauthorized.*LLMOPS_DAGSTER_TOKEN"),
        ((502, "<html>bad gateway</html>"), "502 Bad Gateway"),
        ((200, "<html>log in</html>"), "does not answer"),
        ((200, {"errors": [{"message": "Cannot query field"}]}), "Cannot query field"),
        ((200, ["not", "graphql"]), "did not understand"),
        ((200, {}), "did not understand"),
    ],
)
def test_answers_that_are_none_are_explained(
    dagster: DagsterDouble, client: DagsterClient, reply: tuple[int, Any], said: str
) -> None:
    """Proxies, log-in pages and other versions stand between CI and Dagster."""
    dagster.replies = [reply]
    with pytest.raises(StackError, match=said) as caught:
        client.launch("release", "m.v1")
    assert "secret" not in str(caught.value)


def test_nobody_there_is_found_at_once() -> None:
    """The commonest case: the stack is not up."""
    client = DagsterClient(f"http://127.0.0.1:{free_port()}", timeout_seconds=5)
    with pytest.raises(StackError, match=r"does not answer.*llmops up"):
        client.add_release("m.v1")


def test_server_that_hangs_is_given_up() -> None:
    """It accepts, and never answers; a command line must not hang with it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = DagsterClient(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_seconds=0.3)
        started = time.monotonic()
        with pytest.raises(StackError, match="does not answer"):
            client.add_release("m.v1")
    assert time.monotonic() - started < 5


def test_following_tells_what_happens_once_and_in_order(
    dagster: DagsterDouble, client: DagsterClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody watches this for minutes; lines that repeat or are missing mislead."""
    monkeypatch.setattr("llmops_assets.dagster_client.POLL_SECONDS", 0)
    dagster.says(
        status("STARTED"),
        events({"__typename": "ExecutionStepStartEvent", "stepKey": "engine"}, more=True),
        events(
            {"__typename": "LogMessageEvent", "level": "INFO", "message": "step 1 of 2"},
            {"__typename": "LogMessageEvent", "level": "DEBUG", "message": "noise"},
            cursor="2",
        ),
        status("SUCCESS"),
        events(
            {"__typename": "AssetCheckEvaluationEvent", "evaluation": {
                "checkName": "parity", "success": False, "description": "they differ"}},
            cursor="3",
        ),
    )  # fmt: skip
    lines: list[str] = []
    assert client.follow("run-1", lines.append) == Outcome("run-1", True, ())
    assert lines == ["▸ engine", "  step 1 of 2", "  ✗ parity: they differ"]
    cursors = [body["variables"]["after"] for _, body, _ in dagster.requests
               if "after" in body["variables"]]  # fmt: skip
    assert cursors == [None, "1", "2"]


def test_failures_show_the_most_useful_message(
    dagster: DagsterDouble, client: DagsterClient
) -> None:
    """A Failure's description, else the cause, else Dagster's own sentence."""
    dagster.says(
        status("FAILURE"),
        events(
            failure("a", failureMetadata={"description": "Gate failed. To do: iterate."}),
            failure("b", error={"message": "outer", "cause": {"message": "inner\n"}}),
            failure("c", error={"message": "outer"}),
            failure("d"),
            failure("a", failureMetadata={"description": "Gate failed. To do: iterate."}),
        ),
    )
    outcome = client.follow("run-1", lambda _: None)
    assert not outcome.succeeded
    assert outcome.failures == (
        "a: Gate failed. To do: iterate.", "b: inner", "c: outer", "d failed"
    )  # fmt: skip


@pytest.mark.parametrize(("value", "succeeded"), [("CANCELED", False), ("SUCCESS", True)])
def test_every_end_of_a_run_ends_the_following(
    dagster: DagsterDouble, client: DagsterClient, value: str, succeeded: bool
) -> None:
    """A run that somebody terminated in the UI must end the command as well."""
    dagster.says(status(value), events())
    assert client.follow("run-1", lambda _: None).succeeded is succeeded


def test_busy_server_does_not_end_the_following_nor_repeat_lines(
    dagster: DagsterDouble, client: DagsterClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that takes all cores makes the web server slow, not the run failed."""
    monkeypatch.setattr("llmops_assets.dagster_client.POLL_SECONDS", 0)
    step = {"__typename": "ExecutionStepStartEvent", "stepKey": "engine"}
    dagster.says(status("STARTED"), events(step, more=True))
    dagster.replies.append((503, "<html>busy</html>"))
    dagster.says(status("SUCCESS"), events(cursor="2"))
    lines: list[str] = []
    assert client.follow("run-1", lines.append).succeeded
    assert lines == ["▸ engine"]
    assert dagster.requests[-1][1]["variables"]["after"] == "1"


def test_patience_ends(
    dagster: DagsterDouble, client: DagsterClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A web server that is gone must end the command, with exit code 2."""
    monkeypatch.setattr("llmops_assets.dagster_client.POLL_SECONDS", 0)
    monkeypatch.setattr("llmops_assets.dagster_client.PATIENCE_SECONDS", 0)
    dagster.replies = [(503, "busy"), (503, "busy")]
    with pytest.raises(StackError, match="503"):
        client.follow("run-1", lambda _: None)


def test_run_that_does_not_exist_ends_the_following(
    dagster: DagsterDouble, client: DagsterClient
) -> None:
    """Otherwise the command would wait for it for ever."""
    gone = {"__typename": "RunNotFoundError"}
    dagster.says({"runOrError": gone}, {"logsForRun": {**gone, "message": "no such run"}})
    with pytest.raises(StackError, match="no such run"):
        client.follow("run-1", lambda _: None)


@pytest.mark.parametrize("query", ["ADD_PARTITION", "LAUNCH", "TERMINATE", "RUNS", "TRIGGERS",
                                   "STATUS", "EVENTS"])  # fmt: skip
def test_queries_are_valid_for_the_installed_dagster(query: str) -> None:
    """The doubles here answer anything; Dagster refuses a field that it does not know."""
    from dagster_graphql.schema import create_schema
    from graphql import parse, validate

    assert validate(create_schema().graphql_schema, parse(getattr(dagster_client, query))) == []


def test_runs_of_a_release_are_asked_for_by_job_and_partition(
    dagster: DagsterDouble, client: DagsterClient
) -> None:
    """A promotion of the release is no run that makes it."""
    found = [{"runId": "b", "status": "STARTED", "creationTime": 2.0},
             {"runId": "a", "status": "SUCCESS", "creationTime": 1.0}]  # fmt: skip
    dagster.says({"runsOrError": {"__typename": "Runs", "results": found}})
    newest, oldest = client.runs("release", "m.v1")
    assert (newest.run, newest.under_way, newest.succeeded) == ("b", True, False)
    assert (oldest.run, oldest.under_way, oldest.succeeded) == ("a", False, True)
    assert oldest < newest
    assert dagster.requests[0][1]["variables"]["filter"] == {
        "pipelineName": "release", "tags": [{"key": "dagster/partition", "value": "m.v1"}]
    }  # fmt: skip


def test_refused_lists_say_why(dagster: DagsterDouble, client: DagsterClient) -> None:
    """An empty list would look like no run, and CI would launch one more."""
    refused = {"__typename": "PythonError", "message": "database is locked"}
    dagster.says({"runsOrError": refused}, {"terminateRun": refused})
    with pytest.raises(StackError, match=r"list the runs of m.v1.*database is locked"):
        client.runs("release", "m.v1")
    with pytest.raises(StackError, match=r"end the run r.*database is locked"):
        client.terminate("r")


def test_run_that_ended_meanwhile_need_not_be_ended(
    dagster: DagsterDouble, client: DagsterClient
) -> None:
    """It may end between looking and asking."""
    dagster.says({"terminateRun": {"__typename": "TerminateRunFailure", "message": "ended"}})
    client.terminate("r")


def sensor(name: str, *ticks: Mapping[str, Any], runs: tuple[Any, ...] = ()) -> dict[str, Any]:
    state = {"status": "RUNNING", "ticks": list(ticks), "runs": list(runs)}
    return {"name": name, "description": "Does it. More.", "nextTick": None, "sensorState": state}


def tick(at: float, status: str, **more: Any) -> dict[str, Any]:
    return {"timestamp": at, "status": status, "skipReason": None, "error": None, **more}


def test_triggers_show_the_newest_tick_that_ended(
    dagster: DagsterDouble, client: DagsterClient
) -> None:
    """A tick under way says nothing yet; errors are the sensor's own, not Dagster's wrapping."""
    wrapped = {
        "className": "SensorExecutionError", "message": "Error occurred during the execution",
        "cause": {"className": "TriggerError",
                  "message": "llmops_assets.errors.TriggerError: git is away. To do: wait.\n",
                  "cause": {"className": "OSError", "message": "OSError: no route"}},
    }  # fmt: skip
    run = {"runId": "r", "jobName": "release", "status": "QUEUED", "creationTime": 7.0,
           "tags": [{"key": "llmops/event", "value": "commit 01"},
                    {"key": "dagster/partition", "value": "m.g01"}]}  # fmt: skip
    dagster.says({
        "sensorsOrError": {"__typename": "Sensors", "results": [
            sensor("registry", tick(9, "STARTED"), tick(8, "SKIPPED", skipReason="nothing new")),
            sensor("git_push", tick(9, "FAILURE", error=wrapped), runs=(run,)),
            sensor("alerts", tick(9, "STARTED")),
        ]},
        "instance": {"daemonHealth": {"allDaemonStatuses": []}},
    })  # fmt: skip
    board = client.triggers()
    assert not board.daemon_runs
    assert board.heartbeat is None
    alerts, git_push, registry = board.triggers
    assert alerts.last_tick is None
    assert git_push.last_tick is not None
    assert git_push.last_tick.reason == "git is away. To do: wait."
    assert git_push.last_run is not None
    assert (git_push.last_run.event, git_push.last_run.partition) == ("commit 01", "m.g01")
    assert registry.last_tick is not None
    assert registry.last_tick.reason == "nothing new"
    assert registry.purpose == "Does it."


@pytest.mark.parametrize(
    "url", ["https://dagster.example.org", "http://localhost:3000", "http://127.9.9.9",
            "http://[::1]:3000"],
)  # fmt: skip
def test_token_may_go_where_nobody_listens(url: str) -> None:
    """Encrypted, or without leaving the machine."""
    DagsterClient(url, 1, "secret")


@pytest.mark.parametrize(
    "url", ["http://dagster.example.org", "http://10.0.0.1", "http://localhost.example.org",
            "http://127.0.0.1@example.org", "localhost:3000", ""],
)  # fmt: skip
def test_token_stays_here_where_others_listen(url: str) -> None:
    """Whoever reads it can promote."""
    with pytest.raises(StackError, match=r"not sent.*https") as caught:
        DagsterClient(url, 1, "secret")
    assert "secret" not in str(caught.value)
    DagsterClient(url, 1)


@pytest.mark.parametrize("token", ["two words", "naïve", "a\nb"])
def test_token_that_is_none_is_not_shown(token: str) -> None:
    """httpx would print it in its complaint, and CI would keep that."""
    with pytest.raises(StackError, match="cannot be sent") as caught:
        DagsterClient("https://dagster.example.org", 1, token)
    assert token not in str(caught.value)


def test_token_from_a_file_may_end_with_a_line(dagster: DagsterDouble) -> None:
    """Secret stores like to add one."""
    dagster.says({"terminateRun": {"__typename": "TerminateRunSuccess"}})
    DagsterClient(dagster.url, 5, "secret\n").terminate("r")
    assert dagster.requests[0][2]["Authorization"] == "Bearer secret"
