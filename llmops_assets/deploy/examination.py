"""What speaks against a signed approval, as of now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from llmops_assets.deploy.accepted_approvers import PolicyInForce
from llmops_assets.deploy.approvers import Approver, ApproverKey, Rule
from llmops_assets.deploy.revocation import Revoked, last_revocation
from llmops_assets.deploy.separation import people_behind
from llmops_assets.deploy.signed_decision import CLOCK_SKEW, SignedDecision, changed_log
from llmops_assets.errors import ApprovalError
from llmops_assets.evidence.gates import STAGED, Gate
from llmops_assets.evidence.verdicts import Verdict, all_verdicts, judged_by
from llmops_assets.platform import Platform
from llmops_assets.release import Release
from llmops_assets.serving.slots import Environment


@dataclass(frozen=True)
class Examination:
    """All that approvals of one release are held against, read once."""

    platform: Platform
    release: str
    package: str
    """Digest of the package in hand."""
    force: PolicyInForce
    rule: Rule
    behind: Mapping[str, str]
    """Who may not approve it, and why."""
    revoked: Revoked | None
    judged: Mapping[str, Verdict]
    """Every verdict about the release by its statement's digest, oldest first."""
    judges_by: str
    """Digest of all that the gates judge by."""
    now: datetime

    def objection(
        self, signed: SignedDecision, approver: Approver, key: ApproverKey, recorded: datetime
    ) -> str | None:
        """Why an approval does not count; None if it does.

        Args:
            signed: what was signed by that approver with that key.
            recorded: when it came into the log, or now.
        """
        if signed.release != self.release:
            return f"it approves {signed.release}, not {self.release}"
        model = Release.parse(self.release).model
        if (signed.environment, signed.model) != (Environment.PRODUCTION, model):
            return f"it is about {signed.model} in {signed.environment}, not {model} in production"
        if signed.package != self.package:
            return f"it is about package {signed.package}, not {self.package}"
        if signed.approver != approver.name:
            return f"it was signed by {approver.name}, in the name of {signed.approver}"
        for at in (recorded, self.now):
            if objection := key.objection(at):
                return objection
        return (
            self._untimely(signed)
            or self._not_entitled(approver)
            or self._overtaken(signed)
            or changed_log(self.platform, signed.log)
        )

    def _untimely(self, signed: SignedDecision) -> str | None:
        if self.now < signed.not_before:
            return f"it counts from {signed.not_before:%F %T} UTC on"
        if self.now >= signed.expires:
            return f"it expired at {signed.expires:%F %T} UTC"
        # A time in the future would make it longer. Clocks differ a little, though.
        since = min(signed.time, self.now + CLOCK_SKEW)
        if signed.expires - since > self.rule.longest_validity:
            return (
                f"it is made to count until {signed.expires:%F %T} UTC, longer than the "
                f"{self.rule.longest_validity_days:g} days that the policy allows"
            )
        return None

    def _not_entitled(self, approver: Approver) -> str | None:
        if not self.force.policy.may_approve(self.rule, approver):
            return "the policy does not name them for this model"
        if self.rule.separation and (name := approver.is_one_of(self.behind)) is not None:
            return f"they cannot approve it themselves: {name} {self.behind[name]}"
        return None

    def _overtaken(self, signed: SignedDecision) -> str | None:
        """Something happened that the approver did not know when signing."""
        if self.revoked is not None and signed.log.size <= self.revoked.sequence:
            return f"it was made before {self.revoked.words}"
        if signed.policy != self.judges_by:
            return "the gates judge by another policy than when it was made"
        newest = {verdict.gate: verdict for verdict in self.judged.values()}
        for gate in STAGED:
            named = self.judged.get(signed.verdicts.get(gate.name, ""))
            if named is None or named.gate != gate.name:
                return f"it names no verdict of {gate.name}"
            if not self._same(gate, named, newest[gate.name]):
                return f"the verdict of {gate.name} has changed since"
        return None

    def _same(self, gate: Gate, named: Verdict, newest: Verdict) -> bool:
        """Whether judging again has told nothing new: each promotion compares once more."""
        if gate.compares and newest.passed and newest.baseline == self.package:
            return True  # it serves by now, and was compared with itself
        apart = {"run", "time"}
        return named.model_dump(exclude=apart) == newest.model_dump(exclude=apart)


def examine(
    platform: Platform, release: str, force: PolicyInForce, started_by: str | None
) -> Examination:
    """Reads all that approvals of a release are held against.

    Raises:
        ApprovalError: the policy lets nobody approve this model, or nobody can tell who wrote
            the release.
        TriggerError: the repository does not answer.
        EvidenceError: evidence is missing or does not fit.
    """
    model = Release.parse(release).model
    rule = force.policy.rule_for(Environment.PRODUCTION, model)
    if rule is None:
        raise ApprovalError(
            f"Nobody may approve {model} for production",
            expected="a rule for it in the policy of approvers",
            found=f"none{force.note}",
            cure="add one to approvers.yaml, signed by a quorum of its approvers",
        )
    return Examination(
        platform=platform,
        release=release,
        package=platform.columns.get(release, "packaged_model").artifact,
        force=force,
        rule=rule,
        behind=people_behind(platform, release, started_by) if rule.separation else {},
        revoked=last_revocation(platform.evidence, release),
        judged={digest: verdict for verdict, digest in all_verdicts(platform.evidence, release)},
        judges_by=judged_by(STAGED, platform.spec(release), platform.policy),
        now=datetime.now(UTC),
    )
