"""The model spec: the one file a team writes for a model, `models/<name>.yaml`.

Each asset reads only its own section, so that a change of one section costs only what
depends on it. `llmops spec schema` prints the JSON Schema for editors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import yaml
from cronsim import CronSim, CronSimError
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from llmops_assets.compliance.model_card import ModelCard
from llmops_assets.errors import SpecError
from llmops_assets.release import MODEL_NAME
from llmops_assets.toolchains.tensorrt_llm.combinations import refusals
from llmops_assets.toolchains.tensorrt_llm.containers import PINNED_IMAGE, PINNED_TENSORRT_LLM
from llmops_assets.toolchains.tensorrt_llm.families import FamilyName
from llmops_assets.toolchains.tensorrt_llm.flags import DType
from llmops_assets.toolchains.tensorrt_llm.gpus import GPUName
from llmops_assets.toolchains.tensorrt_llm.quantizations import KeyValueType, Quantization
from llmops_assets.toolchains.tensorrt_llm.templates import INNER_MODELS

_CLoader: Any = getattr(yaml, "CSafeLoader", None)
"""The loader on libyaml; None where PyYAML was built without it."""
C_LOADER_INDICATORS = 5000

Ratio = Annotated[float, Field(ge=0)]
"""A share of 1. Thresholds above 1 are allowed: they are one way to say "never"."""

Duration = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(ms|s|m|h)$")]
"""Such as `90s`, `10m` or `1.5h`."""


def duration_seconds(duration: Duration) -> float:
    """A duration of a spec, seconds."""
    unit = duration.lstrip("0123456789.")
    return float(duration.removesuffix(unit)) * {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}[unit]


class Section(BaseModel):
    """Base of all parts of a spec: unknown keys are errors, values do not change."""

    # Infinity and NaN have no JSON, and a threshold of either would judge nothing.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Constraints(Section):
    """What the use case needs, whatever model fills it."""

    max_input_tokens: int = Field(ge=1, description="Longest prompt that is answered, tokens.")
    max_output_tokens: int = Field(ge=1, description="Longest answer, tokens.")


class Architecture(Section):
    """Shape of a Llama that is trained from nothing (transformers' `LlamaConfig`)."""

    hidden_size: int = Field(default=128, ge=8)
    intermediate_size: int = Field(default=352, ge=8)
    layers: int = Field(default=3, ge=1)
    heads: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _heads_divide(self) -> Architecture:
        if self.hidden_size % (2 * self.heads):
            raise ValueError("hidden_size must be a multiple of 2 * heads (rotary embeddings)")
        return self


class TrainedWeights(Section):
    """Weights trained by this platform on the spec's training data."""

    source: Literal["train"]
    architecture: Architecture = Architecture()
    steps: int = Field(default=900, ge=1, description="Optimiser steps.")
    batch_size: int = Field(default=64, ge=1, description="Rows per step.")
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    seed: int = Field(default=0, ge=0)


class ImportedWeights(Section):
    """Weights from a local Hugging Face directory, taken as they are."""

    source: Literal["path"]
    path: Path = Field(description="Hugging Face directory; relative to the repository's root.")


class MLflowWeights(Section):
    """Weights of a version in MLflow's model registry, taken as they are."""

    source: Literal["mlflow"]
    model: str | None = Field(
        default=None, min_length=1, description="Registered model; unset: of the spec's name."
    )
    version: int = Field(ge=1)


class HuggingFaceWeights(Section):
    """Weights from the Hugging Face Hub, taken as they are."""

    source: Literal["huggingface"]
    repository: str = Field(
        pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$", description="As organisation/name."
    )
    revision: str = Field(
        pattern=r"^[0-9a-f]{40}$", description="Full commit hash; a branch or tag may move."
    )


class CommandWeights(Section):
    """Weights by any trainer that writes a Hugging Face directory, such as NeMo's."""

    source: Literal["command"]
    command: tuple[str, ...] = Field(
        min_length=1,
        description="Program and arguments, run at the repository's root. {training_data} is "
        "the Parquet file with the rows, {output} the directory to write, {work} a directory "
        "that is kept when the trainer is killed and tried again.",
    )
    code: tuple[Path, ...] = Field(
        min_length=1,
        description="Files and folders that it runs, relative to the repository's root; a "
        "change of them trains again.",
    )
    environment: tuple[str, ...] = Field(
        default=(),
        description="Names of environment variables that it is given; none of the platform's own.",
    )

    @field_validator("environment")
    @classmethod
    def _not_the_platforms(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if own := [name for name in names if name.upper().startswith(PLATFORM_VARIABLES)]:
            raise ValueError(f"{', '.join(own)} is for the platform alone")
        return names

    @field_validator("command")
    @classmethod
    def _known_placeholders(cls, command: tuple[str, ...]) -> tuple[str, ...]:
        used = {name for part in command for name in re.findall(r"\{(\w*)\}", part)}
        if unknown := used - set(TRAINER_PLACEHOLDERS):
            raise ValueError(f"unknown placeholders {sorted(unknown)}")
        if "output" not in used:
            raise ValueError("must name {output}, the directory to write")
        return command


PLATFORM_VARIABLES = ("LLMOPS_", "DAGSTER_", "MLFLOW_")
TRAINER_PLACEHOLDERS = ("training_data", "output", "work")
Weights = Annotated[
    TrainedWeights | ImportedWeights | MLflowWeights | HuggingFaceWeights | CommandWeights,
    Field(discriminator="source"),
]


class Split(Section):
    """One split of generated data."""

    rows: int = Field(ge=1)
    seed: int = Field(ge=0)


class GeneratedDates(Section):
    """The example's data: dates as people write them, rendered from CLDR by Babel."""

    license: ClassVar[str] = "Unicode-3.0"
    provenance: ClassVar[str] = "Rendered by Babel from the Unicode CLDR; no person's data."

    source: Literal["dates"]
    locales: tuple[str, ...] = Field(min_length=1, description="CLDR locales, such as en or fr.")
    training: Split
    evaluation: Split


class DataFiles(Section):
    """Data from Parquet or JSON Lines files with columns `prompt`, `completion` and `slice`."""

    source: Literal["files"]
    training: Path
    evaluation: Path
    license: str = Field(default="", description="SPDX expression of the rows' licence.")
    provenance: str = Field(
        default="", description="Where the rows come from, and why they may be used."
    )


Data = Annotated[GeneratedDates | DataFiles, Field(discriminator="source")]


class OnnxRuntimeGenAIEngine(Section):
    """An engine for the CPU, by ONNX Runtime GenAI."""

    toolchain: Literal["onnxruntime_genai"]
    precision: Literal["int4", "int8", "fp32"] = "int8"
    block_size: Literal[16, 32, 64, 128] = Field(
        default=32, description="Weights that share one scale; not for fp32."
    )

    @property
    def quantised(self) -> bool:
        """Whether its weights are not those of the checkpoint."""
        return self.precision != "fp32"


class Parallelism(Section):
    """Over how many GPUs a model is spread, and how."""

    tensor: int = Field(default=1, ge=1, description="Ways that every layer is split.")
    pipeline: int = Field(default=1, ge=1, description="Ways that the layers are dealt out.")
    context: int = Field(default=1, ge=1, description="Ways that a prompt is split.")
    expert: int = Field(
        default=1,
        ge=1,
        description="Of the tensor ways, how many deal out whole experts; it divides `tensor`.",
    )

    @property
    def world_size(self) -> int:
        """GPUs, and files of the engine: one rank each."""
        return self.tensor * self.pipeline * self.context


class Calibration(Section):
    """Local data on which a quantisation's scales are measured; never downloaded."""

    data: Path = Field(
        description="Directory of a data set whose split `train` has a column `text`; relative "
        "to the repository's root."
    )
    samples: int = Field(default=512, ge=1, description="Rows that are read.")
    max_seq_length: int = Field(default=512, ge=1, description="Tokens of a row that are read.")
    batch_size: int = Field(default=1, ge=1, description="Rows at once.")
    seed: int = Field(default=1234, ge=0)


class KeyValueCache(Section):
    """The cache of attention keys and values, which takes what memory the weights leave."""

    dtype: KeyValueType = Field(default="auto", description="Of its entries; auto: as `dtype`.")
    free_gpu_mem_fraction: float = Field(
        default=0.9, gt=0, lt=1, description="Share of the memory that is free once loaded."
    )
    tokens_per_block: Literal[16, 32, 64, 128] = 32
    reuse: bool = Field(default=True, description="Keep the blocks of prompts that come again.")


class EngineLimits(Section):
    """The largest shapes that an engine is built for, by their names in TensorRT-LLM."""

    max_batch_size: int = Field(default=64, ge=1, description="Requests under way at once.")
    max_input_len: int = Field(default=1024, ge=1, description="Tokens of a prompt.")
    max_seq_len: int = Field(default=2048, ge=2, description="Tokens of prompt and answer.")
    max_num_tokens: int = Field(default=8192, ge=1, description="Tokens of all in one step.")
    max_beam_width: int = Field(default=1, ge=1)


class EnginePlugins(Section):
    """How `trtllm-build` implements what the model computes."""

    gemm: Literal[
        "auto", "float16", "bfloat16", "float32", "fp8", "nvfp4", "disable"
    ] = "auto"  # fmt: skip
    paged_context_attention: bool = Field(
        default=True, description="Needed to reuse the KV cache and to chunk prompts."
    )
    gemm_swiglu: bool = Field(default=False, description="Fused for fp8 on Hopper.")
    low_latency_gemm: bool = Field(default=False, description="For small batches in fp8.")
    low_latency_gemm_swiglu: bool = Field(default=False, description="The same, fused.")
    gemm_allreduce: Literal["float16", "bfloat16"] | None = None
    reduce_fusion: bool = Field(default=False, description="With tensor parallelism.")
    user_buffer: bool = Field(default=False, description="For Llama in fp8; reduce_fusion too.")
    multiple_profiles: bool = Field(default=False, description="Faster, and longer to build.")


class TensorRTLLMEngine(Section):
    """An engine for NVIDIA GPUs, by TensorRT-LLM.

    What is impossible is refused by `toolchains/tensorrt_llm/combinations.py`, with why.
    """

    toolchain: Literal["tensorrt_llm"]
    backend: Literal["engine", "llmapi"] = Field(
        default="engine",
        description="engine: convert and build, below version 1.3. llmapi: Triton serves the "
        "Hugging Face checkpoint as it is; the only one from 1.3 on.",
    )
    version: str = Field(
        default=PINNED_TENSORRT_LLM,
        pattern=r"^\d+\.\d+\.\d+(\.\d+)?((a|b|rc|\.post)\d+)?$",
        description="Of TensorRT-LLM, in the image.",
    )
    image: str = Field(
        default=PINNED_IMAGE,
        pattern=r"^[^\s@]+:[^\s@:/]+(@sha256:[0-9a-f]{64})?$",
        description="That builds and that serves: an engine runs with the versions that built "
        "it. With a digest it cannot change.",
    )
    gpu: GPUName = Field(description="That serves, and on which the engine is built.")
    family: FamilyName | None = Field(
        default=None, description="Whose convert_checkpoint.py converts; for backend engine."
    )
    dtype: DType = Field(default="auto", description="Of activations, and of other weights.")
    quantization: Quantization = "none"
    calibration: Calibration | None = None
    parallelism: Parallelism = Parallelism()
    kv_cache: KeyValueCache = KeyValueCache()
    limits: EngineLimits = EngineLimits()
    chunked_context: bool = Field(
        default=False, description="Read a long prompt in several steps, between other requests."
    )
    scheduler: Literal["guaranteed_no_evict", "max_utilization"] = "guaranteed_no_evict"
    max_queue_size: int | None = Field(
        default=None,
        ge=1,
        description="Requests that may wait in a server, others are refused; for backend "
        "engine. Unset: no limit.",
    )
    plugins: EnginePlugins | None = Field(
        default=None, description="For backend engine; unset: the defaults."
    )

    @property
    def quantised(self) -> bool:
        """Whether its weights or its KV cache are not those of the checkpoint."""
        return self.quantization != "none" or self.kv_cache.dtype != "auto"

    @property
    def built_with(self) -> EnginePlugins:
        """The plugins, or their defaults."""
        return self.plugins or EnginePlugins()

    @property
    def paged_context(self) -> bool:
        """Whether prompts may be read from paged KV cache; llmapi always can."""
        return self.backend == "llmapi" or self.built_with.paged_context_attention


Engine = Annotated[OnnxRuntimeGenAIEngine | TensorRTLLMEngine, Field(discriminator="toolchain")]


class KnownAnswer(Section):
    """A request whose answer is known; asked of every deployment before it gets traffic."""

    prompt: str = Field(min_length=1)
    answer: str = Field(min_length=1)


class Serving(Section):
    """How the package behaves in Triton."""

    threads: int = Field(default=2, ge=1, description="CPU threads of one forward pass.")
    known_answers: tuple[KnownAnswer, ...] = Field(min_length=1)


class CustomMetric(Section):
    """A metric of one's own: a function of the table of predictions (`develop/scoring.py`)."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="What gates call it.")
    function: str = Field(
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="`package.module:function`, in the spec's repository or installed.",
    )
    higher_is_better: bool = True


class HarnessMetric(Section):
    """A metric of a task of EleutherAI's lm-evaluation-harness."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="What gates call it.")
    task: str = Field(
        min_length=1,
        description="Name of a task, or its YAML file, relative to the repository's root.",
    )
    metric: str = Field(default="acc", description="One that the task reports per document.")
    higher_is_better: bool = True
    limit: int | None = Field(default=None, ge=1, description="Documents at most.")


BUILT_IN_METRICS: Mapping[str, bool] = {
    "exact_match": True, "accuracy": True, "macro_f1": True, "loss": False, "perplexity": False,
}  # fmt: skip
"""Metrics of the table of predictions, and whether higher is better."""
LIKELIHOODS = {"loss", "perplexity"}
"""Metrics that a quantised engine can keep while it answers otherwise."""


def _kind_of_metric(value: object) -> str:
    if isinstance(value, Mapping):
        return "harness" if "task" in value else "custom"
    if isinstance(value, CustomMetric | HarnessMetric):
        return "harness" if isinstance(value, HarnessMetric) else "custom"
    return "built-in"  # which refuses everything that is no name


MetricChoice = Annotated[
    Annotated[
        Literal["exact_match", "accuracy", "macro_f1", "loss", "perplexity", "latency"],
        Tag("built-in"),
    ]
    | Annotated[CustomMetric, Tag("custom")]
    | Annotated[HarnessMetric, Tag("harness")],
    Discriminator(_kind_of_metric),
]


class MetricBound(Section):
    """What a metric must reach: `at_least` where higher is better, else `at_most`."""

    at_least: float | None = Field(default=None, description="Over all rows.")
    at_most: float | None = Field(default=None, description="Over all rows.")
    every_slice: float | None = Field(default=None, description="In every slice by itself.")

    @property
    def bound(self) -> float:
        """The one that is given."""
        return next(value for value in (self.at_least, self.at_most) if value is not None)

    @model_validator(mode="after")
    def _one_bound(self) -> MetricBound:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give either at_least or at_most")
        return self


class MetricRule(MetricBound):
    """What a metric must reach, and how far it may fall behind what serves."""

    regression: float | None = Field(
        default=None,
        ge=0,
        description="Largest loss against the serving release on the same data, in the "
        "metric's own units; unset: not compared.",
    )


class FairnessGate(Section):
    """The largest difference between two slices."""

    metric: Literal["exact_match", "accuracy"] = "exact_match"
    largest_gap: Ratio = Field(description="At most, between the best slice and the worst.")
    minimum_slice: int = Field(default=50, ge=1, description="Rows below which nothing is said.")
    slices: tuple[str, ...] = Field(
        default=(), description="Which slices are compared; none: all that the data have."
    )


Measure = Literal["time_to_first_token", "inter_token_latency", "end_to_end"]
Percentile = Literal["p50", "p95", "p99"]
Seconds = Annotated[float, Field(gt=0)]
Concurrency = Annotated[int, Field(ge=1, le=1024)]
SHARES: Mapping[Percentile, float] = {"p50": 0.50, "p95": 0.95, "p99": 0.99}


def requests_needed(percentile: Percentile, confidence: float) -> int:
    """The fewest requests whose slowest one bounds a percentile from above.

    With fewer no bound can be passed; at a confidence of 0.95 they are 6 for the median,
    72 for the 95th and 368 for the 99th percentile.
    """
    # All n requests are below the percentile with probability share ** n.
    return math.ceil(math.log((1 - confidence) / 2) / math.log(SHARES[percentile]))


class LatencyBound(Section):
    """A percentile of a measure that may not be exceeded."""

    measure: Measure
    percentile: Percentile = "p95"
    at_most: Seconds = Field(description="Seconds.")
    concurrency: Concurrency = Field(default=1, description="Requests under way at once.")


class LatencyObjective(Section):
    """What a request must keep to count as good; seconds, at most."""

    time_to_first_token: Seconds | None = None
    inter_token_latency: Seconds | None = None
    end_to_end: Seconds | None = None

    @model_validator(mode="after")
    def _asks_for_something(self) -> LatencyObjective:
        # A null is no bound, though it was given: every answered request would be good.
        if not any(self.model_dump().values()):
            raise ValueError("asks for nothing; give one of its times")
        return self


class LatencyGate(Section):
    """How fast the model must answer: before it is built, as an engine, and in Triton."""

    evaluation: tuple[LatencyBound, ...] = Field(
        min_length=1,
        description="Of the checkpoint, one request after the other; p50 or p95.",
    )
    build: tuple[LatencyBound, ...] = Field(
        min_length=1, description="Of the engine, one request after the other."
    )
    staging: tuple[LatencyBound, ...] = Field(min_length=1, description="Of the server, loaded.")
    concurrencies: tuple[Concurrency, ...] = Field(
        default=(1,), min_length=1, description="Measured in staging, beside those of its bounds."
    )
    requests: int = Field(
        default=100,
        ge=6,
        description="Measured at each concurrency. A p95 needs 72 to be decided, a p99 368.",
    )
    objective: LatencyObjective | None = Field(
        default=None, description="What counts as a good request in staging."
    )
    goodput: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="At least; share of requests in staging that are good. No sample shows 1.",
    )
    generator: Literal["built_in", "aiperf"] = Field(
        default="built_in", description="What loads staging; aiperf needs LLMOPS_AIPERF."
    )

    @field_validator("evaluation", "build")
    @classmethod
    def _alone(cls, bounds: tuple[LatencyBound, ...]) -> tuple[LatencyBound, ...]:
        if any(bound.concurrency != 1 for bound in bounds):
            raise ValueError("is measured one request after the other: concurrency 1 only")
        return bounds

    @field_validator("evaluation")
    @classmethod
    def _few(cls, bounds: tuple[LatencyBound, ...]) -> tuple[LatencyBound, ...]:
        if any(bound.percentile == "p99" for bound in bounds):
            raise ValueError("some 110 prompts are timed, and a p99 needs 368; bound the p95")
        return bounds

    @model_validator(mode="after")
    def _goodput_of_something(self) -> LatencyGate:
        if self.goodput is not None and self.objective is None:
            raise ValueError("goodput needs an objective")
        return self

    @property
    def measured_concurrencies(self) -> tuple[int, ...]:
        """All that staging is loaded with, ascending."""
        return tuple(sorted({*self.concurrencies, *(bound.concurrency for bound in self.staging)}))


class ParityGate(Section):
    """How close the engine stays to its checkpoint on the same prompts."""

    token_agreement: float = Field(
        default=0.98, ge=0.5, description="At least; greedy tokens that agree."
    )
    logit_distance: float = Field(default=1.0, gt=0, description="At most; largest difference.")


class SmokeGate(Section):
    """What a deployment must show before it may take traffic."""

    latency_seconds: float = Field(default=5.0, gt=0, description="At most, of the slowest answer.")


class ServiceGate(Section):
    """Objectives of what serves."""

    error_rate: Ratio = Field(default=0.01, description="At most; share of requests that fail.")
    latency_p99_seconds: float = Field(default=2.0, gt=0, description="At most; whole answers.")


class Gates(Section):
    """Thresholds of the decision gates."""

    confidence: float = Field(
        default=0.95,
        ge=0.5,
        lt=1,
        description="Of every interval. A gate passes when the whole interval is on the right "
        "side of its threshold.",
    )
    accuracy: dict[str, MetricRule] = Field(
        min_length=1, description="Of the checkpoint on held-out data, by metric."
    )
    fairness: FairnessGate | None = Field(
        description="Null only for data without slices: nothing to compare."
    )
    latency: LatencyGate
    engine_accuracy: dict[str, MetricBound] = Field(
        min_length=1, description="Of the engine on held-out data, by metric."
    )
    parity: ParityGate = ParityGate()
    smoke: SmokeGate = SmokeGate()
    service: ServiceGate = ServiceGate()


class Retraining(Section):
    """When a new release is made because time has passed."""

    cron: str = Field(description="Five fields, such as `0 3 * * mon`.")
    timezone: str = Field(default="UTC", description="IANA name, such as Europe/Berlin.")
    when: Literal["changed", "always"] = Field(
        default="changed",
        description="changed: only if data or code differ from the newest release's.",
    )

    @field_validator("cron")
    @classmethod
    def _cron(cls, cron: str) -> str:
        if len(cron.split()) != 5:
            raise ValueError("must have five fields: minute, hour, day, month, day of the week")
        try:
            CronSim(cron, datetime(2026, 1, 1, tzinfo=UTC))
        except CronSimError as error:
            raise ValueError(f"is no cron expression: {error}") from error
        return cron

    @field_validator("timezone")
    @classmethod
    def _timezone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise ValueError("is no IANA time zone; Europe/Berlin is one") from error
        return name


class AlertRule(Section):
    """What an alert about what serves in production makes the platform do."""

    match: dict[str, str] = Field(
        min_length=1,
        description="Labels that an alert must have. It must be about this model besides, by "
        "its label `model`.",
    )
    action: Literal["rollback", "scale", "notify"]
    damping_seconds: float = Field(
        default=600.0,
        ge=0,
        description="After an action by this rule, alerts that come and go are only recorded.",
    )


class RolloutStep(Section):
    """A share of the traffic, for a time."""

    weight: int = Field(ge=1, le=100, description="Share of the traffic, per cent.")
    bake: Duration = Field(default="0s", description="At least; how long it is watched.")


class RolloutObjectives(Section):
    """What stops a rollout. Those that compare do so while both releases have traffic."""

    error_rate: float = Field(
        default=0.01, ge=0, lt=1, description="At most; share of requests that fail."
    )
    error_ratio: float = Field(
        default=1.5, ge=1, description="At most; failed and refused requests, times stable's."
    )
    duration_ratio: float = Field(
        default=1.5, ge=1, description="At most; p95 of whole answers, times stable's."
    )
    first_byte_ratio: float = Field(
        default=1.5, ge=1, description="At most; p95 of times to the first byte, times stable's."
    )
    probes_right: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="At least; share of known questions answered right. Of 1, one wrong answer "
        "stops it.",
    )


class Rollout(Section):
    """How a release replaces the one that serves; see docs/canary.md."""

    strategy: Literal["blue_green"] = "blue_green"
    steps: tuple[RolloutStep, ...] = Field(
        default=(RolloutStep(weight=100),),
        min_length=1,
        description="Shares of the traffic, growing, the last one all of it.",
    )
    minimum_requests: int = Field(
        default=0, ge=0, description="Of clients to the new release in each step, if they come."
    )
    longest: Duration = Field(
        default="30m",
        description="A step that still lacks requests goes on by the known questions alone.",
    )
    objectives: RolloutObjectives = RolloutObjectives()
    false_abort_rate: float = Field(
        default=0.05,
        gt=0,
        lt=1,
        description="At most; share of rollouts of a release within its objectives that are "
        "stopped all the same.",
    )

    @field_validator("steps")
    @classmethod
    def _grow_to_all(cls, steps: tuple[RolloutStep, ...]) -> tuple[RolloutStep, ...]:
        weights = [step.weight for step in steps]
        if weights != sorted(set(weights)) or weights[-1] != 100:
            raise ValueError(f"must have growing weights that end with 100; these are {weights}")
        return steps

    @model_validator(mode="after")
    def _longest_is_longest(self) -> Rollout:
        for step in self.steps:
            if duration_seconds(step.bake) > duration_seconds(self.longest):
                raise ValueError(f"a bake of {step.bake} is longer than `longest`, {self.longest}")
        return self


class Retention(Section):
    """How long an archived release is kept."""

    archive_days: int = Field(default=365, ge=1)


class ModelSpec(Section):
    """A model, from its use case to its retention."""

    model_config = ConfigDict(title="LLMOps Assets model spec")

    name: str = Field(description="DNS label, at most 40 characters; also the file's name.")
    use_case: str = Field(min_length=10, description="What it is for, in a sentence or two.")
    owner: str = Field(
        pattern=r"^(team:[A-Za-z0-9_-]+|[^@\s]+@[^@\s]+\.[^@\s]+)$",
        description="`team:<name>` or an e-mail address; who is asked when a gate fails.",
    )
    metrics: tuple[MetricChoice, ...] = Field(
        min_length=1, description="What decides whether the model is good; gates judge these."
    )
    card: ModelCard = Field(
        default=ModelCard(), description="The model card; the compliance gate asks for all of it."
    )
    constraints: Constraints
    weights: Weights
    data: Data
    engine: Engine
    serving: Serving
    gates: Gates
    retraining: Retraining | None = Field(default=None, description="Unset: never by itself.")
    alerts: tuple[AlertRule, ...] = Field(
        default=(), description="The first rule that matches an alert decides."
    )
    rollout: Rollout = Rollout()
    retention: Retention = Retention()

    @field_validator("name")
    @classmethod
    def _name_is_label(cls, name: str) -> str:
        if not MODEL_NAME.fullmatch(name):
            raise ValueError("must be a DNS label of at most 40 characters, as date-normalizer")
        return name

    def inconsistencies(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """Where sections do not fit each other: the place in the spec, and what is wrong."""
        yield from self._metric_inconsistencies()
        if isinstance(self.engine, TensorRTLLMEngine):
            for place, message in refusals(self.engine):
                yield ("engine", *place), message
            if self.engine.backend == "engine" and self.name in INNER_MODELS:
                yield ("name",), "is a model of every engine's package; choose another"
            if self.engine.backend == "llmapi" and self.gates.latency.generator == "aiperf":
                yield (
                    ("gates", "latency", "generator"),
                    "AIPerf cannot count the tokens of llmapi's streams; take built_in",
                )
            yield from self._beyond(self.engine.limits)
            yield from self._not_measured(self.engine)

    def _beyond(self, limits: EngineLimits) -> Iterator[tuple[tuple[str, ...], str]]:
        """Requests that the constraints allow and an engine cannot hold."""
        wanted = self.constraints
        if wanted.max_input_tokens > limits.max_input_len:
            yield (
                ("constraints", "max_input_tokens"),
                f"is more than engine.limits.max_input_len, {limits.max_input_len}",
            )
        longest = wanted.max_input_tokens + wanted.max_output_tokens
        if longest > limits.max_seq_len:
            yield (
                ("constraints", "max_output_tokens"),
                f"makes requests of {longest} tokens; engine.limits.max_seq_len is "
                f"{limits.max_seq_len}",
            )

    def _not_measured(
        self, engine: TensorRTLLMEngine
    ) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """Metrics that the validation of this toolchain has no figures for."""
        named = [metric if isinstance(metric, str) else metric.name for metric in self.metrics]
        for name in self.gates.engine_accuracy.keys() & set(named):
            place = ("gates", "engine_accuracy", name)
            if isinstance(self.metric(name), HarnessMetric):
                yield place, "is a task of the harness, which TensorRT-LLM's engines do not run"
            elif name in LIKELIHOODS and engine.backend == "engine":
                yield place, "needs logits of prompts, which engines are built without"

    def _metric_inconsistencies(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """Where gates do not fit the metrics."""
        names = [metric if isinstance(metric, str) else metric.name for metric in self.metrics]
        if len(set(names)) < len(names):
            yield ("metrics",), "a name is given twice"
        for position, metric in enumerate(self.metrics):
            if not isinstance(metric, str) and metric.name in (*BUILT_IN_METRICS, "latency"):
                place = ("metrics", position, "name")
                yield place, f"{metric.name} is the name of a built-in metric; choose another"
        if self.engine.quantised and self.gates.engine_accuracy.keys() <= LIKELIHOODS:
            yield (
                ("gates", "engine_accuracy"),
                "needs a metric of answers beside likelihoods, as the engine is quantised",
            )
        latency = self.gates.latency
        for position, bound in enumerate(latency.staging):
            needed = requests_needed(bound.percentile, self.gates.confidence)
            if latency.requests < needed:
                yield (
                    ("gates", "latency", "staging", position),
                    f"{latency.requests} requests cannot decide a {bound.percentile}; "
                    f"set requests to {needed} or more",
                )
        for gate, rules in {
            "accuracy": self.gates.accuracy,
            "engine_accuracy": self.gates.engine_accuracy,
        }.items():
            for name, rule in rules.items():
                place = ("gates", gate, name)
                if name not in names or name == "latency":
                    yield place, "is not among the spec's metrics"
                    continue
                wanted = "at_least" if self.higher_is_better(name) else "at_most"
                if getattr(rule, wanted) is None:
                    yield place, f"needs {wanted}, as {self._direction(name)} is better"
                if rule.every_slice is not None and isinstance(self.metric(name), HarnessMetric):
                    yield (*place, "every_slice"), "tasks of the harness have no slices"

    def _direction(self, name: str) -> str:
        return "higher" if self.higher_is_better(name) else "lower"

    def metric(self, name: str) -> str | CustomMetric | HarnessMetric:
        """The metric that gates call by this name."""
        return next(
            metric
            for metric in self.metrics
            if name == (metric if isinstance(metric, str) else metric.name)
        )

    def higher_is_better(self, name: str) -> bool:
        """The direction of a metric."""
        metric = self.metric(name)
        return BUILT_IN_METRICS[metric] if isinstance(metric, str) else metric.higher_is_better

    @property
    def harness(self) -> tuple[HarnessMetric, ...]:
        """The tasks that lm-evaluation-harness runs."""
        return tuple(metric for metric in self.metrics if isinstance(metric, HarnessMetric))


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a spec, for editors and CI."""
    schema = ModelSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def read_spec(path: Path) -> ModelSpec:
    """Reads `models/<name>.yaml`.

    Raises:
        SpecError: it does not exist, is not a valid spec, or its name is not its file's.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SpecError(
            f"There is no spec {path}",
            cure="check the model's name, or write the spec; `llmops spec schema` describes it",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(
            f"The spec {path} cannot be read",
            found=error,
            cure="make it a readable UTF-8 text file",
        ) from error
    return parse_spec(text, str(path), expected_name=path.stem)


def parse_spec(text: str, source: str, expected_name: str | None = None) -> ModelSpec:
    """Parses a spec's text.

    Args:
        text: YAML.
        source: what errors call it, usually the file's path.
        expected_name: the name it must have, when its file has one.

    Raises:
        SpecError: naming the line of every mistake.
    """
    try:
        content, duplicates = read_yaml(text)
    except (yaml.YAMLError, ValueError) as error:  # a date that does not exist is a ValueError
        raise SpecError(
            f"{source} is not valid YAML", found=error, cure="mend the line it names"
        ) from error
    except RecursionError as error:
        raise SpecError(
            f"{source} is not a model spec",
            expected="a mapping with name, use_case, weights, …",
            found="sections that are nested too deep to be read",
            cure="start from models/date-normalizer.yaml",
        ) from error
    if not isinstance(content, dict):
        raise SpecError(
            f"{source} is not a model spec",
            expected="a mapping with name, use_case, weights, …",
            found=type(content).__name__,
            cure="start from models/date-normalizer.yaml",
        )
    misnamed: str | None = None
    misplaced: list[tuple[tuple[str | int, ...], str]] = []
    try:
        spec = ModelSpec.model_validate(content)
    except ValidationError as error:
        misplaced += [(detail["loc"], detail["msg"]) for detail in error.errors()]
    else:
        misplaced += spec.inconsistencies()
        if expected_name is not None and spec.name != expected_name:
            misnamed = spec.name
        if not (duplicates or misplaced or misnamed):
            return spec
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert root is not None  # it is a mapping
    mistakes = [f"line {line}: {key!r} is given twice; keep one" for key, line in duplicates]
    if misnamed is not None:
        mistakes.append(
            f"line {line_of(root, ('name',))}: name is {misnamed!r}, but the file is named "
            f"{expected_name!r}; make them equal"
        )
    mistakes += [mistake(root, place, message) for place, message in misplaced[:MISTAKES_SHOWN]]
    if len(misplaced) > MISTAKES_SHOWN:
        mistakes.append(f"and {len(misplaced) - MISTAKES_SHOWN} more")
    raise SpecError(
        f"{source} is not a valid model spec",
        found="; ".join(mistakes),
        cure=f"mend these lines, then run `llmops spec validate {source}`",
    )


def read_yaml(text: str) -> tuple[Any, list[tuple[str, int]]]:
    """A text's values, and the keys that are given twice with their lines."""
    # libyaml's composer is many times faster. It recurses without a limit, though, so that
    # a text nested deep enough would end the process; each level needs one of these.
    if _CLoader is not None and sum(map(text.count, "[{-?:")) <= C_LOADER_INDICATORS:
        try:
            return _load(_CLoader(text))
        except yaml.YAMLError:
            pass  # the other loader's message shows the line itself
    return _load(yaml.SafeLoader(text))


def _load(loader: Any) -> tuple[Any, list[tuple[str, int]]]:
    try:
        root = loader.get_single_node()
        if root is None:
            return None, []
        duplicates = _duplicate_keys(root)
        return loader.construct_document(root), duplicates
    finally:
        loader.dispose()


def canonical(section: BaseModel) -> Any:
    """A section as plain JSON values, defaults included: what an action digest covers."""
    return json.loads(section.model_dump_json())


def mistake(root: yaml.Node, location: Sequence[str | int], message: str) -> str:
    """A message of Pydantic's with the line of what it is about."""
    where = ".".join(str(part) for part in location)
    return f"line {line_of(root, location)}: {where}: {message}"


def line_of(root: yaml.Node, location: Sequence[str | int]) -> int:
    """Line (from 1) of the deepest node on the way to `location` that exists.

    Pydantic puts the tag of a union's member behind the union; such parts have no node.
    """
    node = root
    line = root.start_mark.line
    untagged: yaml.Node | None = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            if node is not untagged and part == _tag(node):
                untagged = node
                continue
            for key, value in node.value:
                if key.value == str(part):
                    node, line = value, key.start_mark.line
                    break
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line
    return line + 1


TAGS = ("source", "toolchain")
"""The keys that tell a union's members apart."""


def _tag(union: yaml.MappingNode) -> str | None:
    """What a mapping says of its kind, in the key that tells a union's members apart."""
    return next((value.value for key, value in union.value if key.value in TAGS), None)


MISTAKES_SHOWN = 20
MERGE_TAG = "tag:yaml.org,2002:merge"


def _duplicate_keys(root: yaml.Node) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    queue = [root]
    # An alias leads to its anchor's node again, perhaps to one around it.
    visited: set[int] = set()
    while queue:
        node = queue.pop()
        if id(node) in visited:
            continue
        visited.add(id(node))
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                if key.tag == MERGE_TAG:
                    # Merges of merges multiply: three kilobytes of them end the process.
                    raise yaml.YAMLError(
                        f"line {key.start_mark.line + 1}: keys may not be merged with <<; write "
                        "them out"
                    )
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        found.append((key.value, key.start_mark.line + 1))
                    seen.add(key.value)
                queue.append(value)
        elif isinstance(node, yaml.SequenceNode):
            queue += node.value
    return sorted(found, key=lambda duplicate: duplicate[1])
