"""A platform on a folder and doubles, and releases brought to a stage without any tool."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llmops_assets.build.packaging import PACKAGE_MEDIA_TYPE
from llmops_assets.deploy.approval import ASSET as APPROVAL
from llmops_assets.deploy.approval import MEDIA_TYPE as APPROVAL_MEDIA_TYPE
from llmops_assets.deploy.approval import Approval
from llmops_assets.deploy.delivery import LoadedPackage, load, move
from llmops_assets.develop.baseline import evaluation_action
from llmops_assets.develop.data import DATA_FILE
from llmops_assets.develop.judgements import PREDICTIONS_FILE
from llmops_assets.develop.metrics import measure
from llmops_assets.develop.registration import Registration
from llmops_assets.develop.specs import SpecSource
from llmops_assets.evidence.gates import BUILT, CANARY, Gate
from llmops_assets.evidence.keys import create_keys
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import NOTHING_SERVES, Judgement, Verdict, record_verdict
from llmops_assets.platform import SPEC_FILE, Platform
from llmops_assets.serving.package_description import PackageDescription
from llmops_assets.serving.routes import Route
from llmops_assets.serving.slots import Deployment, Environment
from llmops_assets.settings import Settings
from llmops_assets.spec import ModelSpec, canonical, parse_spec
from llmops_assets.storage.artifacts import digests
from llmops_assets.storage.columns import Action, Result, Workshop

from .fakes import FakeGateway, FakeMetrics, FakeRegistry, FakeSlots

MODEL = "parrot"
SPEC = """\
name: parrot
use_case: Repeats in tests what it is told to say.
owner: team:tests
metrics: [exact_match]
constraints: {max_input_tokens: 64, max_output_tokens: 12}
weights: {source: path, path: checkpoint}
data: {source: files, training: training.jsonl, evaluation: evaluation.jsonl}
engine: {toolchain: onnxruntime_genai}
serving: {known_answers: [{prompt: hello, answer: world}, {prompt: ping, answer: pong}]}
gates:
  accuracy: {exact_match: {at_least: 0.9, every_slice: 0.8, regression: 0.05}}
  engine_accuracy: {exact_match: {at_least: 0.9}}
  fairness: {largest_gap: 0.1}
  latency:
    evaluation: [{measure: end_to_end, at_most: 5}]
    build: [{measure: end_to_end, at_most: 5}]
    staging: [{measure: end_to_end, at_most: 5}]
"""
ANSWERS = {"hello": "world", "ping": "pong"}
PASSED = Judgement(
    decision=Decision.PASSED,
    measured={},
    threshold={},
    reason="for the test",
    baseline=NOTHING_SERVES,
)
FAILED = PASSED.model_copy(update={"decision": Decision.FAILED, "reason": "the test says so"})


def predictions_table(rows: int = 400, wrong: Mapping[str, int] | None = None) -> pd.DataFrame:
    """Predictions of as many rows in each of the slices de and fr, so many of them wrong."""
    tables: list[pd.DataFrame] = []
    for name in ("de", "fr"):
        correct = np.arange(rows // 2) >= (wrong or {}).get(name, 0)
        columns = {
            "prompt": "hello",
            "completion": ANSWERS["hello"],
            "slice": name,
            "prediction": np.where(correct, ANSWERS["hello"], "no"),
            "correct": correct,
            "loss": 0.1,
            "tokens": 1,
            "latency_seconds": 0.01,
            "time_to_first_token_seconds": 0.005,
            "inter_token_latency_seconds": 0.005,
            "output_tokens": 2,
        }
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


class PlatformOnDoubles(Platform):
    """The platform with a real store and routes, and doubles of all that needs a machine."""

    @cached_property
    def slots(self) -> FakeSlots:
        return FakeSlots(self.store, ANSWERS)

    @cached_property
    def gateway(self) -> FakeGateway:  # pyright: ignore[reportIncompatibleVariableOverride]
        return FakeGateway(ANSWERS)

    @property
    def gateway_url(self) -> str:
        return self.gateway.url

    @cached_property
    def registry(self) -> FakeRegistry:
        return FakeRegistry()

    @cached_property
    def metrics(self) -> FakeMetrics:
        return FakeMetrics(self.routes)


class Rig:
    """A platform in a folder, with shortcuts to bring a release somewhere."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.models = root / "models"
        self.models.mkdir(parents=True)
        self.write_spec(SPEC)
        settings = Settings(state=root / "state", models=self.models, http_timeout_seconds=5)
        create_keys(settings.key_folder)
        self.platform = PlatformOnDoubles(settings)

    def write_spec(self, text: str) -> None:
        (self.models / f"{MODEL}.yaml").write_text(text)

    def publish(
        self,
        release: str,
        asset: str,
        files: Mapping[str, str | bytes],
        media_type: str = "application/vnd.llmops.test",
        facts: Mapping[str, Any] | None = None,
    ) -> Result:
        """Publishes files as what an asset of a release made."""

        def make(workshop: Workshop) -> Mapping[str, Any]:
            for name, content in files.items():
                path = workshop.output / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.encode() if isinstance(content, str) else content)
            return facts or {}

        contents = {name: repr(content) for name, content in files.items()}
        action = Action(asset, media_type, parameters={"files": contents, "release": release})
        return self.platform.columns.produce(release, action, make)

    def freeze(self, release: str, text: str = SPEC, requested_by: str = "ada") -> ModelSpec:
        """Publishes a model_spec."""
        spec = parse_spec(text, "test")
        source = SpecSource(file="models/parrot.yaml", commit="c" * 40, changed=False)
        self.publish(
            release,
            "model_spec",
            {SPEC_FILE: json.dumps(canonical(spec)), "source.json": source.model_dump_json()},
            facts={"requested_by": requested_by},
        )
        self.platform.columns.enlist(spec.name, release)
        return spec

    def build(
        self,
        release: str,
        version: int,
        text: str = SPEC,
        wrong: Mapping[str, int] | None = None,
    ) -> None:
        """Brings a release to the end of Build, every gate passed.

        Args:
            wrong: how many answers of each slice are wrong, all the same.
        """
        self.build_unjudged(release, version, text, wrong)
        self.judge(release, BUILT, PASSED)

    def build_unjudged(
        self,
        release: str,
        version: int,
        text: str = SPEC,
        wrong: Mapping[str, int] | None = None,
    ) -> None:
        """As `build`, before any gate was asked."""
        self.freeze(release, text)
        for asset in (
            "training_data", "data_report", "checkpoint", "converted_weights", "engine",
            "compliance_report",
        ):  # fmt: skip
            self.publish(release, asset, {"content": f"{asset} of {release}"})
        # The same for all releases, so that they can be compared.
        rows = predictions_table()[["prompt", "completion", "slice"]]
        self.publish(release, "evaluation_data", {DATA_FILE: rows.to_parquet(index=False)})
        self.evaluate(release, wrong)
        answers = predictions_table(wrong=wrong).to_parquet(index=False)
        self.publish(release, "engine_validation", {PREDICTIONS_FILE: answers})
        self.publish(
            release,
            "packaged_model",
            {
                "package.json": "{}",
                "repository/parrot/config.pbtxt": 'name: "parrot"',
                "content": release,
            },
            PACKAGE_MEDIA_TYPE,
        )
        self.platform.columns.record(
            release,
            Action("registered_model", "application/vnd.llmops.registration.v1"),
            Registration(model=MODEL, version=version, tags={}),
            datetime.now(UTC),
        )

    def evaluate(self, release: str, wrong: Mapping[str, int] | None = None) -> None:
        """Publishes what the real evaluation would, had it got so many answers wrong."""

        def make(workshop: Workshop) -> Mapping[str, Any]:
            table = predictions_table(wrong=wrong)
            found = measure(table).as_json()
            workshop.output.mkdir(parents=True)
            table.to_parquet(workshop.output / PREDICTIONS_FILE, index=False)
            (workshop.output / "evaluation.json").write_text(json.dumps(found))
            return found

        column = digests(self.platform.column(release))
        spec = self.platform.spec(release)
        action = evaluation_action(
            spec, self.models.parent, column["checkpoint"], column["evaluation_data"]
        )
        self.platform.columns.produce(release, action, make)

    def judge(self, release: str, gates: Iterable[Gate], judgement: Judgement) -> list[Verdict]:
        """Records a verdict of each gate about what the release has published."""
        column = digests(self.platform.column(release))
        spec, policy = self.platform.spec(release), self.platform.policy
        # As if judged beside what serves now.
        beside = judgement.model_copy(update={"baseline": self.platform.serving_package(MODEL)})
        return [
            record_verdict(
                self.platform.evidence, release, gate, spec, policy, beside, column, "run"
            )
            for gate in gates
        ]

    def approve(self, release: str) -> None:
        """Publishes bob's claimed approval of the release's package."""
        approval = Approval(
            approver="bob",
            decision="approve",
            reason="it answers well",
            package=self.platform.columns.get(release, "packaged_model").artifact,
            requested_by="ada",
            time=datetime.now(UTC),
        )
        action = Action(APPROVAL, APPROVAL_MEDIA_TYPE)
        self.platform.columns.record(release, action, approval, approval.time)

    def deployment(self, release: str, version: int) -> Deployment:
        """What a slot is told that gets the release."""
        package = self.platform.columns.get(release, "packaged_model").artifact
        return Deployment(package, release, version)

    def close(self) -> None:
        for part in ("slots", "gateway"):
            if part in vars(self.platform):
                vars(self.platform)[part].close()


def loaded(rig: Rig, version: int) -> LoadedPackage:
    """A release's package loaded into production's idle slot."""
    release = f"parrot.v{version}"
    deployment = rig.deployment(release, version)
    package = rig.platform.store.describe(deployment.package)
    slot, endpoint = load(
        rig.platform.slots,
        rig.platform.routes,
        Environment.PRODUCTION,
        MODEL,
        package,
        PackageDescription(),
        deployment,
        "ada",
    )
    return LoadedPackage(
        environment=Environment.PRODUCTION, model=MODEL, colour=slot.colour, deployment=deployment,
        endpoint=endpoint, load_seconds=0.1, answers=(), time=datetime.now(UTC),
    )  # fmt: skip


def deploy(rig: Rig, version: int) -> Route:
    """A release loaded, put on production's route, and found well there."""
    route = move(rig.platform.routes, loaded(rig, version), "ada", f"deploying v{version}")
    rig.judge(f"parrot.v{version}", [CANARY], PASSED)
    return route


def serving(rig: Rig) -> int | None:
    """The version that clients of the gateway really get."""
    target = rig.platform.gateway.serving(MODEL)
    return None if target is None else target.version
