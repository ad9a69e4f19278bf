"""Releases after the first: they cost what changed, and take over without anybody noticing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import psutil
import pytest
from dagster import DagsterEventType

from llmops_assets.evidence.keys import read_trust_root
from llmops_assets.reports.audit import audit
from llmops_assets.serving.slots import Colour
from llmops_assets_tests.lifecycle.conftest import FirstRelease
from llmops_assets_tests.lifecycle.stack_user import MODEL, StackUser
from llmops_assets_tests.lifecycle.traffic import (
    Request,
    Traffic,
    percentile,
    problems,
    slowest,
)

TRAINING = "llmops_assets.develop.train"
ENGINE_BUILD = "llmops_assets.toolchains.onnxruntime_genai.build"
CLIENTS = 3
PAUSE_SECONDS = 0.05
STEADY_SECONDS = 20.0
LARGEST_FACTOR = 5.0


@dataclass(frozen=True)
class Takeover:
    """A release that took over from another while people asked."""

    former: str
    former_colour: Colour
    key: str
    steady: list[Request]
    """Before the promotion began."""
    meanwhile: list[Request]
    """From the candidate's load to the end of the route's move."""
    all: list[Request]
    """From before the promotion until after its end."""


@dataclass(frozen=True)
class CheapRelease:
    """A release made by editing one engine flag, and the tools that it started."""

    key: str
    tools: set[str]


@pytest.fixture(scope="module")
def takeover(user: StackUser, first_release: FirstRelease) -> Takeover:
    """A release of the same spec, promoted under traffic."""
    former = user.serving()
    key = user.release()
    with Traffic(user.gateway_url, MODEL, user.known_answers, CLIENTS, PAUSE_SECONDS) as traffic:
        time.sleep(STEADY_SECONDS)
        steady = traffic.requests
        run = user.promote(key)
        start = _moment(user, run, DagsterEventType.STEP_START, "production_candidate")
        end = _moment(user, run, DagsterEventType.STEP_SUCCESS, "production_deployment")
        time.sleep(1)
    return Takeover(
        former=former.release,
        former_colour=former.colour,
        key=key,
        steady=steady,
        meanwhile=traffic.between(start, end),
        all=traffic.requests,
    )


@pytest.fixture(scope="module")
def cheap_release(user: StackUser, takeover: Takeover) -> CheapRelease:
    """A release with other blocks of the quantised weights, promoted after the second."""
    with _watching(user, TRAINING, ENGINE_BUILD) as started:
        key = user.release(engine={"block_size": 64})
    user.promote(key)
    return CheapRelease(key, started)


def test_nobody_notices_a_takeover(takeover: Takeover) -> None:
    """Loading takes CPU and memory from what serves, and a route's move could cut connections."""
    p99 = percentile(takeover.steady, 0.99)
    print(
        f"steady: {len(takeover.steady)} requests, median "
        f"{percentile(takeover.steady, 0.5) * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms, slowest "
        f"{slowest(takeover.steady) * 1e3:.1f} ms\n"
        f"while the release took over: {len(takeover.meanwhile)} requests, slowest "
        f"{slowest(takeover.meanwhile) * 1e3:.1f} ms"
    )
    assert len(takeover.steady) > 500
    assert len(takeover.meanwhile) > 20
    assert not problems(takeover.all)
    assert slowest(takeover.meanwhile) <= LARGEST_FACTOR * p99


def test_blue_and_green_alternate(
    user: StackUser, takeover: Takeover, cheap_release: CheapRelease
) -> None:
    """What serves is never changed in place; the release before stays warm for a rollback."""
    colours = {
        release: user.platform.columns.get(release, "production_deployment").facts["colour"]
        for release in (takeover.key, cheap_release.key)
    }
    assert colours[takeover.key] != takeover.former_colour
    assert colours[cheap_release.key] == takeover.former_colour
    assert user.serving().release == cheap_release.key
    former = user.platform.columns.get(cheap_release.key, "production_deployment").facts["previous"]
    assert former["release"] == takeover.key


def test_an_engine_flag_retrains_nothing(
    user: StackUser, first_release: FirstRelease, cheap_release: CheapRelease
) -> None:
    """Training is the dear part; a release that repeats it for nothing would not be made."""
    first = user.platform.columns.assets(first_release.key)
    ours = user.platform.columns.assets(cheap_release.key)
    assert ENGINE_BUILD in cheap_release.tools, "the watch must have seen the one that ran"
    assert TRAINING not in cheap_release.tools
    # A tool that ran leaves a log.
    logs = {file.stem for file in user.platform.tool_log(cheap_release.key, "x").parent.iterdir()}
    assert logs == {"engine", "engine_validation", "compliance_report", "staging_deployment"}
    assert user.platform.tool_log(first_release.key, "checkpoint").exists()

    for asset in (
        "training_data", "data_report", "checkpoint", "evaluation", "converted_weights"
    ):  # fmt: skip
        assert ours[asset].artifact == first[asset].artifact
        event = user.materialization(asset, cheap_release.key)
        assert event.metadata["reused_from"].value == first_release.key
    for asset in ("engine", "packaged_model"):
        assert ours[asset].artifact != first[asset].artifact
    assert ours["engine"].parameters == {"precision": "int8", "block_size": 64}
    assert ours["model_spec"].facts["derived_from"] != first_release.key


def test_an_auditor_gets_an_answer(
    user: StackUser, takeover: Takeover, cheap_release: CheapRelease, tmp_path: Path
) -> None:
    """What served, where it came from, what was changed, and a proof that needs nothing of us."""
    for release in (takeover.key, cheap_release.key):
        start = time.monotonic()
        record = audit(user.platform, release)
        assert time.monotonic() - start < 2
        assert record.integrity.holds
        assert record.identity.package is not None
    serving = user.command("audit", "--serving", "production", "--model", MODEL, "--json")
    assert cheap_release.key in serving.stdout
    told = user.command("diff", takeover.key, cheap_release.key, "--json")
    assert told.returncode == 1, told.stderr
    topics = json.loads(told.stdout)["topics"]
    assert topics["spec"] == [{"what": "engine.block_size", "first": 32, "second": 64}]
    assert not {"data", "weights"} & set(topics)
    bundle = tmp_path / "bundle.zip"
    exported = user.command("audit", "export", cheap_release.key, "--output", str(bundle))
    assert exported.returncode == 0, exported.stderr
    root = read_trust_root(user.settings.key_folder).fingerprint
    elsewhere = subprocess.run(
        [sys.executable, "-m", "llmops_assets.cli", "verify", str(bundle), "--root", root],
        env={"HOME": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert elsewhere.returncode == 0, elsewhere.stdout + elsewhere.stderr
    assert "complete up to its export" in elsewhere.stdout


@contextmanager
def _watching(user: StackUser, *modules: str) -> Iterator[set[str]]:
    """Collects which of our modules run as tools of the stack meanwhile."""
    seen: set[str] = set()
    done = Event()

    def watch() -> None:
        while not done.wait(0.1):
            for process in psutil.process_iter():
                try:
                    command = process.cmdline()
                except psutil.Error:
                    continue
                if any(str(user.settings.state) in argument for argument in command):
                    seen.update(module for module in modules if module in command)

    thread = Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join(timeout=10)


def _moment(user: StackUser, run: str, kind: DagsterEventType, step: str) -> float:
    """When a step of a run started or ended, seconds since the epoch."""
    return next(
        entry.timestamp for entry in user.dagster.all_logs(run, of_type=kind)
        if entry.step_key == step
    )  # fmt: skip
