"""gRPC through a real Envoy: routed by a header, to real Triton and to doubles."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from llmops_assets.serving.slots import Colour, Environment

from .conftest import MODEL, Server
from .envoy_rig import GrpcUpstream, Rig, Upstream, grpc_call, rig, target, upstream

PRODUCTION = Environment.PRODUCTION
SERVICE = "/inference.GRPCInferenceService"
NAMED = {"llmops-model": "m"}
ALLOWED = [
    "ModelInfer", "ModelStreamInfer", "ModelReady", "ModelMetadata", "ModelConfig",
    "ServerLive", "ServerReady",
]  # fmt: skip
MANAGEMENT = sorted(
    set(service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name)
    - set(ALLOWED)
)


@pytest.fixture(scope="module")
def blue() -> Iterator[GrpcUpstream]:
    with GrpcUpstream.running() as server:
        yield server


@pytest.fixture(scope="module")
def green() -> Iterator[GrpcUpstream]:
    with GrpcUpstream.running() as server:
        yield server


@pytest.fixture(scope="module")
def http() -> Iterator[Upstream]:
    with upstream("http") as server:
        yield server


@pytest.fixture(scope="module")
def serving(
    tmp_path_factory: pytest.TempPathFactory,
    blue: GrpcUpstream,
    green: GrpcUpstream,
    http: Upstream,
) -> Iterator[Rig]:
    """`m`: all traffic to version 1, version 2 warm; `other`: taken off."""
    with rig(tmp_path_factory.mktemp("grpc")) as built:
        built.serve(
            "m",
            http.target(Colour.BLUE, grpc_port=blue.port),
            http.target(Colour.GREEN, grpc_port=green.port, weight=0, version=2),
        )
        built.serve("other")
        yield built


@pytest.mark.parametrize("method", ALLOWED)
def test_listed_calls_reach_the_slot_of_the_header(
    serving: Rig, blue: GrpcUpstream, green: GrpcUpstream, method: str
) -> None:
    """Clients of gRPC get what those of HTTP get, and may pin a version too."""
    port = serving.ports[PRODUCTION]
    before = len(blue.seen), len(green.seen)
    status, details, answer = grpc_call(port, f"{SERVICE}/{method}", b"body", NAMED)
    assert (status, answer) == (grpc.StatusCode.OK, b"body"), details
    pinned = {**NAMED, "llmops-version": "2"}
    assert grpc_call(port, f"{SERVICE}/{method}", b"", pinned)[0] is grpc.StatusCode.OK
    assert blue.seen[before[0] :] == green.seen[before[1] :] == [f"{SERVICE}/{method}"]


def test_there_are_management_calls() -> None:
    """The list of what must not pass is Triton's own; an empty one would prove nothing."""
    assert {"RepositoryModelLoad", "SystemSharedMemoryRegister", "TraceSetting"} <= set(MANAGEMENT)


@pytest.mark.parametrize(
    "method",
    [
        *(f"{SERVICE}/{method}" for method in MANAGEMENT),
        f"{SERVICE}/modelinfer",
        f"{SERVICE}/ModelInfer/",
        f"{SERVICE}/ModelInfer/../RepositoryModelLoad",
        f"{SERVICE}/%52epositoryModelLoad",
        f"{SERVICE}//RepositoryModelLoad",
        f"{SERVICE}%2fRepositoryModelLoad",
        "/inference.grpcinferenceservice/ModelInfer",
        "/inference.GRPCInferenceService2/ModelInfer",
        "/inference.Other/ModelInfer",
        "/grpc.health.v1.Health/Check",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/v2/repository/index",
        "/v2/models/m/../../repository/index",
    ],
)
def test_no_other_method_reaches_a_slot(
    serving: Rig, blue: GrpcUpstream, green: GrpcUpstream, http: Upstream, method: str
) -> None:
    """Triton's management is a method of the very same service."""
    before = blue.seen + green.seen
    seen = list(http.seen)
    status, _, _ = grpc_call(serving.ports[PRODUCTION], method, b"", NAMED)
    assert status in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED,
                      grpc.StatusCode.INTERNAL)  # fmt: skip
    assert blue.seen + green.seen == before
    assert http.seen == seen


def test_call_in_other_clothes_is_none(serving: Rig) -> None:
    """What is not gRPC would reach a server that speaks nothing else."""
    answer = serving.request(
        "POST", f"{SERVICE}/ModelInfer", {**NAMED, "content-type": "text/json"}
    )
    assert answer.status_code == 403
    assert "ModelInfer" in answer.json()["error"]


@pytest.mark.parametrize(
    ("metadata", "status", "words"),
    [
        ({}, grpc.StatusCode.PERMISSION_DENIED, "llmops-model"),
        ({"llmops-model": "unknown"}, grpc.StatusCode.UNIMPLEMENTED, "no such model"),
        ({"llmops-model": "M"}, grpc.StatusCode.UNIMPLEMENTED, "no such model"),
        ({"llmops-model": "m,m"}, grpc.StatusCode.UNIMPLEMENTED, "no such model"),
        ({**NAMED, "llmops-version": "3"}, grpc.StatusCode.UNIMPLEMENTED, "loaded: 1, 2"),
        ({"llmops-model": "other"}, grpc.StatusCode.UNAVAILABLE, "no version of other"),
    ],
)
def test_call_without_a_slot_is_told_why(
    serving: Rig, metadata: dict[str, str], status: grpc.StatusCode, words: str
) -> None:
    """A client of gRPC sees status and message only."""
    got = grpc_call(serving.ports[PRODUCTION], f"{SERVICE}/ModelInfer", b"", metadata)
    assert got[0] is status
    assert words in got[1]


def test_stream_is_passed_message_by_message(serving: Rig) -> None:
    """Were its requests collected first, no answer could come before the last of them."""
    with grpc.insecure_channel(f"127.0.0.1:{serving.ports[PRODUCTION]}") as channel:
        got: list[bytes] = []

        def requests() -> Iterator[bytes]:
            for number in range(3):
                assert len(got) == number
                yield b"%d" % number
                while len(got) <= number:
                    pass

        method = channel.stream_stream(f"{SERVICE}/ModelStreamInfer")
        for answer in method(requests(), metadata=tuple(NAMED.items()), timeout=10):
            got.append(answer)
    assert got == [b"0", b"1", b"2"]


@pytest.mark.parametrize(
    ("method", "call", "status"),
    [("ModelInfer", "ModelInfer", 0), ("RepositoryIndex", None, 7)],
)
def test_access_log_has_the_status_of_grpc(
    serving: Rig, blue: GrpcUpstream, method: str, call: str | None, status: int
) -> None:
    """gRPC fails with a 200: only its own status tells."""
    path = f"{SERVICE}/{method}"
    grpc_call(serving.ports[PRODUCTION], path, b"body", NAMED)
    entry = serving.logged(path=path, protocol="HTTP/2", pinned=False if call else None)
    assert (entry.call, entry.status, entry.grpc_status) == (call, 200, status)
    passed = call is not None
    assert entry.cluster == ("production/m/1/blue/grpc" if passed else None)
    assert entry.slot == ("production/m/1/blue" if passed else None)
    assert entry.model == "m"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[Rig]:
    """The gateway before a real Triton with version 7 of one model."""
    where = target(server.endpoint.http_port, Colour.BLUE, version=server.version,
                   grpc_port=server.endpoint.grpc_port)  # fmt: skip
    with rig(tmp_path_factory.mktemp("real")) as built:
        built.serve(MODEL, where)
        yield built


def _inputs() -> list[triton_grpc.InferInput]:
    prompt = triton_grpc.InferInput("text_input", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([b"3 mars"], dtype=np.object_))
    tokens = triton_grpc.InferInput("max_tokens", [1], "INT32")
    tokens.set_data_from_numpy(np.array([2], dtype=np.int32))
    return [prompt, tokens]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("model", "version", "answered"),
    [
        (MODEL, "", True),
        (MODEL, "7", True),
        (MODEL, "1", False),
        (MODEL, "-1", False),
        (MODEL, "07", True),  # the number is what counts
        ("another", "", False),
        ("", "", False),
        (MODEL.upper(), "", False),
        (f"../{MODEL}", "", False),
        (f"{MODEL}/versions/7", "", False),
    ],
)
def test_message_that_names_something_else_is_refused_by_the_slot(
    real: Rig, server: Server, model: str, version: str, answered: bool
) -> None:
    """The gateway cannot read the message: the header decides, and the slot has one model."""
    outcomes: list[object] = []
    headers = {"llmops-model": MODEL}
    with triton_grpc.InferenceServerClient(f"127.0.0.1:{real.ports[PRODUCTION]}") as client:
        client.start_stream(lambda result, error: outcomes.append(error or result), headers=headers)
        client.async_stream_infer(model, _inputs(), model_version=version)
        client.stop_stream()
        (outcome,) = outcomes[:1]
        served = not isinstance(outcome, InferenceServerException)
        if served:
            assert isinstance(outcome, triton_grpc.InferResult)
            response = outcome.get_response()
            assert (response.model_name, response.model_version) == (MODEL, "7")
        assert served is answered
        try:
            client.get_model_metadata(model, version, headers=headers)
            known = True
        except InferenceServerException:
            known = False
        assert known is answered
