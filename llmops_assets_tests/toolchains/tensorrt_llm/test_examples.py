"""The worked specs: they are copied, so they must stay valid and say everything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from llmops_assets.compliance.model_card import check_card
from llmops_assets.spec import MetricRule, TensorRTLLMEngine, json_schema, read_spec
from llmops_assets.toolchains.tensorrt_llm.memory import check_memory, estimate
from llmops_assets.toolchains.tensorrt_llm.shape import check_shape, read_shape
from llmops_assets_tests.toolchains.tensorrt_llm.engines import LLAMA_8B, LLAMA_70B, checkpoint

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"
MODELS = [
    ("llama-31-8b-instruct", LLAMA_8B, 1, 128),
    ("llama-33-70b-instruct", LLAMA_70B, 4, 64),
]


@pytest.mark.parametrize(("name", "config", "gpus", "batch"), MODELS)
def test_examples_are_valid_and_fit(
    name: str, config: Mapping[str, Any], gpus: int, batch: int, tmp_path: Path
) -> None:
    """One that does not fit on its own GPUs would teach the wrong thing."""
    spec = read_spec(EXAMPLES / f"{name}.yaml")
    assert isinstance(spec.engine, TensorRTLLMEngine)
    assert spec.engine.quantization == "fp8"
    assert spec.engine.parallelism.world_size == gpus
    shape = read_shape(checkpoint(tmp_path, config))
    check_shape(shape, spec.engine)
    found = estimate(shape, spec.engine)
    check_memory(found, spec.engine)
    # No request of a full batch waits for the cache, however long all are.
    assert found.longest_sequences >= batch == spec.engine.limits.max_batch_size


@pytest.mark.parametrize("name", [name for name, *_ in MODELS])
def test_examples_say_everything(name: str) -> None:
    """Every section, every gate and the whole card, so that nothing is left to be found."""
    path = EXAMPLES / f"{name}.yaml"
    spec = read_spec(path)
    assert check_card(spec.card).missing == ()
    optional: Mapping[type[BaseModel], set[str]] = {
        MetricRule: {"at_least", "at_most", "every_slice", "regression"}
    }

    def unset(part: BaseModel, where: str) -> list[str]:
        fields = type(part).model_fields.keys() - optional.get(type(part), set())
        missing = [f"{where}.{field}" for field in sorted(fields - part.model_fields_set)]
        for field in fields & part.model_fields_set:
            if isinstance(value := getattr(part, field), BaseModel):
                missing += unset(value, f"{where}.{field}")
        return missing

    assert unset(spec.gates, "gates") == []
    assert type(spec).model_fields.keys() - spec.model_fields_set == set()
    jsonschema.Draft202012Validator(json_schema()).validate(yaml.safe_load(path.read_text()))
