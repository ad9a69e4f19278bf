"""The commands that start servers, as NVIDIA's own launcher composes them."""

from __future__ import annotations

import pytest

from llmops_assets.errors import ToolchainError
from llmops_assets.toolchains.tensorrt_llm.server import (
    Mode,
    ServerCommand,
    choose_mode,
    engine_server,
    llmapi_server,
)


def ranks(command: ServerCommand) -> list[list[str]]:
    """The arguments of each tritonserver of an mpirun command."""
    assert command.arguments[:2] == ("mpirun", "--allow-run-as-root")
    found: list[list[str]] = [[]]
    for argument in command.arguments[2:]:
        if argument == ":":
            found.append([])
        else:
            found[-1].append(argument)
    return found


def test_leader_mode_has_one_server_per_rank() -> None:
    """Ranks above 0 load the engine only: the rest of the repository is rank 0's."""
    command = engine_server("leader", 4, http_port=8000, metrics_port=8002)
    servers = ranks(command)
    assert len(servers) == 4
    for number, server in enumerate(servers):
        assert server[:3] == ["-n", "1", "/opt/tritonserver/bin/tritonserver"]
        assert "--model-repository=/opt/llmops/package/repository" in server
        assert f"--backend-config=python,shm-region-prefix-name=prefix{number}_" in server
        explicit = {"--model-control-mode=explicit", "--load-model=tensorrt_llm"}
        assert explicit & set(server) == (explicit if number else set())
    assert not command.environment


def test_orchestrator_mode_has_one_server() -> None:
    """It starts the workers itself, which takes an environment variable and no second rank."""
    command = engine_server("orchestrator", 4, http_port=8000, metrics_port=8002)
    assert len(ranks(command)) == 1
    assert command.environment["TRTLLM_ORCHESTRATOR"] == "1"
    assert command.environment["TRTLLM_ORCHESTRATOR_SPAWN_PROCESSES"] == "1"


@pytest.mark.parametrize("mode", ["leader", "orchestrator"])
def test_server_of_an_engine_completes_nothing_and_answers_bls(mode: Mode) -> None:
    """tensorrt_llm_bls asks localhost:8001 and nothing else."""
    (server, *_) = ranks(engine_server(mode, 1, http_port=18000, metrics_port=18002))
    assert {"--grpc-port=8001", "--http-port=18000", "--metrics-port=18002"} <= set(server)
    assert "--disable-auto-complete-config" in server


def test_llmapi_server_completes_its_configuration() -> None:
    """Only so does model.yaml switch streaming on."""
    command = llmapi_server(http_port=1, grpc_port=2, metrics_port=3)
    assert "--disable-auto-complete-config" not in command.arguments
    assert {"--http-port=1", "--grpc-port=2", "--metrics-port=3"} <= set(command.arguments)


def test_mode_follows_the_number_of_engines() -> None:
    """tensorrtllm_backend#714, TensorRT-LLM#984: several engines need the orchestrator."""
    assert choose_mode(["tensorrt_llm"]) == "leader"
    assert choose_mode(["tensorrt_llm"], "orchestrator") == "orchestrator"
    assert choose_mode(["first", "second"]) == "orchestrator"


@pytest.mark.parametrize(
    ("engines", "wanted", "problem"),
    [
        (["first", "second"], "leader", "Leader mode serves one engine"),
        (["same", "same"], None, "names of their own"),
        ([], None, "names of their own"),
    ],
)
def test_mode_is_refused(engines: list[str], wanted: Mode | None, problem: str) -> None:
    """Two engines of one name would be one model; leader mode would serve one of several."""
    with pytest.raises(ToolchainError, match=problem):
        choose_mode(engines, wanted)
