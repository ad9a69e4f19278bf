"""The decision gates of the lifecycle, in order: what each judges and what follows.

How a gate judges is a plain function beside the phase it belongs to. Here is what the
rest of the platform must know of it: whose bytes it is about, under which policy, and
what a person does when it fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmops_assets.spec import ModelSpec, canonical

Policy = Callable[[ModelSpec], Any]


def _none(_: ModelSpec) -> None:
    """The policy of a gate without thresholds."""


@dataclass(frozen=True)
class Gate:
    """A decision gate."""

    name: str
    asset: str
    """The asset whose check shows it."""
    subjects: tuple[str, ...]
    """The assets whose digests a verdict binds."""
    description: str
    next_action: str
    """What to do when it fails."""
    policy: Policy = _none
    """The part of the spec that it judges by, as JSON values."""
    waits_for: tuple[str, ...] = ()
    """Subjects that are not upstream of `asset`, so that the check must wait for them."""
    version: int = 1
    """Raised when the way of judging changes, which makes earlier verdicts stale."""


SPEC_COMPLETE = Gate(
    name="spec_complete",
    asset="model_spec",
    subjects=("model_spec",),
    description="Use case, metrics and constraints are there and fit each other.",
    next_action="complete the spec and make a new release",
)
LEAKAGE = Gate(
    name="no_leakage",
    # On the training data, so that a leak stops the training.
    asset="training_data",
    subjects=("training_data", "evaluation_data"),
    waits_for=("evaluation_data",),
    description="No prompt of the evaluation data is in the training data.",
    next_action="take the overlapping rows out of one split and make a new release",
)
CHECKPOINT_SAFE = Gate(
    name="checkpoint_safe",
    asset="checkpoint",
    subjects=("checkpoint",),
    description="Only safetensors, no code, finite weights, loads without trust.",
    next_action="export the weights as safetensors without code and make a new release",
)
ACCURACY = Gate(
    name="accuracy",
    asset="evaluation",
    subjects=("checkpoint", "evaluation_data", "evaluation"),
    description="Exact match on held-out data, overall and in every slice.",
    next_action="iterate: train longer, or on better data, and make a new release",
    policy=lambda spec: canonical(spec.gates.accuracy),
)
REGISTERED_BYTES = Gate(
    name="registered_bytes",
    asset="registered_model",
    subjects=("checkpoint", "evaluation", "registered_model"),
    description="The registered version carries the digest of the evaluated checkpoint.",
    next_action="find out who changed the registry's tags, and make a new release",
)
WEIGHTS_COMPLETE = Gate(
    name="weights_complete",
    asset="converted_weights",
    subjects=("checkpoint", "converted_weights"),
    description="The converted weights are whole and come from this checkpoint.",
    next_action="materialize converted_weights again; if it repeats, check the toolchain's version",
)
FITS_TARGET = Gate(
    name="fits_target",
    asset="engine",
    subjects=("engine",),
    description="The engine can run on the machines that will serve it.",
    next_action="build for the target: correct the spec's engine section",
    policy=lambda spec: canonical(spec.engine),
)
PARITY = Gate(
    name="parity",
    asset="engine_validation",
    subjects=("checkpoint", "engine", "engine_validation"),
    description="The engine's greedy tokens, logits and token ids are its checkpoint's.",
    next_action="optimise: choose a finer precision or smaller blocks in the engine section",
    policy=lambda spec: canonical(spec.gates.parity),
)
ENGINE_ACCURACY = Gate(
    name="engine_accuracy",
    asset="engine_validation",
    subjects=("evaluation_data", "engine", "engine_validation"),
    description="Exact match of the engine on held-out data, overall and in every slice.",
    next_action="optimise: choose a finer precision or smaller blocks in the engine section",
    policy=lambda spec: canonical(spec.gates.engine_accuracy),
)
PACKAGE_INTEGRITY = Gate(
    name="package_integrity",
    asset="packaged_model",
    subjects=("engine", "checkpoint", "packaged_model"),
    description="The package holds this engine and tokenizer, and Triton can read its config.",
    next_action="materialize packaged_model again; if it repeats, report it with the package",
)
STAGING_SMOKE = Gate(
    name="staging_smoke",
    asset="staging_deployment",
    subjects=("packaged_model", "staging_deployment"),
    description="The package answers known questions in staging, in time.",
    next_action="look at the slot's log with `llmops logs`, mend the model, make a new release",
    policy=lambda spec: [canonical(spec.gates.smoke), canonical(spec.serving)],
)
APPROVAL = Gate(
    name="separation_of_duties",
    asset="production_approval",
    subjects=("packaged_model", "production_approval"),
    description="Somebody who may do so approved exactly this package.",
    next_action="have the release approved in the launchpad of `promote`",
)
CANDIDATE_SMOKE = Gate(
    name="candidate_smoke",
    asset="production_candidate",
    subjects=("packaged_model", "production_candidate"),
    description="The package answers known questions in production's idle slot, in time.",
    next_action="look at the slot's log with `llmops logs`, mend the model, make a new release",
    policy=lambda spec: [canonical(spec.gates.smoke), canonical(spec.serving)],
)
CANARY = Gate(
    name="canary",
    asset="production_deployment",
    # Of the package alone: who served fully may be rolled back to, in whichever slot.
    subjects=("packaged_model",),
    description="After the route moved, the gateway answers known questions from this release.",
    # The route has gone back by itself.
    next_action="look at the slot's log with `llmops logs`, mend the model, make a new release",
    policy=lambda spec: [canonical(spec.gates.smoke), canonical(spec.serving)],
)
SERVICE = Gate(
    name="service_objectives",
    asset="service_metrics",
    subjects=("service_metrics",),
    description="Errors and latency of what serves are within the objectives.",
    next_action="look at `llmops logs`, and roll back if the release is the cause",
    policy=lambda spec: canonical(spec.gates.service),
)
SCALING = Gate(
    name="scaling_bounds",
    asset="scaling_policy",
    subjects=("scaling_policy",),
    description="The bounds are sane, and what runs is within them.",
    next_action="look at the slots with `llmops status`",
)
INCIDENTS_ANSWERED = Gate(
    name="incidents_answered",
    asset="incidents",
    subjects=("incidents",),
    description="Somebody did something about every incident.",
    next_action="answer the open incidents",
)
NOTHING_ROUTES = Gate(
    name="nothing_routes",
    asset="deprecated_version",
    subjects=("deprecated_version",),
    description="No route sends traffic to the release.",
    next_action="promote another release first, then deprecate this one again",
)
RESTORES = Gate(
    name="restores",
    asset="archive",
    subjects=("deprecated_version", "archive"),
    description="The archive restores byte for byte.",
    next_action="check the cold storage and materialize archive again",
)
REMOVED = Gate(
    name="gone",
    asset="removed_version",
    subjects=("archive", "removed_version"),
    description="No slot holds the release any more.",
    next_action="materialize removed_version again and look at the slots with `llmops status`",
)

DEVELOPED = (SPEC_COMPLETE, LEAKAGE, CHECKPOINT_SAFE, ACCURACY)
REGISTERED = (*DEVELOPED, REGISTERED_BYTES)
BUILT = (
    *REGISTERED,
    WEIGHTS_COMPLETE,
    FITS_TARGET,
    PARITY,
    ENGINE_ACCURACY,
    PACKAGE_INTEGRITY,
)
"""What a package needs before any slot may load it."""
STAGED = (*BUILT, STAGING_SMOKE)
APPROVED = (*STAGED, APPROVAL)
"""What a release needs before production loads it."""
PROVEN = (*APPROVED, CANDIDATE_SMOKE)
"""What a release needs before it gets traffic."""
