"""Technical documentation by Annex IV of the EU AI Act, as far as the evidence has it.

The points are those of Annex IV of Regulation (EU) 2024/1689, which Article 11(1) asks for of
high-risk AI systems; their wording here is shortened. Whether a system is one of high risk,
and whether what stands here is enough, is for its provider to judge. What the platform cannot
know is left to a person, plainly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from llmops_assets.evidence.statistics import Decision
from llmops_assets.reports.audit_record import AuditRecord, Section
from llmops_assets.reports.markdown import plain
from llmops_assets.reports.summary import in_production
from llmops_assets.reports.wording import moment, number, title

REGULATION = "Regulation (EU) 2024/1689, Annex IV"
TO_ADD = "A human must add"

Known = Callable[[AuditRecord], list[str]]


class Point(Section):
    """One point of the annex."""

    point: str = Field(description="Such as `2(d)`.")
    asks: str = Field(description="What the annex asks for, shortened.")
    known: tuple[str, ...] = Field(description="What the evidence says.")
    to_add: tuple[str, ...] = Field(description="What a human must add.")


class AnnexIV(Section):
    """The technical documentation of one release."""

    regulation: Literal["Regulation (EU) 2024/1689, Annex IV"] = REGULATION
    release: str
    evidence_holds: bool
    trust_root: str | None
    points: tuple[Point, ...]

    def markdown(self) -> str:
        """It as Markdown."""
        lines = [
            f"# Technical documentation of {plain(self.release)}",
            "",
            f"By {self.regulation}, in the order of its points. What is known comes from signed "
            "statements"
            + (" that were verified." if self.evidence_holds else ", which do NOT all verify."),
            f"Trust root: `{self.trust_root or 'none'}`.",
            "",
            "Wording of the points is shortened; the regulation's own text counts. Whether the "
            "system is of high risk, and whether this is enough, is for its provider to judge.",
        ]
        for point in self.points:
            lines += ["", f"## {point.point} {point.asks}", ""]
            lines += [f"- {plain(known)}" for known in point.known]
            lines += [f"- **{TO_ADD}:** {missing}." for missing in point.to_add]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _Asked:
    point: str
    asks: str
    to_add: tuple[str, ...]
    known: Known = lambda _: []


def annex_iv(record: AuditRecord) -> AnnexIV:
    """Fills the annex from the record of a release."""
    return AnnexIV(
        release=record.identity.release,
        evidence_holds=record.integrity.holds,
        trust_root=record.integrity.trust_root,
        points=tuple(
            Point(
                point=asked.point,
                asks=asked.asks,
                known=tuple(asked.known(record)),
                to_add=asked.to_add,
            )
            for asked in ASKED
        ),
    )


def _purpose(record: AuditRecord) -> list[str]:
    identity, card = record.identity, record.card
    return _present(
        ("Purpose, as the specification states it", identity.use_case),
        ("Intended use, from the model card", card and card.intended_use),
        ("Responsible team", identity.owner),
        ("Version", f"release {identity.release}, version {identity.version or 'none'} of the "
         f"model {identity.model}"),
        ("Derived from", identity.derived_from),
        ("Digest of what is deployed", identity.package),
    )  # fmt: skip


def _software(record: AuditRecord) -> list[str]:
    versions = ", ".join(f"{name} {'/'.join(v)}" for name, v in record.build.versions.items())
    return _present(
        ("Toolchain", record.build.toolchain),
        ("Versions that took part", versions),
        *((f"Container image of {title(a).lower()}", i) for a, i in record.build.images.items()),
        *((f"Document, {document.name}", f"{document.asset}/{document.file}, {document.digest}")
          for document in record.documents),
    )  # fmt: skip


def _forms(record: AuditRecord) -> list[str]:
    package = record.identity.package
    return [] if package is None else [
        f"A package for Triton Inference Server, answered over its HTTP and gRPC interface: "
        f"{package}"
    ]  # fmt: skip


def _hardware(record: AuditRecord) -> list[str]:
    return _present(
        *((f"Built for {name}", value) for name, value in record.build.hardware.items()),
        ("GPU that the specification names", (record.spec or {}).get("engine", {}).get("gpu")),
    )


def _instructions(record: AuditRecord) -> list[str]:
    constraints = (record.spec or {}).get("constraints")
    return _present(
        ("Limits of a request, tokens", constraints and number(constraints)),
        ("Languages", record.card and ", ".join(record.card.languages)),
        ("Contact", record.card and record.card.contact),
    )


def _methods(record: AuditRecord) -> list[str]:
    weights = (record.spec or {}).get("weights")
    base = next((given for given in record.inputs if given.name == "base weights"), None)
    steps = [
        f"{title(step.asset)}: "
        + ("run" if step.reused_from is None else f"taken over from {step.reused_from}")
        + f", result {step.artifact}"
        for step in record.build.steps
    ]
    return [
        *_present(
            ("Where the weights come from", weights and number(weights)),
            ("Pre-trained weights of others", base and f"{base.uri or base.provenance}"),
            ("Model they were tuned from, from the model card", record.card
             and record.card.base_model),
        ),
        *steps,
    ]  # fmt: skip


def _design(record: AuditRecord) -> list[str]:
    spec = record.spec or {}
    metrics = spec.get("metrics")
    return _present(
        ("Optimised for the metrics", metrics and number(metrics)),
        ("Limitations, from the model card", record.card and record.card.limitations),
    )


def _architecture(record: AuditRecord) -> list[str]:
    architecture = (record.spec or {}).get("weights", {}).get("architecture")
    seconds = {
        title(step.asset).lower(): (step.finished - step.started).total_seconds()
        for step in record.build.steps
        if step.reused_from is None
    }
    return _present(
        ("Architecture", architecture and number(architecture)),
        ("Engine settings", record.build.flags and number(record.build.flags)),
        ("Seconds that the steps took", seconds and number(seconds)),
        *((f"Machine, {name}", value) for name, value in record.build.hardware.items()),
    )


def _data(record: AuditRecord) -> list[str]:
    found: list[str] = []
    for given in record.inputs:
        if given.name.endswith(" data"):
            name = given.name.capitalize()
            found += _present(
                (f"{name}, digest", given.digest),
                (f"{name}, licence", given.license),
                (f"{name}, where from", given.provenance),
                (f"{name}, extent", given.facts and number(given.facts)),
            )
    found += _present(("From the model card", record.card and record.card.training_data))
    return found


def _oversight(record: AuditRecord) -> list[str]:
    decided = [
        f"Before production {a.approver} decided “{a.decision}” ({a.known_by}) at "
        f"{moment(a.time)}: {a.reason}"
        for a in record.approvals
        if a.kind == "verified"
    ]
    return [*decided, "Production traffic can be taken back at once, with llmops rollback"]


def _changes_foreseen(record: AuditRecord) -> list[str]:
    spec = record.spec or {}
    retraining = spec.get("retraining")
    return _present(
        ("Retraining by schedule", number(retraining) if retraining else "none"),
        ("Roll-out", spec.get("rollout") and number(spec["rollout"])),
    )


def _testing(record: AuditRecord) -> list[str]:
    evaluated = record.step("evaluation")
    measured = evaluated and {
        name: value for name, value in evaluated.facts.items() if isinstance(value, int | float)
    }
    return [
        *_present(("Measured on held-out data", measured and number(measured))),
        *_verdicts(record),
        "Every verdict is a signed and dated in-toto statement (test-result v0.1) in the log",
    ]


def _verdicts(record: AuditRecord) -> Iterator[str]:
    for name, found in record.counting.items():
        verdict = found.verdict
        word = verdict.decision.value
        if found.waived is not None:
            word += f", waived by {found.waived.waiver.owner}"
        yield f"Gate {name}, {moment(verdict.time)}: {word}. {verdict.reason}"


def _security(record: AuditRecord) -> list[str]:
    judged = record.counting
    found = [
        f"{what}: {judged[gate].verdict.decision.value}"
        for gate, what in (
            ("checkpoint_safe", "Weights without executable code"),
            ("package_safe", "Package without pickles and secrets"),
        )
        if gate in judged
    ]
    signature = record.integrity.package_signature
    if signature is not None:
        found.append(f"Signature of the package (OpenSSF Model Signing): {signature}")
    found.append("Every statement about the release is signed, in a log that can only grow")
    return found


def _performance(record: AuditRecord) -> list[str]:
    found: list[str] = []
    for gate in ("accuracy", "engine_accuracy", "fairness"):
        counting = record.counting.get(gate)
        for finding in () if counting is None else counting.verdict.findings:
            group = f" for {finding.slice}" if finding.slice else ""
            found.append(
                f"{finding.metric}{group}: {number(finding.value)}, expected {finding.threshold} "
                f"({finding.decision.value})"
            )
    card = record.card
    constraints = (record.spec or {}).get("constraints")
    return [
        *found,
        *_present(
            ("How well it does, from the model card", card and card.evaluation),
            ("Limitations, from the model card", card and card.limitations),
            ("Input, tokens at most", constraints and constraints.get("max_input_tokens")),
        ),
    ]


def _metrics(record: AuditRecord) -> list[str]:
    gates = (record.spec or {}).get("gates", {})
    return _present(
        ("Metrics with their thresholds", gates.get("accuracy") and number(gates["accuracy"])),
        ("Fairness", gates.get("fairness") and number(gates["fairness"])),
        ("Confidence of intervals", gates.get("confidence")),
    )


def _risks(record: AuditRecord) -> list[str]:
    open_points = [f"Open in the evidence: {gap.what}" for gap in record.gaps]
    waived = [
        f"Accepted by a waiver until {moment(use.waiver.expires)}: {use.gate}, {use.waiver.reason}"
        for use in {use.gate: use for use in record.waivers}.values()
    ]
    return [*waived, *open_points]


def _changes(record: AuditRecord) -> list[str]:
    found = _present(("Follows", record.identity.derived_from))
    for period in in_production(record):
        until = "now" if period.until is None else moment(period.until)
        found.append(f"In production {moment(period.since)} to {until}, {period.weight} %")
    found.append("What differs from another release is shown by llmops diff")
    return found


def _standards(_: AuditRecord) -> list[str]:
    return [
        "Specifications used for the evidence: in-toto Attestation v1, SLSA Provenance v1 and "
        "Verification Summary v1, DSSE, RFC 6962, OpenSSF Model Signing v1, CycloneDX; none of "
        "them is a harmonised standard under this regulation"
    ]


def _monitoring(record: AuditRecord) -> list[str]:
    readings = record.operation.metrics
    service = record.counting.get("service_objectives")
    answered = [i for i in record.operation.incidents if i.answered is not None]
    spec = record.spec or {}
    return _present(
        ("Service objectives", number(spec.get("gates", {}).get("service")) if spec else None),
        ("Rules for alerts", number(spec["alerts"]) if spec.get("alerts") else None),
        ("Readings on record", str(len(readings)) if readings else None),
        ("Newest judgement", service and service.verdict.reason),
        ("Incidents", f"{len(record.operation.incidents)}, of which {len(answered)} answered"),
        ("Failed verdicts on record", str(sum(
            found.verdict.decision is Decision.FAILED for found in record.gates))),
    )  # fmt: skip


def _present(*facts: tuple[str, object]) -> list[str]:
    """Those that are known, each in a line."""
    return [f"{name}: {value}" for name, value in facts if value not in (None, "", {}, ())]


ASKED = (
    _Asked(
        "1(a)",
        "Intended purpose, name of the provider, version and its relation to previous versions",
        ("name and address of the provider", "the intended purpose as it is declared to users"),
        _purpose,
    ),
    _Asked(
        "1(b)",
        "How the system interacts with hardware or software that is not part of it, other AI "
        "systems included",
        ("the systems of provider and deployers that call it, and what they do with answers",),
    ),
    _Asked(
        "1(c)",
        "Versions of relevant software or firmware, and requirements of version updates",
        ("firmware and software of the machines that serve it", "how users get updates"),
        _software,
    ),
    _Asked(
        "1(d)",
        "All forms in which it is placed on the market or put into service",
        ("in which products or services it is offered",),
        _forms,
    ),
    _Asked(
        "1(e)",
        "Hardware on which it is intended to run",
        ("the hardware that users are told to have",),
        _hardware,
    ),
    _Asked(
        "1(f)",
        "Where it is a component of products: pictures of their outside, marking and inside",
        ("photographs or illustrations, if it is a component of a product",),
    ),
    _Asked(
        "1(g)",
        "Basic description of the user interface provided to the deployer",
        ("a description of the user interface, if there is one",),
    ),
    _Asked(
        "1(h)",
        "Instructions for use for the deployer",
        ("the instructions for use by Article 13",),
        _instructions,
    ),
    _Asked(
        "2(a)",
        "Methods and steps of development, with use of pre-trained systems or tools of others",
        ("why these methods were chosen", "terms of what was taken from others"),
        _methods,
    ),
    _Asked(
        "2(b)",
        "Design specifications: general logic, key design choices, rationale and assumptions, "
        "what it is optimised for, expected output, trade-offs",
        (
            "the rationale of the choices, and the persons or groups it is meant for",
            "trade-offs made to meet Chapter III, Section 2",
        ),
        _design,
    ),
    _Asked(
        "2(c)",
        "System architecture, and computational resources for development, training, testing "
        "and validation",
        ("how the model fits into the whole system", "energy and machines used, where asked for"),
        _architecture,
    ),
    _Asked(
        "2(d)",
        "Data sheets: training methods, data sets, their provenance, scope and characteristics, "
        "how obtained and selected, labelling, cleaning",
        ("how the data were selected, labelled and cleaned", "who is in them and who is not"),
        _data,
    ),
    _Asked(
        "2(e)",
        "Assessment of the human oversight measures by Article 14, with the means to interpret "
        "outputs by Article 13(3)(d)",
        ("the assessment of human oversight while it is used", "how outputs are to be read"),
        _oversight,
    ),
    _Asked(
        "2(f)",
        "Pre-determined changes of the system and its performance",
        ("which changes are foreseen, and how compliance is kept through them",),
        _changes_foreseen,
    ),
    _Asked(
        "2(g)",
        "Validation and testing: procedures, data, metrics of accuracy, robustness and "
        "discriminatory impact; test logs and reports, dated and signed by those responsible",
        (
            "tests of robustness, and of impacts that the slices of the data do not show",
            "signatures of the persons responsible: the platform's key signs for the platform",
        ),
        _testing,
    ),
    _Asked(
        "2(h)",
        "Cybersecurity measures",
        ("measures of the systems around it: access, network, monitoring, prompt attacks",),
        _security,
    ),
    _Asked(
        "3",
        "Monitoring, functioning and control: capabilities and limits, accuracy for persons or "
        "groups, foreseeable unintended outcomes and risks, oversight, input data",
        (
            "foreseeable unintended outcomes, and risks to health, safety and fundamental rights",
            "oversight measures by Article 14, as put in place",
        ),
        _performance,
    ),
    _Asked(
        "4",
        "Appropriateness of the performance metrics for this system",
        ("why these metrics and thresholds are the right ones for the purpose",),
        _metrics,
    ),
    _Asked(
        "5",
        "Risk management system by Article 9",
        ("the risk management system: identified risks, estimates, measures, residual risks",),
        _risks,
    ),
    _Asked(
        "6",
        "Relevant changes made by the provider through the lifecycle",
        ("which of the changes are substantial modifications by Article 3(23)",),
        _changes,
    ),
    _Asked(
        "7",
        "Harmonised standards applied, or the solutions adopted in their place",
        ("the harmonised standards applied, or how Chapter III, Section 2 is met without them",),
        _standards,
    ),
    _Asked(
        "8",
        "Copy of the EU declaration of conformity by Article 47",
        ("the signed EU declaration of conformity",),
    ),
    _Asked(
        "9",
        "System to evaluate performance in the post-market phase by Article 72, with the "
        "post-market monitoring plan",
        ("the post-market monitoring plan by Article 72(3)",),
        _monitoring,
    ),
)
"""The points of the annex in their order."""
