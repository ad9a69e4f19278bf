"""The audit record of one release, from its signed statements.

Nothing is taken from Dagster, whose events anybody who reaches its web server can forge,
nor from the store's refs. Where a fact is only in an artifact, the artifact is one that a
statement names by its digest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import ValidationError

from llmops_assets.compliance.model_card import ModelCard
from llmops_assets.compliance.package_report import BILL_FILE, REPORT_FILE
from llmops_assets.deploy.approval import Approval as VerifiedApproval
from llmops_assets.deploy.approval import RecordedDecision
from llmops_assets.deploy.delivery import LoadedPackage
from llmops_assets.develop.registration import Registration
from llmops_assets.errors import ArtifactCorruptError, EvidenceError, StoreError
from llmops_assets.evidence.gates import RESTORES
from llmops_assets.evidence.keys import read_trust_root
from llmops_assets.evidence.leaves import Entry, route_chain
from llmops_assets.evidence.package_signature import check_files, signature_of, signed_files
from llmops_assets.evidence.results import attested_record
from llmops_assets.evidence.statements import (
    DECISION,
    GATE_VERDICT,
    INCIDENT,
    LIFECYCLE_EVENT,
    PROVENANCE,
    ROUTE_CHANGE,
    VERIFICATION_SUMMARY,
    WAIVER_USE,
)
from llmops_assets.evidence.verdicts import Verdict, WaiverUse
from llmops_assets.operate.incidents import Incident
from llmops_assets.platform import Platform
from llmops_assets.release import Release
from llmops_assets.reports.audit_record import (
    Admission,
    Approval,
    AuditRecord,
    Build,
    Deployments,
    Document,
    GateVerdict,
    Identity,
    Input,
    Integrity,
    Load,
    Operation,
    Reading,
    Retirement,
    RouteStep,
    ServingPeriod,
    Share,
    SigningKey,
)
from llmops_assets.reports.gaps import find_gaps
from llmops_assets.reports.release_evidence import Event, Found, ReleaseEvidence, json_file
from llmops_assets.reports.summary import position, summarise
from llmops_assets.retire.archive import ArchiveFile
from llmops_assets.serving.routes import Route, RouteTarget
from llmops_assets.serving.slots import Environment
from llmops_assets.storage.store import Record

LOADS = ("staging_deployment", "production_candidate")
HARDWARE = ("architecture", "gpu")
"""Names in the versions of a step that are of machines."""
SIDECARS = (("converted_weights", "conversion.json"), ("engine", "engine.json"))
"""Files in which a toolchain writes down the commands that it ran."""


def audit(platform: Platform, release: str, as_of: datetime | None = None) -> AuditRecord:
    """Collects what is on record of a release.

    Evidence that does not verify is no error here: it is left out, and named in the
    section `integrity`.

    Args:
        platform: with log, store and trust root.
        release: its key.
        as_of: nothing later is looked at; None: all of it.

    Raises:
        ReleaseError: the key is malformed, or nothing is on record of it.
    """
    evidence = ReleaseEvidence(platform.evidence, release, as_of)
    reader = _Reader(platform, evidence, attested_now=as_of is None)
    record = AuditRecord(
        made=datetime.now(UTC),
        as_of=as_of,
        summary="",
        identity=reader.identity(),
        spec=reader.spec,
        card=reader.card(),
        documents=reader.documents(),
        inputs=tuple(reader.inputs()),
        build=reader.build(),
        gates=reader.gates(),
        waivers=tuple(reader.waivers),
        approvals=tuple(reader.approvals()),
        deployments=reader.deployments(),
        operation=reader.operation(),
        retirement=reader.retirement(),
        integrity=reader.integrity(),  # last: it names what could not be read above
    )
    identity = record.identity.model_copy(update={"position": position(record)})
    record = record.model_copy(update={"identity": identity})
    record = record.model_copy(update={"gaps": find_gaps(record)})
    return record.model_copy(update={"summary": summarise(record)})


def serving_periods(release: str, changes: Iterable[RouteStep]) -> Iterator[ServingPeriod]:
    """When a release had traffic.

    Args:
        release: its key.
        changes: every change of a route that named it before or after, oldest first.
    """
    open_periods: dict[Environment, ServingPeriod] = {}
    for change in changes:
        weight = sum(share.weight for share in change.after if share.release == release)
        period = open_periods.get(change.environment)
        if period is not None and period.weight == weight:
            continue
        if period is not None:
            yield period.model_copy(update={"until": change.time})
            del open_periods[change.environment]
        if weight:
            open_periods[change.environment] = ServingPeriod(
                environment=change.environment, weight=weight, since=change.time, until=None
            )
    yield from open_periods.values()


def shares(targets: Iterable[RouteTarget]) -> tuple[Share, ...]:
    """The slots of a route, without where they listen."""
    fields = set(Share.model_fields)
    return tuple(
        Share.model_validate(target.model_dump(mode="json", include=fields)) for target in targets
    )


class _Reader:
    """The sections of the record, each from the statements that it rests on."""

    def __init__(self, platform: Platform, evidence: ReleaseEvidence, attested_now: bool) -> None:
        self._platform = platform
        self._evidence = evidence
        self._attested_now = attested_now
        self._steps = evidence.steps
        self._frozen = self._steps.get("model_spec")
        self.spec = self._spec()
        self.waivers = [found.record for found in evidence.of(WAIVER_USE, WaiverUse)]

    def identity(self) -> Identity:
        release = Release.parse(self._evidence.release)
        facts = {} if self._frozen is None else self._frozen.facts
        source = self._source()
        spec = self.spec or {}
        return Identity(
            release=release.key,
            model=release.model,
            version=self._version(),
            use_case=_text(spec.get("use_case")),
            owner=_text(spec.get("owner")),
            spec_file=_text(source.get("file")),
            commit=_text(source.get("commit")),
            commit_holds=source.get("commit") is not None and source.get("changed") is False,
            pinned=source.get("pinned") is True,
            requested_by=_text(facts.get("requested_by")),
            requested=None if self._frozen is None else self._frozen.started,
            derived_from=_text(facts.get("derived_from")),
            spec=self._artifact("model_spec"),
            package=self._artifact("packaged_model"),
            position="",
        )

    def card(self) -> ModelCard | None:
        """The card that the compliance gate judged; the spec's while there is no report."""
        report = self._file("compliance_report", REPORT_FILE) or {}
        found = report.get("card", (self.spec or {}).get("card"))
        try:
            return None if found is None else ModelCard.model_validate(found)
        except ValidationError as error:
            self._evidence.problems.append(f"The model card cannot be read: {error}")
            return None

    def documents(self) -> tuple[Document, ...]:
        named = (
            ("compliance report with the model card", "compliance_report", REPORT_FILE),
            ("bill of materials (CycloneDX ML-BOM)", "compliance_report", BILL_FILE),
            ("data report", "data_report", "report.json"),
        )
        found: list[Document] = []
        for name, asset, file in named:
            for path, digest in self._files(asset).items():
                if path == file:
                    found.append(Document(name=name, asset=asset, file=file, digest=digest))
        return tuple(found)

    def inputs(self) -> Iterator[Input]:
        if self._frozen is not None:
            yield Input(name="model spec", digest=self._frozen.artifact)
            for used in self._frozen.dependencies:
                if used.name == "source":
                    yield Input(name="source code", digest=used.digest)
        licence, origin = self._data_terms()
        for asset in ("training_data", "evaluation_data"):
            if (step := self._steps.get(asset)) is not None:
                facts = {
                    name: step.facts[name] for name in ("rows", "slices") if name in step.facts
                }
                yield Input(
                    name=asset.replace("_", " "),
                    digest=step.artifact,
                    license=licence,
                    provenance=origin,
                    facts=facts,
                )
        if (step := self._steps.get("checkpoint")) is not None:
            weights = (self.spec or {}).get("weights", {})
            card = self.card()
            if weights.get("source") in ("path", "mlflow", "huggingface"):
                named = next(
                    (d for d in step.dependencies if d.name.startswith("parameters/")), None
                )
                yield Input(
                    name="base weights",
                    digest=step.artifact,
                    uri=None if named is None else named.uri,
                    license=None if card is None else card.license,
                    provenance=f"taken from {weights['source']}",
                    facts={key: value for key, value in weights.items() if key != "source"},
                )
            for used in step.dependencies:
                if used.name.startswith("parameters/code/"):
                    name = used.name.removeprefix("parameters/")
                    yield Input(name=name, digest=used.digest)

    def build(self) -> Build:
        versions: dict[str, dict[str, None]] = {}
        hardware: dict[str, str] = {}
        images: dict[str, str] = {}
        for step in self._steps.values():
            for name, version in step.versions.items():
                if name in HARDWARE:
                    hardware[name] = version
                elif name == "image":
                    images[step.asset] = version
                else:
                    versions.setdefault(name, {})[version] = None
        engine = self._steps.get("engine")
        return Build(
            steps=tuple(self._steps.values()),
            toolchain=_text((self.spec or {}).get("engine", {}).get("toolchain")),
            flags={} if engine is None else engine.parameters,
            versions={name: tuple(found) for name, found in sorted(versions.items())},
            hardware=hardware,
            images=images,
            commands=tuple(self._commands()),
        )

    def gates(self) -> tuple[GateVerdict, ...]:
        waived = {use.gate: use for use in self.waivers}
        found: list[GateVerdict] = []
        seen: set[str] = set()
        for verdict in reversed(list(self._evidence.of(GATE_VERDICT, Verdict))):
            newest = verdict.record.gate not in seen
            seen.add(verdict.record.gate)
            use = waived.get(verdict.record.gate)
            covers = use is not None and use.judged == verdict.record.time
            found.append(
                GateVerdict(
                    verdict=verdict.record,
                    newest=newest,
                    waived=use if covers else None,
                    sequence=verdict.entry.sequence,
                )
            )
        return tuple(found)

    def approvals(self) -> Iterator[Approval]:
        found: list[Approval] = [
            Approval(
                kind="recorded",
                approver=decision.record.approver,
                decision=decision.record.decision,
                reason=decision.record.reason,
                package=decision.record.package,
                requested_by=None,
                known_by=_known_by(decision.entry.statement.predicate),
                time=decision.record.time,
                sequence=decision.entry.sequence,
            )
            for decision in self._evidence.of(DECISION, RecordedDecision)
        ]
        for event in self._events("production_approval"):
            document = self._document(event, VerifiedApproval)
            if document is not None:
                found.append(
                    Approval(
                        kind="verified",
                        approver=document.approver,
                        decision=document.decision,
                        reason=document.reason,
                        package=document.package,
                        requested_by=document.requested_by,
                        known_by=_known_by(event.record.document),
                        time=event.record.finished,
                        sequence=event.entry.sequence,
                    )
                )
        yield from sorted(found, key=lambda approval: approval.sequence)

    def deployments(self) -> Deployments:
        changes = tuple(self._route_steps())
        return Deployments(
            loads=tuple(self._loads()),
            routes=changes,
            admissions=tuple(map(_admission, self._evidence.raw(VERIFICATION_SUMMARY))),
            served=tuple(serving_periods(self._evidence.release, changes)),
        )

    def operation(self) -> Operation:
        standing: dict[str, Incident] = {}
        for found in self._evidence.of(INCIDENT, Incident):
            standing[found.record.id or f"entry {found.entry.sequence}"] = found.record
        return Operation(
            metrics=tuple(map(_reading, self._events("service_metrics"))),
            scaling=tuple(map(_reading, self._events("scaling_policy"))),
            incidents=tuple(standing.values()),
        )

    def retirement(self) -> Retirement:
        times = {
            asset: found[-1].record.finished if found else None
            for asset in ("deprecated_version", "archive", "removed_version")
            for found in [self._events(asset)]
        }
        archives = self._events("archive")
        document = self._document(archives[-1], ArchiveFile) if archives else None
        judged = [
            found.record.decision
            for found in self._evidence.of(GATE_VERDICT, Verdict)
            if found.record.gate == RESTORES.name
        ]
        return Retirement(
            deprecated=times["deprecated_version"],
            archived=times["archive"],
            archive_file=None if document is None else document.file,
            archive_digest=None if document is None else document.digest,
            keep_until=None if document is None else document.keep_until,
            restored=judged[-1] if judged else None,
            removed=times["removed_version"],
        )

    def integrity(self) -> Integrity:
        evidence = self._evidence
        signed = Counter(
            signature.keyid
            for entry in evidence.entries
            for signature in entry.record.envelope.signatures
        )
        current, fingerprint = None, None
        try:
            root = read_trust_root(self._platform.settings.key_folder)
            fingerprint = root.fingerprint
            current = next((key.keyid for key in root.evidence_keys()), None)
        except EvidenceError as error:
            evidence.problems.append(str(error))
        # Where nothing could be read, everything would seem to be without a statement.
        comparable = self._attested_now and bool(evidence.entries)
        unattested = tuple(self._unattested()) if comparable else ()
        missing = tuple(self._missing())
        signature = self._package_signature()
        checkpoint = evidence.checkpoint
        return Integrity(
            problems=tuple(dict.fromkeys(evidence.problems)),
            statements=evidence.verified,
            chain=evidence.chain,
            first=evidence.entries[0].time if evidence.entries else None,
            last=evidence.entries[-1].time if evidence.entries else None,
            log_size=None if checkpoint is None else checkpoint.size,
            root=None if checkpoint is None else checkpoint.text.splitlines()[2],
            checkpoint_time=None if checkpoint is None else checkpoint.time,
            trust_root=fingerprint,
            keys=tuple(
                SigningKey(keyid=keyid, statements=number, current=keyid == current)
                for keyid, number in signed.items()
            ),
            clock_backwards=tuple(evidence.clock_backwards),
            unattested=unattested,
            package_signature=signature,
            missing=missing,
        )

    def _spec(self) -> dict[str, Any] | None:
        if self._frozen is None:
            return None
        signed = self._frozen.parameters.get("spec")
        if isinstance(signed, dict):
            return signed
        stored = self._file("model_spec", "spec.json")
        return None if stored is None else dict(stored)

    def _source(self) -> Mapping[str, Any]:
        signed = None if self._frozen is None else self._frozen.parameters.get("source")
        if isinstance(signed, dict):
            return signed
        return self._file("model_spec", "source.json") or {}

    def _data_terms(self) -> tuple[str | None, str | None]:
        """Licence and provenance of the data, as they were declared."""
        report = self._steps.get("data_report")
        declared = {} if report is None else report.parameters
        if "license" not in declared:
            declared = (self.spec or {}).get("data", {})
        return _text(declared.get("license")), _text(declared.get("provenance"))

    def _version(self) -> int | None:
        registered = self._events("registered_model")
        document = self._document(registered[-1], Registration) if registered else None
        return None if document is None else document.version

    def _loads(self) -> Iterator[Load]:
        for event in self._evidence.events:
            if event.record.asset not in LOADS:
                continue
            document = self._document(event, LoadedPackage)
            if document is not None:
                yield Load(
                    asset=event.record.asset,
                    environment=document.environment,
                    colour=document.colour,
                    package=document.deployment.package,
                    version=document.deployment.version,
                    seconds=document.load_seconds,
                    right_answers=sum(a.answer == a.expected for a in document.answers),
                    answers=len(document.answers),
                    time=event.record.finished,
                    sequence=event.entry.sequence,
                )

    def _route_steps(self) -> Iterator[RouteStep]:
        for found in self._evidence.of(ROUTE_CHANGE, Route):
            route = found.record
            chain = route_chain(route.environment, route.model)
            before = self._evidence.before(found.entry, chain)
            former = None if before is None else self._evidence.read(before, Route)
            yield RouteStep(
                environment=route.environment,
                generation=route.generation,
                actor=route.actor,
                reason=route.reason,
                before=() if former is None else shares(former.targets),
                after=shares(route.targets),
                time=found.entry.time,
                sequence=found.entry.sequence,
            )

    def _commands(self) -> Iterator[tuple[str, ...]]:
        for asset, name in SIDECARS:
            sidecar = self._file(asset, name) or {}
            one = [sidecar["command"]] if "command" in sidecar else []
            for command in sidecar.get("commands", one):
                yield tuple(map(str, command))

    def _unattested(self) -> Iterator[str]:
        """Assets whose ref in the store leads to a result that no statement names."""
        store, release = self._platform.store, self._evidence.release
        attested = {
            attested_record(entry)
            for entry in self._evidence.entries
            if entry.statement.predicate_type in (PROVENANCE, LIFECYCLE_EVENT)
        }
        try:
            for name, record in store.refs(f"releases/{release}"):
                if record not in attested:
                    yield name.rpartition("/")[2]
        except StoreError as error:
            self._evidence.problems.append(f"The store's list of results is damaged: {error}")

    def _artifact(self, asset: str) -> str | None:
        step = self._steps.get(asset)
        return None if step is None else step.artifact

    def _events(self, asset: str) -> list[Found[Event]]:
        return [found for found in self._evidence.events if found.record.asset == asset]

    def _document(self, event: Found[Event], form: Any) -> Any:
        """The document of an event; None, and a problem, if it has another form."""
        try:
            return form.model_validate(event.record.document)
        except ValidationError:
            self._evidence.problems.append(
                f"Entry {event.entry.sequence}, {event.record.asset}, was written by another "
                "version of the platform and cannot be read."
            )
            return None

    def _package_signature(self) -> Literal["valid", "invalid", "missing"] | None:
        """How the package's signature stands; the bytes themselves are checked at every load."""
        package = self._artifact("packaged_model")
        if package is None:
            return None
        try:
            signature = signature_of(self._platform.store, package)
            if signature is None:
                return "missing"
            root = read_trust_root(self._platform.settings.key_folder)
            signed = signed_files(signature, root, package)
            if files := self._files("packaged_model"):
                check_files(files, signed, f"Package {package}")
        except (EvidenceError, StoreError) as error:
            self._evidence.problems.append(str(error))
            return "invalid"
        return "valid"

    def _missing(self) -> Iterator[str]:
        for asset, step in self._steps.items():
            try:
                self._platform.store.describe(step.artifact)
            except ArtifactCorruptError as error:
                self._evidence.problems.append(f"The artifact of {asset} was changed: {error}")
            except StoreError:
                yield asset

    def _files(self, asset: str) -> dict[str, str]:
        """Files of an artifact with their digests; none if it cannot be read, see `_missing`."""
        digest = self._artifact(asset)
        try:
            files = () if digest is None else self._platform.store.describe(digest).files
        except StoreError:
            return {}
        return {file.path: file.digest for file in files}

    def _file(self, asset: str, name: str) -> Record | None:
        """A JSON file of an artifact; None if there is none, or it cannot be read."""
        digest = self._artifact(asset)
        try:
            return None if digest is None else json_file(self._platform.store, digest, name)
        except ArtifactCorruptError as error:
            self._evidence.problems.append(f"{name} of {asset} was changed: {error}")
        except StoreError:
            pass  # `_missing` names it
        return None


def _admission(entry: Entry) -> Admission:
    """From a verification summary as `attest.verification_summary` writes it."""
    predicate = entry.statement.predicate
    return Admission(
        environment=predicate["resourceUri"].removeprefix("llmops:").partition("/")[0],
        passed=predicate["verificationResult"] == "PASSED",
        package=entry.statement.subject[0].sha256,
        policy=f"sha256:{predicate['policy']['digest']['sha256']}",
        levels=tuple(predicate["verifiedLevels"]),
        rests_on=len(predicate["inputAttestations"]),
        time=predicate["timeVerified"],
        sequence=entry.sequence,
    )


def _reading(event: Found[Event]) -> Reading:
    return Reading(
        document=event.record.document, time=event.record.finished, sequence=event.entry.sequence
    )


def _known_by(record: Mapping[str, Any]) -> str:
    return str(record.get("evidence", "claimed"))


def _text(value: object) -> str | None:
    return None if value is None else str(value)
