"""How a server with TensorRT-LLM would be started; the commands are NVIDIA's."""

from __future__ import annotations

from collections.abc import Sequence

from llmops_assets.toolchains.tensorrt_llm.server import engine_server, llmapi_server


def ranks(command: Sequence[str]) -> list[list[str]]:
    """The arguments of each tritonserver of an mpirun command."""
    assert command[:2] == ["mpirun", "--allow-run-as-root"]
    found: list[list[str]] = [[]]
    for argument in command[2:]:
        if argument == ":":
            found.append([])
        else:
            found[-1].append(argument)
    return found


def test_every_rank_has_a_server() -> None:
    """Ranks above 0 load the engine only: the rest of the repository is rank 0's."""
    servers = ranks(engine_server(4, http_port=8000, metrics_port=8002))
    assert len(servers) == 4
    for number, server in enumerate(servers):
        assert server[:3] == ["-n", "1", "/opt/tritonserver/bin/tritonserver"]
        assert "--model-repository=/opt/llmops/package/repository" in server
        assert f"--backend-config=python,shm-region-prefix-name=prefix{number}_" in server
        explicit = {"--model-control-mode=explicit", "--load-model=tensorrt_llm"}
        assert explicit & set(server) == (explicit if number else set())


def test_server_of_an_engine_completes_nothing_and_answers_bls() -> None:
    """tensorrt_llm_bls asks localhost:8001 and nothing else."""
    (server,) = ranks(engine_server(1, http_port=18000, metrics_port=18002))
    assert {"--grpc-port=8001", "--http-port=18000", "--metrics-port=18002"} <= set(server)
    assert "--disable-auto-complete-config" in server


def test_llmapi_server_completes_its_configuration() -> None:
    """Only so does model.yaml switch streaming on."""
    command = llmapi_server(http_port=1, grpc_port=2, metrics_port=3)
    assert "--disable-auto-complete-config" not in command
    assert {"--http-port=1", "--grpc-port=2", "--metrics-port=3"} <= set(command)
