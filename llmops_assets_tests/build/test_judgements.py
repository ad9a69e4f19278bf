"""Gates of Build: exactly at the threshold passes, anything unknown does not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from llmops_assets.build.judgements import (
    VALIDATION_FILE,
    judge_parity,
    judge_target,
    judge_weights,
)
from llmops_assets.errors import ArtifactCorruptError
from llmops_assets.evidence.verdicts import Judgement
from llmops_assets.spec import ParityGate, parse_spec
from llmops_assets.storage.columns import Action
from llmops_assets.storage.folder import FolderStore
from llmops_assets.toolchains.base import Target

from ..release_rig import SPEC, Rig

GATE = ParityGate(token_agreement=0.98, logit_distance=1.0)


def validation(folder: Path, **changes: Any) -> Path:
    content = {
        "prompts": 20,
        "token_agreement": 1.0,
        "logit_distance": {"largest": 0.0},
        "tokenizer_parity": {"equal": 20, "prompts": 20},
    }
    (folder / VALIDATION_FILE).write_text(json.dumps({**content, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, True),
        ({"token_agreement": 0.98, "logit_distance": {"largest": 1.0}}, True),
        ({"token_agreement": math.nextafter(0.98, 0)}, False),
        ({"logit_distance": {"largest": math.nextafter(1.0, 2)}}, False),
        ({"logit_distance": {"largest": None}}, False),
        ({"tokenizer_parity": {"equal": 19, "prompts": 20}}, False),
        ({"tokenizer_parity": {"equal": 0, "prompts": 0}}, False),
    ],
)
def test_parity(tmp_path: Path, changes: dict[str, Any], passed: bool) -> None:
    """An engine with other tokens than its checkpoint is another model, unjudged so far."""
    judgement = judge_parity(validation(tmp_path, **changes), GATE)
    assert judgement.passed is passed
    assert set(judgement.threshold) <= set(judgement.measured)


@pytest.mark.parametrize(
    ("sidecar", "passed"),
    [
        ({"toolchain": "onnxruntime_genai", "target": {"architecture": "here"}}, True),
        ({"toolchain": "onnxruntime_genai", "target": {"architecture": "sm_90"}}, False),
        ({"toolchain": "tensorrt_llm", "target": {"architecture": "here"}}, False),
    ],
)
def test_target(tmp_path: Path, sidecar: dict[str, Any], passed: bool) -> None:
    """An engine for another machine loads nowhere, or worse, loads and is wrong."""
    here = Target.here().architecture
    text = json.dumps(sidecar).replace('"here"', json.dumps(here))
    (tmp_path / "engine.json").write_text(text)
    judgement = judge_target(parse_spec(SPEC, "test"), tmp_path)
    assert judgement.passed is passed
    assert judgement.threshold == {"architecture": here}
    assert passed or "build the engine on a machine" in judgement.reason


def onnx_model() -> bytes:
    """The smallest ONNX model there is."""
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    node = helper.make_node("Identity", ["x"], ["y"])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    return helper.make_model(
        helper.make_graph([node], "tiny", [value], [result])
    ).SerializeToString()


def convert(rig: Rig, checkpoint: str, *missing: str) -> None:
    """Publishes converted weights, without the files in `missing`."""
    action = Action("converted_weights", "application/vnd.llmops.test", {"checkpoint": checkpoint})
    keys = ("context_length", "eos_token_id", "vocab_size", "decoder")
    files = {
        "genai_config.json": json.dumps({"model": dict.fromkeys(keys, 1)}).encode(),
        "model.onnx": onnx_model(),
        "tokenizer.json": b"{}",
    }

    def make(workshop: Any) -> dict[str, Any]:
        workshop.output.mkdir()
        for name, content in files.items():
            if name not in missing:
                (workshop.output / name).write_bytes(content)
        return {}

    rig.platform.columns.produce("parrot.v1", action, make)


def judge(rig: Rig) -> Judgement:
    return judge_weights(parse_spec(SPEC, "test"), rig.platform.column("parrot.v1"))


def test_whole_weights_of_this_checkpoint_pass(rig: Rig) -> None:
    """What the toolchain calls complete is the toolchain's to say."""
    checkpoint = rig.publish("parrot.v1", "checkpoint", {"weights": "1"})
    convert(rig, checkpoint.artifact)
    assert judge(rig).passed, judge(rig).reason


def test_weights_of_another_checkpoint_fail(rig: Rig) -> None:
    """Everything behind would be judged as if it were this release's model."""
    rig.publish("parrot.v1", "checkpoint", {"weights": "1"})
    other = rig.publish("parrot.v2", "checkpoint", {"weights": "2"})
    convert(rig, other.artifact)
    assert not judge(rig).passed
    assert other.artifact in judge(rig).reason


def test_incomplete_weights_fail(rig: Rig) -> None:
    """A converter that was short of disk may still have exited with 0."""
    checkpoint = rig.publish("parrot.v1", "checkpoint", {"weights": "1"})
    convert(rig, checkpoint.artifact, "model.onnx")
    assert not judge(rig).passed
    assert "no model.onnx" in judge(rig).reason


def test_damaged_weights_are_no_verdict(rig: Rig) -> None:
    """A gate that cannot read what it judges must not say anything about it."""
    checkpoint = rig.publish("parrot.v1", "checkpoint", {"weights": "1"})
    convert(rig, checkpoint.artifact)
    store = rig.platform.store
    assert isinstance(store, FolderStore)
    weights = rig.platform.column("parrot.v1")["converted_weights"]
    blob = store.root / "blobs" / weights.artifact.files[0].digest.replace(":", "/")
    blob.chmod(0o600)
    blob.write_text("rotten")
    with pytest.raises(ArtifactCorruptError):
        judge(rig)
