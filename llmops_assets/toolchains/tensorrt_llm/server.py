"""How a Triton server with TensorRT-LLM is started from a package at its mount.

For slots that run TensorRT-LLM, each of which is one server with one package: `world_size`
and `backend` are in its `package.json`. Several engines in one server would need NVIDIA's
orchestrator mode; a slot never has them.

NVIDIA's `launch_triton_server.py` returns at once and leaves the server behind, so nobody
could stop it with what started it. These are its commands (tensorrtllm_backend, README.md),
to be kept in the foreground: the server ends when the command does.
"""

from __future__ import annotations

from llmops_assets.toolchains.tensorrt_llm.model_yaml import PACKAGE_MOUNT
from llmops_assets.toolchains.tensorrt_llm.packaging import ENGINE_MODEL, REPOSITORY

TRITONSERVER = "/opt/tritonserver/bin/tritonserver"
# The model tensorrt_llm_bls asks for configurations at localhost:8001, whatever the options
# of the server say (its 1/model.py), so with another gRPC port it does not answer.
GRPC_PORT_OF_BLS = 8001


def engine_server(world_size: int, *, http_port: int, metrics_port: int) -> list[str]:
    """The command that serves an engine's package: leader mode, a tritonserver per rank.

    Ranks above 0 load the engine only and take no requests.

    Args:
        world_size: of the engine.
        http_port: for requests.
        metrics_port: for `/metrics`.
    """
    options = [
        f"--model-repository={PACKAGE_MOUNT / REPOSITORY}",
        f"--grpc-port={GRPC_PORT_OF_BLS}",
        f"--http-port={http_port}",
        f"--metrics-port={metrics_port}",
        # The templates are complete, and guesses about them have been wrong.
        "--disable-auto-complete-config",
    ]
    command = ["mpirun", "--allow-run-as-root"]
    for rank in range(world_size):
        command += ["-n", "1", TRITONSERVER, *options]
        if rank > 0:
            command += ["--model-control-mode=explicit", f"--load-model={ENGINE_MODEL}"]
        # Ranks on one host would share the Python models' shared memory otherwise.
        command += [f"--backend-config=python,shm-region-prefix-name=prefix{rank}_", ":"]
    return command[:-1]


def llmapi_server(*, http_port: int, grpc_port: int, metrics_port: int) -> list[str]:
    """The command that serves an `llmapi` package.

    One tritonserver: the LLM API starts a worker per rank itself. Automatic completion stays
    on, as it is how the model's `model.yaml` switches streaming on.
    """
    return [
        TRITONSERVER,
        f"--model-repository={PACKAGE_MOUNT / REPOSITORY}",
        f"--grpc-port={grpc_port}",
        f"--http-port={http_port}",
        f"--metrics-port={metrics_port}",
    ]
