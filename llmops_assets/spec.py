"""The model spec: the one file a team writes for a model, `models/<name>.yaml`.

Each asset reads only its own section, so that a change of one section costs only what
depends on it. `llmops spec schema` prints the JSON Schema for editors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from llmops_assets.errors import SpecError
from llmops_assets.release import MODEL_NAME

Ratio = Annotated[float, Field(ge=0)]
"""A share of 1. Thresholds above 1 are allowed: they are one way to say "never"."""


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


Weights = Annotated[TrainedWeights | ImportedWeights, Field(discriminator="source")]


class Split(Section):
    """One split of generated data."""

    rows: int = Field(ge=1)
    seed: int = Field(ge=0)


class GeneratedDates(Section):
    """The example's data: dates as people write them, rendered from CLDR by Babel."""

    source: Literal["dates"]
    locales: tuple[str, ...] = Field(min_length=1, description="CLDR locales, such as en or fr.")
    training: Split
    evaluation: Split


class DataFiles(Section):
    """Data from Parquet or JSON Lines files with columns `prompt`, `completion` and `slice`."""

    source: Literal["files"]
    training: Path
    evaluation: Path


Data = Annotated[GeneratedDates | DataFiles, Field(discriminator="source")]


class OnnxRuntimeGenAIEngine(Section):
    """An engine for the CPU, by ONNX Runtime GenAI."""

    toolchain: Literal["onnxruntime_genai"]
    precision: Literal["int8", "fp32"] = "int8"
    block_size: Literal[16, 32, 64, 128] = Field(
        default=32, description="Weights that share one scale; int8 only."
    )


Engine = OnnxRuntimeGenAIEngine


class KnownAnswer(Section):
    """A request whose answer is known; asked of every deployment before it gets traffic."""

    prompt: str = Field(min_length=1)
    answer: str = Field(min_length=1)


class Serving(Section):
    """How the package behaves in Triton."""

    threads: int = Field(default=2, ge=1, description="CPU threads of one request.")
    known_answers: tuple[KnownAnswer, ...] = Field(min_length=1)


class AccuracyGate(Section):
    """Exact match on held-out data, as shares of 1."""

    exact_match: Ratio = Field(description="At least, over all rows.")
    every_slice: Ratio = Field(default=0.0, description="At least, in every slice.")


class ParityGate(Section):
    """How close the engine stays to its checkpoint on the same prompts."""

    token_agreement: Ratio = Field(default=0.98, description="At least; greedy tokens that agree.")
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

    accuracy: AccuracyGate
    engine_accuracy: AccuracyGate
    parity: ParityGate = ParityGate()
    smoke: SmokeGate = SmokeGate()
    service: ServiceGate = ServiceGate()


class Rollout(Section):
    """How a release replaces the one that serves."""

    strategy: Literal["blue_green"] = "blue_green"


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
    metrics: tuple[Literal["exact_match", "loss", "perplexity", "latency"], ...] = Field(
        min_length=1, description="What decides whether the model is good."
    )
    constraints: Constraints
    weights: Weights
    data: Data
    engine: Engine
    serving: Serving
    gates: Gates
    rollout: Rollout = Rollout()
    retention: Retention = Retention()

    @field_validator("name")
    @classmethod
    def _name_is_label(cls, name: str) -> str:
        if not MODEL_NAME.fullmatch(name):
            raise ValueError("must be a DNS label of at most 40 characters, as date-normalizer")
        return name


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
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(
            f"{source} is not valid YAML", found=error, cure="mend the line it names"
        ) from error
    if not isinstance(root, yaml.MappingNode):
        raise SpecError(
            f"{source} is not a model spec",
            expected="a mapping with name, use_case, weights, …",
            found=type(content).__name__,
            cure="start from models/date-normalizer.yaml",
        )
    mistakes = [
        f"line {line}: {key!r} is given twice; keep one" for key, line in _duplicate_keys(root)
    ]
    try:
        spec = ModelSpec.model_validate(content)
    except ValidationError as error:
        mistakes += [_mistake(root, detail["loc"], detail["msg"]) for detail in error.errors()]
    else:
        if expected_name is not None and spec.name != expected_name:
            mistakes.append(
                f"line {_line_of(root, ('name',))}: name is {spec.name!r}, but the file is named "
                f"{expected_name!r}; make them equal"
            )
        if not mistakes:
            return spec
    raise SpecError(
        f"{source} is not a valid model spec",
        found="; ".join(mistakes),
        cure=f"mend these lines, then run `llmops spec validate {source}`",
    )


def canonical(section: BaseModel) -> Any:
    """A section as plain JSON values, defaults included: what an action digest covers."""
    return json.loads(section.model_dump_json())


def _mistake(root: yaml.Node, location: Sequence[str | int], message: str) -> str:
    where = ".".join(str(part) for part in location)
    return f"line {_line_of(root, location)}: {where}: {message}"


def _line_of(root: yaml.Node, location: Sequence[str | int]) -> int:
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


def _tag(union: yaml.MappingNode) -> str | None:
    """What a mapping says of its kind, in the key that tells a union's members apart."""
    return next((value.value for key, value in union.value if key.value == "source"), None)


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
                if key.value in seen:
                    found.append((key.value, key.start_mark.line + 1))
                seen.add(key.value)
                queue.append(value)
        elif isinstance(node, yaml.SequenceNode):
            queue += node.value
    return sorted(found, key=lambda duplicate: duplicate[1])
