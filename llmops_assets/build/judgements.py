"""How the gates of the Build phase judge an engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmops_assets.errors import ToolchainError
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import Finding, Judgement
from llmops_assets.settings import Settings
from llmops_assets.spec import ModelSpec, ParityGate
from llmops_assets.storage.artifacts import ArtifactHandle
from llmops_assets.toolchains import toolchain_for

VALIDATION_FILE = "validation.json"


def judge_weights(spec: ModelSpec, column: Mapping[str, ArtifactHandle]) -> Judgement:
    """The converted weights came from this checkpoint, and nothing of them is missing."""
    weights = column["converted_weights"]
    expected = column["checkpoint"].digest
    actual = weights.result.inputs.get("checkpoint")
    problem = None if actual == expected else f"they were converted from {actual}"
    try:
        toolchain_for(spec.engine).check_weights(weights.path)
    except ToolchainError as error:
        problem = str(error)
    return Judgement(
        decision=Decision.of(problem is None),
        measured={"checkpoint": actual, "problem": problem},
        threshold={"checkpoint": expected, "problem": None},
        reason=problem or f"The weights are complete, and converted from {actual}.",
    )


def judge_target(spec: ModelSpec, engine: Path, settings: Settings | None = None) -> Judgement:
    """The engine can run on this machine, where the local slots are."""
    toolchain = toolchain_for(spec.engine, settings)
    target = None
    try:
        target = toolchain.target()
        toolchain.compatible(engine, target)
        problem = None
    except ToolchainError as error:
        problem = str(error)
    sidecar = json.loads((engine / "engine.json").read_text(encoding="utf-8"))
    architecture = None if target is None else target.architecture
    return Judgement(
        decision=Decision.of(problem is None),
        measured={"target": sidecar["target"]},
        threshold={"architecture": architecture},
        reason=problem or f"The engine runs on {architecture}.",
    )


def judge_parity(validation: Path, gate: ParityGate) -> Judgement:
    """Greedy tokens and logits stay close to the checkpoint's; token ids are the same."""
    found: Mapping[str, Any] = json.loads((validation / VALIDATION_FILE).read_text("utf-8"))
    agreement = found["token_agreement"]
    distance = found["logit_distance"]["largest"]
    tokenizer = found["tokenizer_parity"]
    # A diverged engine's logits are null: JSON has no number for them.
    told = "no number" if distance is None else f"{distance:.4g}"
    findings = (
        Finding(
            metric="token_agreement",
            value=agreement,
            n=found["prompts"],
            threshold=f"at least {gate.token_agreement:g}",
            decision=Decision.of(agreement >= gate.token_agreement),
        ),
        Finding(
            metric="logit_distance",
            value=distance,
            note="" if distance is not None else "logits that are no numbers",
            n=found["prompts"],
            threshold=f"at most {gate.logit_distance:g}",
            decision=Decision.of(distance is not None and distance <= gate.logit_distance),
        ),
        Finding(
            metric="tokenizer_parity",
            value=tokenizer["equal"],
            n=tokenizer["prompts"],
            threshold="all equal",
            decision=Decision.of(0 < tokenizer["prompts"] == tokenizer["equal"]),
        ),
    )
    return Judgement(
        decision=Decision.all_of(finding.decision for finding in findings),
        findings=findings,
        measured={
            "token_agreement": agreement,
            "logit_distance": distance,
            "tokenizer_parity": tokenizer,
            "prompts": found["prompts"],
        },
        threshold={
            "token_agreement": gate.token_agreement,
            "logit_distance": gate.logit_distance,
            "tokenizer_parity": "all equal",
        },
        reason=f"{agreement:.4f} of greedy tokens agree, logits differ by at most {told}, "
        f"token ids are equal for {tokenizer['equal']} of {tokenizer['prompts']} prompts.",
    )
