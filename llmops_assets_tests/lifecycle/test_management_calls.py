"""Who can reach the gateway must not reach Triton's management."""

from __future__ import annotations

import socket

import pytest

from llmops_assets.local import stack
from llmops_assets_tests.lifecycle.conftest import FirstRelease
from llmops_assets_tests.lifecycle.stack_user import ANSWER, MODEL, StackUser

SPELLINGS = (
    f"/v2/repository/models/{MODEL}/load",
    f"/v2/repository/models/{MODEL}/unload",
    "/v2/repository/index",
    f"/v2/models/{MODEL}/../../repository/models/{MODEL}/unload",
    f"/v2/models/{MODEL}/%2e%2e/%2e%2e/repository/models/{MODEL}/unload",
    f"/v2/models/{MODEL}/infer/../../../repository/index",
    f"/v2/models/{MODEL}%2F..%2F..%2Frepository%2Findex",
    f"/v2/models/{MODEL}\\..\\..\\repository\\index",
    "//v2//repository//index",
    "/v2/systemsharedmemory/status",
    "/v2/trace/setting",
    "/v2/logging",
)
FROM_A_SLOT = b"x-llmops-release:"
"""Header that the gateway adds to what a slot answers."""


@pytest.mark.parametrize("path", SPELLINGS)
@pytest.mark.parametrize("environment", ["production", "staging"])
def test_management_calls_are_refused(
    user: StackUser, first_release: FirstRelease, path: str, environment: str
) -> None:
    """`…/../repository/…` reached Triton through a gateway that compared only prefixes."""
    where = stack.endpoints(user.settings)
    url = where.gateway_url if environment == "production" else where.staging_gateway_url
    answer = _raw_post(int(url.rpartition(":")[2]), path)
    assert int(answer.split(b" ", 2)[1]) in (400, 403, 404), answer
    # Triton refuses such calls as well, as a second lock; they must not get so far.
    assert FROM_A_SLOT not in answer.lower(), answer
    assert user.ask()["text_output"] == ANSWER


def test_an_ordinary_call_is_answered_by_a_slot(
    user: StackUser, first_release: FirstRelease
) -> None:
    """Otherwise a gateway that refuses everything would pass the test above."""
    port = int(user.gateway_url.rpartition(":")[2])
    answer = _raw_post(port, f"/v2/models/{MODEL}/generate")
    assert FROM_A_SLOT in answer.lower(), answer


def _raw_post(port: int, path: str) -> bytes:
    """Sends the path as it is: client libraries tidy it. Returns the answer's beginning."""
    request = f"POST {path} HTTP/1.1\r\nHost: gateway\r\nContent-Length: 2\r\n\r\n{{}}".encode()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.settimeout(10)
        connection.sendall(request)
        return connection.recv(4096)
