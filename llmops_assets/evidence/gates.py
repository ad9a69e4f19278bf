"""The decision gates of the lifecycle, in order: what each judges and what follows.

How a gate judges is a plain function beside the phase it belongs to. Here is what the
rest of the platform must know of it: whose bytes it is about, under which policy, what a
person does when it fails, who that is, and whether a reviewed waiver may let it pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from llmops_assets.policy import Policy
from llmops_assets.spec import ModelSpec, canonical

JudgedBy = Callable[[ModelSpec, Policy], Any]

DATA_SCIENCE = "team:data-science"
ML_ENGINEERING = "team:ml-engineering"
PLATFORM = "team:platform"
SRE = "team:sre"


class NextAction(StrEnum):
    """What the workflow does after a gate that did not pass."""

    ITERATE = "iterate"
    """Change data or training."""
    OPTIMISE = "optimise"
    """Change the engine or how it serves."""
    FIX = "fix"
    """Mend what is wrong."""


def _nothing(_: ModelSpec, __: Policy) -> None:
    """What a gate without thresholds is judged by."""


def _smoke(spec: ModelSpec, _: Policy) -> Any:
    return [canonical(spec.gates.smoke), canonical(spec.serving)]


def _section(name: str) -> JudgedBy:
    """One section of the spec's gates, and the confidence that all of them share."""

    def judged_by(spec: ModelSpec, _: Policy) -> Any:
        gates = canonical(spec.gates)
        return [gates[name], gates["confidence"]]

    return judged_by


def _metrics(name: str) -> JudgedBy:
    """As `_section`, with what the metrics are that it names."""
    section = _section(name)

    def judged_by(spec: ModelSpec, policy: Policy) -> Any:
        return [section(spec, policy), canonical(spec)["metrics"]]

    return judged_by


@dataclass(frozen=True)
class Gate:
    """A decision gate."""

    name: str
    asset: str
    """The asset whose check shows it."""
    subjects: tuple[str, ...]
    """The assets whose digests a verdict binds."""
    description: str
    action: NextAction
    advice: str
    """What to do when it fails."""
    owner: str
    """The role that does it."""
    waivable: bool = False
    """Whether a reviewed waiver counts. Never for integrity, safety, malware or approval."""
    judged_by: JudgedBy = _nothing
    """The part of spec and policy that it judges by, as JSON values."""
    compares: bool = False
    """Whether it compares with what serves, so that another serving release makes it stale."""
    waits_for: tuple[str, ...] = ()
    """Subjects that are not upstream of `asset`, so that the check must wait for them."""
    version: int = 1
    """Raised when the way of judging changes, which makes earlier verdicts stale."""

    @property
    def next_action(self) -> str:
        """Such as "iterate: train longer"."""
        return f"{self.action}: {self.advice}"


SPEC_COMPLETE = Gate(
    name="spec_complete",
    asset="model_spec",
    subjects=("model_spec",),
    description="Use case, metrics and constraints are there and fit each other.",
    action=NextAction.FIX,
    advice="complete the spec and make a new release",
    owner=DATA_SCIENCE,
)
LEAKAGE = Gate(
    name="no_leakage",
    # On the training data, so that a leak stops the training.
    asset="training_data",
    subjects=("training_data", "evaluation_data"),
    waits_for=("evaluation_data",),
    description="No prompt of the evaluation data is in the training data.",
    action=NextAction.FIX,
    advice="take the overlapping rows out of one split and make a new release",
    owner=DATA_SCIENCE,
)
DATA_COMPLIANCE = Gate(
    name="data_compliance",
    asset="data_report",
    subjects=("training_data", "data_report"),
    description="The training data may be used: licence, provenance, no personal data.",
    action=NextAction.FIX,
    advice="take the rows out that the report names, or declare the licence and provenance, "
    "and make a new release",
    owner=DATA_SCIENCE,
    waivable=True,
    judged_by=lambda spec, policy: [canonical(spec.data), list(policy.licenses)],
)
CHECKPOINT_SAFE = Gate(
    name="checkpoint_safe",
    asset="checkpoint",
    subjects=("checkpoint",),
    description="Only safetensors, no code, finite weights, loads without trust.",
    action=NextAction.FIX,
    advice="export the weights as safetensors without code and make a new release",
    owner=DATA_SCIENCE,
)
ACCURACY = Gate(
    name="accuracy",
    asset="evaluation",
    subjects=("checkpoint", "evaluation_data", "evaluation"),
    description="The spec's metrics on held-out data, overall and in every slice.",
    action=NextAction.ITERATE,
    advice="train longer, or on better data, and make a new release",
    owner=DATA_SCIENCE,
    waivable=True,
    judged_by=_metrics("accuracy"),
)
FAIRNESS = Gate(
    name="fairness",
    asset="evaluation",
    subjects=("checkpoint", "evaluation_data", "evaluation"),
    description="No slice of the data is served much worse than another.",
    action=NextAction.ITERATE,
    advice="train on more or better data of the worst slice, and make a new release",
    owner=DATA_SCIENCE,
    waivable=True,
    judged_by=_section("fairness"),
)
REGRESSION = Gate(
    name="no_regression",
    asset="evaluation",
    subjects=("checkpoint", "evaluation_data", "evaluation"),
    description="No metric is worse than that of what serves by more than its margin.",
    action=NextAction.ITERATE,
    advice="find the rows that got worse in predictions.parquet, train on such, and make a "
    "new release",
    owner=DATA_SCIENCE,
    waivable=True,
    judged_by=_metrics("accuracy"),
    compares=True,
)
LATENCY = Gate(
    name="latency",
    asset="evaluation",
    subjects=("checkpoint", "evaluation"),
    description="The checkpoint answers in the time that the spec allows it.",
    action=NextAction.OPTIMISE,
    advice="choose a smaller architecture or shorter answers, and make a new release",
    owner=DATA_SCIENCE,
    waivable=True,
    judged_by=_section("latency"),
)
REGISTERED_BYTES = Gate(
    name="registered_bytes",
    asset="registered_model",
    subjects=("checkpoint", "evaluation", "registered_model"),
    description="The registered version carries the digest of the evaluated checkpoint.",
    action=NextAction.FIX,
    advice="find out who changed the registry's tags, and make a new release",
    owner=DATA_SCIENCE,
)
WEIGHTS_COMPLETE = Gate(
    name="weights_complete",
    asset="converted_weights",
    subjects=("checkpoint", "converted_weights"),
    description="The converted weights are whole and come from this checkpoint.",
    action=NextAction.FIX,
    advice="materialize converted_weights again; if it repeats, check the toolchain's version",
    owner=ML_ENGINEERING,
)
FITS_TARGET = Gate(
    name="fits_target",
    asset="engine",
    subjects=("engine",),
    description="The engine can run on the machines that will serve it.",
    action=NextAction.FIX,
    advice="build for the target: correct the spec's engine section",
    owner=ML_ENGINEERING,
    judged_by=lambda spec, _: canonical(spec.engine),
)
PARITY = Gate(
    name="parity",
    asset="engine_validation",
    subjects=("checkpoint", "engine", "engine_validation"),
    description="The engine's greedy tokens, logits and token ids are its checkpoint's.",
    action=NextAction.OPTIMISE,
    advice="choose a finer precision or smaller blocks in the engine section",
    owner=ML_ENGINEERING,
    waivable=True,
    judged_by=lambda spec, _: canonical(spec.gates.parity),
)
ENGINE_ACCURACY = Gate(
    name="engine_accuracy",
    asset="engine_validation",
    subjects=("evaluation_data", "engine", "engine_validation"),
    description="The spec's metrics of the engine on held-out data, overall and in every slice.",
    action=NextAction.OPTIMISE,
    advice="choose a finer precision or smaller blocks in the engine section",
    owner=ML_ENGINEERING,
    waivable=True,
    judged_by=_metrics("engine_accuracy"),
)
ENGINE_LATENCY = Gate(
    name="engine_latency",
    asset="engine_validation",
    subjects=("engine", "engine_validation"),
    description="The engine answers in the time that the spec allows it.",
    action=NextAction.OPTIMISE,
    advice="choose a coarser precision or more threads, and make a new release",
    owner=ML_ENGINEERING,
    waivable=True,
    judged_by=_section("latency"),
)
PACKAGE_INTEGRITY = Gate(
    name="package_integrity",
    asset="packaged_model",
    subjects=("engine", "checkpoint", "packaged_model"),
    description="The package holds this engine and tokenizer, and Triton can read its config.",
    action=NextAction.FIX,
    advice="materialize packaged_model again; if it repeats, report it with the package",
    owner=ML_ENGINEERING,
)
PACKAGE_SAFE = Gate(
    name="package_safe",
    asset="compliance_report",
    subjects=("checkpoint", "packaged_model", "compliance_report"),
    description="No file of checkpoint and package is a pickle or holds a secret.",
    action=NextAction.FIX,
    advice="take out the files that the report names; revoke a secret that leaked, and make a "
    "new release",
    owner=ML_ENGINEERING,
)
COMPLIANCE = Gate(
    name="compliance",
    asset="compliance_report",
    subjects=("checkpoint", "packaged_model", "compliance_report"),
    description="Licences are on the list, the model card is complete, the ML-BOM is valid.",
    action=NextAction.FIX,
    advice="complete what the report names, and make a new release",
    owner=ML_ENGINEERING,
    waivable=True,
    judged_by=lambda spec, policy: [canonical(spec.card), list(policy.licenses)],
)
STAGING_SMOKE = Gate(
    name="staging_smoke",
    asset="staging_deployment",
    subjects=("packaged_model", "staging_deployment"),
    description="The package answers known questions in staging, in time.",
    action=NextAction.FIX,
    advice="look at the slot's log with `llmops logs`, mend the model, make a new release",
    owner=ML_ENGINEERING,
    judged_by=_smoke,
)
STAGING_LATENCY = Gate(
    name="staging_latency",
    asset="staging_deployment",
    subjects=("packaged_model", "staging_deployment"),
    description="Under load the server answers in the time that the spec allows it.",
    action=NextAction.OPTIMISE,
    advice="choose a coarser precision or fewer requests at once, and make a new release",
    owner=ML_ENGINEERING,
    waivable=True,
    judged_by=_section("latency"),
)
APPROVAL = Gate(
    name="separation_of_duties",
    asset="production_approval",
    subjects=("packaged_model", "production_approval"),
    description="Somebody who may do so approved exactly this package.",
    action=NextAction.FIX,
    advice="have the release approved in the launchpad of `promote`",
    owner=ML_ENGINEERING,
)
CANDIDATE_SMOKE = Gate(
    name="candidate_smoke",
    asset="production_candidate",
    subjects=("packaged_model", "production_candidate"),
    description="The package answers known questions in production's idle slot, in time.",
    action=NextAction.FIX,
    advice="look at the slot's log with `llmops logs`, mend the model, make a new release",
    owner=PLATFORM,
    judged_by=_smoke,
)
CANARY = Gate(
    name="canary",
    asset="production_deployment",
    # Of the package alone: who served fully may be rolled back to, in whichever slot.
    subjects=("packaged_model",),
    description="While its share of the traffic grew, errors, latency and known answers stayed "
    "within the objectives.",
    # The route has gone back by itself.
    action=NextAction.FIX,
    advice="look at the slot's log with `llmops logs`, mend the model, make a new release",
    owner=PLATFORM,
    judged_by=lambda spec, policy: [*_smoke(spec, policy), canonical(spec.rollout)],
    version=2,
)
SERVICE = Gate(
    name="service_objectives",
    asset="service_metrics",
    subjects=("service_metrics",),
    description="Errors and latency of what serves are within the objectives.",
    action=NextAction.FIX,
    advice="look at `llmops logs`, and roll back if the release is the cause",
    owner=SRE,
    judged_by=lambda spec, _: canonical(spec.gates.service),
)
SCALING = Gate(
    name="scaling_bounds",
    asset="scaling_policy",
    subjects=("scaling_policy",),
    description="The bounds are sane, and what runs is within them.",
    action=NextAction.FIX,
    advice="look at the slots with `llmops status`",
    owner=PLATFORM,
)
INCIDENTS_ANSWERED = Gate(
    name="incidents_answered",
    asset="incidents",
    subjects=("incidents",),
    description="Somebody did something about every incident.",
    action=NextAction.FIX,
    advice="answer the open incidents",
    owner=SRE,
)
NOTHING_ROUTES = Gate(
    name="nothing_routes",
    asset="deprecated_version",
    subjects=("deprecated_version",),
    description="No route sends traffic to the release.",
    action=NextAction.FIX,
    advice="promote another release first, then deprecate this one again",
    owner=SRE,
)
RESTORES = Gate(
    name="restores",
    asset="archive",
    subjects=("deprecated_version", "archive"),
    description="The archive restores byte for byte.",
    action=NextAction.FIX,
    advice="check the cold storage and materialize archive again",
    owner=PLATFORM,
)
REMOVED = Gate(
    name="gone",
    asset="removed_version",
    subjects=("archive", "removed_version"),
    description="No slot holds the release any more.",
    action=NextAction.FIX,
    advice="materialize removed_version again and look at the slots with `llmops status`",
    owner=PLATFORM,
)

DEVELOPED = (
    SPEC_COMPLETE,
    LEAKAGE,
    DATA_COMPLIANCE,
    CHECKPOINT_SAFE,
    ACCURACY,
    FAIRNESS,
    REGRESSION,
    LATENCY,
)
REGISTERED = (*DEVELOPED, REGISTERED_BYTES)
BUILT = (
    *REGISTERED,
    WEIGHTS_COMPLETE,
    FITS_TARGET,
    PARITY,
    ENGINE_ACCURACY,
    ENGINE_LATENCY,
    PACKAGE_INTEGRITY,
    PACKAGE_SAFE,
    COMPLIANCE,
)
"""What a package needs before any slot may load it."""
STAGED = (*BUILT, STAGING_SMOKE, STAGING_LATENCY)
APPROVED = (*STAGED, APPROVAL)
"""What a release needs before production loads it."""
PROVEN = (*APPROVED, CANDIDATE_SMOKE)
"""What a release needs before it gets traffic."""
OPERATED = (SERVICE, SCALING, INCIDENTS_ANSWERED)
RETIRED = (NOTHING_ROUTES, RESTORES, REMOVED)

GATES: Mapping[str, Gate] = {gate.name: gate for gate in (*PROVEN, CANARY, *OPERATED, *RETIRED)}
"""Every gate by its name, in the order of the lifecycle."""
