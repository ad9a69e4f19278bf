"""How a Triton server with TensorRT-LLM is started: leader and orchestrator mode.

*Leader*: one tritonserver per rank under mpirun; ranks above 0 load the engine only and take
no requests. *Orchestrator*: one tritonserver, whose backend starts a worker per rank itself,
on one node; needed as soon as a server holds several engines. (tensorrtllm_backend, README.md
and docs/llama_multi_instance.md.)

NVIDIA's `launch_triton_server.py` returns at once and leaves the server behind, so nobody
could stop it with what started it. These are its commands, to be kept in the foreground.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from llmops_assets.errors import ToolchainError
from llmops_assets.toolchains.tensorrt_llm.model_yaml import PACKAGE_MOUNT
from llmops_assets.toolchains.tensorrt_llm.packaging import REPOSITORY

Mode = Literal["leader", "orchestrator"]

TRITONSERVER = "/opt/tritonserver/bin/tritonserver"
ENGINE_MODEL = "tensorrt_llm"
# The model tensorrt_llm_bls asks for configurations at localhost:8001, whatever the options
# of the server say (its 1/model.py), so with another gRPC port it does not answer.
GRPC_PORT_OF_BLS = 8001


@dataclass(frozen=True)
class ServerCommand:
    """What starts a server; it ends when the command does."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]


def choose_mode(engines: Sequence[str], wanted: Mode | None = None) -> Mode:
    """The mode for a server with these engines.

    Args:
        engines: names of the server's `tensorrtllm` models.
        wanted: a mode that was asked for; None for the one that fits.

    Raises:
        ToolchainError: two engines have one name, or leader mode is wanted for several.
    """
    twice = [name for name, count in Counter(engines).items() if count > 1]
    if twice or not engines:
        raise ToolchainError(
            "A server needs engines with names of their own",
            expected="one engine or more, each with another name",
            found=", ".join(engines) or "none",
            cure="rename one of the models",
        )
    if wanted == "leader" and len(engines) > 1:
        raise ToolchainError(
            "Leader mode serves one engine",
            expected="one engine, or orchestrator mode",
            found=", ".join(engines),
            cure="start a server per engine, or choose orchestrator mode with gpu_device_ids",
        )
    return wanted or ("leader" if len(engines) == 1 else "orchestrator")


def engine_server(
    mode: Mode, world_size: int, *, http_port: int, metrics_port: int
) -> ServerCommand:
    """The command that serves an engine's package from its mount.

    Args:
        mode: from `choose_mode`.
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
    if mode == "orchestrator":
        return ServerCommand(
            arguments=(
                "mpirun", "--allow-run-as-root", "-n", "1", TRITONSERVER, *options,
                "--backend-config=python,shm-region-prefix-name=prefix0_",
            ),
            environment={"TRTLLM_ORCHESTRATOR": "1", "TRTLLM_ORCHESTRATOR_SPAWN_PROCESSES": "1"},
        )  # fmt: skip
    arguments = ["mpirun", "--allow-run-as-root"]
    for rank in range(world_size):
        arguments += ["-n", "1", TRITONSERVER, *options]
        if rank > 0:
            arguments += ["--model-control-mode=explicit", f"--load-model={ENGINE_MODEL}"]
        # Ranks on one host would share the Python models' shared memory otherwise.
        arguments += [f"--backend-config=python,shm-region-prefix-name=prefix{rank}_", ":"]
    return ServerCommand(arguments=tuple(arguments[:-1]), environment={})


def llmapi_server(*, http_port: int, grpc_port: int, metrics_port: int) -> ServerCommand:
    """The command that serves an `llmapi` package from its mount.

    One tritonserver: the LLM API starts a worker per rank itself. Automatic completion stays
    on, as it is how the model's `model.yaml` switches streaming on.
    """
    return ServerCommand(
        arguments=(
            TRITONSERVER,
            f"--model-repository={PACKAGE_MOUNT / REPOSITORY}",
            f"--grpc-port={grpc_port}",
            f"--http-port={http_port}",
            f"--metrics-port={metrics_port}",
        ),
        environment={},
    )
