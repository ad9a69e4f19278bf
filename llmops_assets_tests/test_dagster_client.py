"""The client of Dagster's GraphQL: what it sends, and that every kind of refusal is explained.

Against a double of the web server; the lifecycle tests use the real one.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

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
