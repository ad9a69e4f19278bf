"""Whether a built engine can run where it is to serve, and a server of it what it must.

Each rule is one that TensorRT-LLM or TensorRT enforces only when the engine loads, on a GPU
and minutes after the start, often with a message about something else. `check_engine` asks
before a slot is filled: the gate on engines by what the spec says of the servers, and slots
that run TensorRT-LLM by what they are. `check_engine_server` asks a server that has answered.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmops_assets.errors import ToolchainError
from llmops_assets.spec import TensorRTLLMEngine
from llmops_assets.toolchains.tensorrt_llm.containers import (
    Backend,
    check_backend,
    known_container,
)
from llmops_assets.toolchains.tensorrt_llm.gpus import GPUS
from llmops_assets.toolchains.tensorrt_llm.outputs import EngineConfig
from llmops_assets.toolchains.tensorrt_llm.packaging import ENGINE, ENGINE_MODEL
from llmops_assets.toolchains.tensorrt_llm.sidecar import Sidecar

REBUILD = "build the engine again, in the image and on the GPU model that serve it"
KV_CACHE_METRIC = "nv_trt_llm_kv_cache_block_metrics"
KV_CACHE_LABEL = "kv_cache_block_type"


@dataclass(frozen=True)
class BuiltEngine:
    """What an engine was built with."""

    tensorrt_llm: str
    tensorrt: str | None
    """None if the image that built it had none, as it cannot have built an engine."""
    architecture: str
    """Such as `sm_90`."""
    image_digest: str
    """Of the image that built it, `sha256:…`."""
    world_size: int
    """Ranks: tensor, pipeline and context parallelism multiplied."""
    backend: Backend = "engine"

    @classmethod
    def of(cls, config: EngineConfig, sidecar: Sidecar) -> BuiltEngine:
        """From what `sidecar.open_engine` gives for a whole engine directory."""
        return cls(
            tensorrt_llm=config.version,
            tensorrt=sidecar.toolkit.tensorrt,
            architecture=sidecar.target.architecture,
            image_digest=sidecar.toolkit.image_digest,
            world_size=config.pretrained_config.mapping.world_size,
        )


@dataclass(frozen=True)
class Node:
    """Where a server will run: its image and what it gets of the machine."""

    image: str
    """Name and tag of the image that the server starts from."""
    image_digest: str | None
    """`sha256:…`; None where nobody fixed it."""
    tensorrt_llm: str
    """Version in the image."""
    tensorrt: str | None
    """Version in the image; None where it is not known, or there is none."""
    architecture: str
    """Of its GPUs, such as `sm_90`."""
    gpus: int
    """GPUs that the server gets, not those of the whole machine."""

    @classmethod
    def of(cls, engine: TensorRTLLMEngine) -> Node:
        """What a spec's engine section says of the servers."""
        image, _, digest = engine.image.partition("@")
        container = known_container(engine.image)
        return cls(
            image=image,
            image_digest=digest or None,
            tensorrt_llm=engine.version,
            tensorrt=None if container is None else container.tensorrt,
            architecture=GPUS[engine.gpu].architecture,
            gpus=engine.parallelism.world_size,
        )


@dataclass(frozen=True)
class KeyValueCache:
    """The paged KV cache of a loaded engine."""

    blocks: int
    tokens_per_block: int

    @property
    def tokens(self) -> int:
        return self.blocks * self.tokens_per_block


def check_engine(engine: BuiltEngine, node: Node) -> None:
    """Checks everything that is known before a server starts.

    Raises:
        ToolchainError: see the checks below.
    """
    check_serving_image(engine, node)
    check_compute_capability(engine, node)
    check_world_size(engine, node)


def check_serving_image(engine: BuiltEngine, node: Node) -> None:
    """Checks that the image that serves holds the versions that built the engine.

    An engine states its TensorRT-LLM version and is refused by any other (`expecting library
    version X got Y, please rebuild`); TensorRT's serialised format likewise (`Version tag does
    not match`).

    Raises:
        ToolchainError: a version or the image's digest differs, or the image cannot serve
            engines at all.
    """
    check_backend(engine.backend, node.tensorrt_llm)
    for what, wanted, found in (
        ("TensorRT-LLM", node.tensorrt_llm, engine.tensorrt_llm),
        ("TensorRT", node.tensorrt, engine.tensorrt),
    ):
        if wanted is not None and found != wanted:
            raise ToolchainError(
                f"The engine was built by another {what} than the one that would serve it",
                expected=f"{what} {wanted}, as in {node.image}",
                found=found,
                cure=REBUILD,
            )
    if node.image_digest is not None and engine.image_digest != node.image_digest:
        raise ToolchainError(
            "The engine was built in another image than the one that would serve it",
            expected=node.image_digest,
            found=engine.image_digest,
            cure="serve it from the image that built it, or " + REBUILD,
        )


def check_compute_capability(engine: BuiltEngine, node: Node) -> None:
    """Checks that the engine was built for the node's GPUs.

    Engines are not portable across compute capabilities by design (`generated on an
    incompatible device, expecting compute X got compute Y`), and no flag of trtllm-build
    changes the target.

    Raises:
        ToolchainError: they differ.
    """
    if engine.architecture != node.architecture:
        raise ToolchainError(
            "The engine was built for other GPUs",
            expected=f"{node.architecture}, as on the node",
            found=engine.architecture,
            cure=REBUILD,
        )


def check_world_size(engine: BuiltEngine, node: Node) -> None:
    """Checks that there is one GPU for every rank; that every rank has its file,
    `sidecar.open_engine` checks.

    A runtime with another world size fails (`Engine world size (2 * 1) != Runtime world size
    (1)`).

    Raises:
        ToolchainError: there are more GPUs or fewer.
    """
    if node.gpus != engine.world_size:
        raise ToolchainError(
            "The server gets another number of GPUs than the engine was built for",
            expected=f"{engine.world_size} GPUs, one per rank",
            found=node.gpus,
            cure=f"give the server {engine.world_size} GPUs, or build with another parallelism",
        )


def check_engine_server(package: Path, metrics: str) -> None:
    """Checks that a server of an engine's package has room for the longest request.

    Called by the smoke of a deployment, once the server has answered: it counts its KV cache
    from the first request on.

    Args:
        package: the directory of what it serves.
        metrics: text of the server's `/metrics`.

    Raises:
        ToolchainError: its KV cache holds fewer tokens, or it says nothing of it.
    """
    config = EngineConfig.model_validate_json((package / ENGINE / "config.json").read_bytes())
    check_key_value_cache(
        read_key_value_cache(metrics, ENGINE_MODEL), config.build_config.max_seq_len
    )


def check_key_value_cache(cache: KeyValueCache, max_seq_len: int) -> None:
    """Checks that the KV cache holds the longest sequence that the engine takes.

    TensorRT-LLM refuses to start below that (`maxTokensInPagedKvCache (…) must be large
    enough`); what is left for the cache under Triton depends on what else is in GPU memory, so
    a server that started once may have less the next time.

    Args:
        cache: as `read_key_value_cache` found it.
        max_seq_len: longest prompt and answer together, tokens.

    Raises:
        ToolchainError: it holds fewer tokens.
    """
    if cache.tokens < max_seq_len:
        raise ToolchainError(
            "The KV cache is too small for the longest requests",
            expected=f"at least {max_seq_len} tokens",
            found=f"{cache.blocks} blocks of {cache.tokens_per_block} tokens, {cache.tokens} "
            "tokens",
            cure="lower the engine's sequence length or its constraints, quantise the KV cache, "
            "use more GPUs, or end what else is in GPU memory",
        )


def read_key_value_cache(metrics: str, model: str) -> KeyValueCache:
    """The KV cache of a model in a running Triton server.

    Args:
        metrics: text of the server's `/metrics`.
        model: the model's name in the server, such as `tensorrt_llm`.

    Raises:
        ToolchainError: the server reports none for this model.
    """
    from prometheus_client.parser import text_string_to_metric_families

    found = {
        sample.labels.get(KV_CACHE_LABEL): int(sample.value)
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.name == KV_CACHE_METRIC and sample.labels.get("model") == model
    }
    try:
        return KeyValueCache(blocks=found["max"], tokens_per_block=found["tokens_per"])
    except KeyError as error:
        raise ToolchainError(
            f"The server says nothing of the KV cache of {model}",
            expected=f"{KV_CACHE_METRIC} with {KV_CACHE_LABEL} max and tokens_per",
            found=", ".join(str(label) for label in found) or "no such metric",
            cure="ask the server once the model is ready; metrics must not be switched off",
        ) from error


def check_memory_released(before: int, after: int, tolerance: int = 2**28) -> None:
    """Checks that a server that ended, or failed to load, left GPU memory as it found it.

    Triton keeps memory after unloading and after a failed load, which the next engine then
    lacks. Only the end of the process frees it. Called by slots that run TensorRT-LLM, after
    they stopped a server.

    Args:
        before: bytes of GPU memory in use before the server started.
        after: bytes in use now.
        tolerance: bytes that may remain, as contexts of other processes vary.

    Raises:
        ToolchainError: more is in use.
    """
    if after - before > tolerance:
        raise ToolchainError(
            "GPU memory is still held by a server that has ended or failed",
            expected=f"at most {before + tolerance} bytes in use",
            found=f"{after} bytes",
            cure="stop every process of that server, its workers too, before the next one starts",
        )
