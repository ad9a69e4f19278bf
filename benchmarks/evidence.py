"""How the evidence log answers at 1,000, 3,000 and 10,000 releases of about 20 statements each.

    .venv/bin/python -m benchmarks.evidence [--sizes 1000 3000 10000] [--folder /var/tmp]

It fills one log with the statements of releases that were built, judged, deployed and had
incidents, made by `attest` and signed as always; no model is trained, and all artifacts are
the same few bytes. For the filling alone `os.fsync` does nothing. At each size it measures
with fsync, and prints a table (SQLite, in C, keeps its own):

    filling     statements a second since the size before, one append a release
    append      one statement with a warm index; median of 20
    first       the first look of a machine that has no index; the files may be in the page cache
    entries     all entries of a release, each verified; median of 5 releases
    audit       `llmops audit RELEASE`, without its printing; median of 5 releases
    serving     `llmops audit --serving production --model M --at T`; median of 5 models
    verify      every byte of the log, as `llmops verify` does
    record      content of one record, and what its two files take on the disk; of 1,000
    index       size of the index
    memory      the most that this process has needed so far

The folder needs 12 KiB for each statement, and is removed in the end. It exits with 1 if
an audit, or the question what served, takes two seconds or more.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

from llmops_assets.evidence import attest
from llmops_assets.evidence.gates import BUILT, Gate
from llmops_assets.evidence.index import EvidenceIndex
from llmops_assets.evidence.keys import create_keys
from llmops_assets.evidence.leaves import Entry, incident_chain, release_chain, route_chain
from llmops_assets.evidence.log import LOG, Attestation
from llmops_assets.evidence.statements import Statement
from llmops_assets.evidence.statistics import Decision, Interval
from llmops_assets.evidence.verdicts import NOTHING_SERVES, Finding, Verdict
from llmops_assets.operate.incidents import Incident
from llmops_assets.platform import Platform
from llmops_assets.release import Release
from llmops_assets.reports.audit import audit
from llmops_assets.reports.serving_at import serving_at
from llmops_assets.serving.routes import Route, RouteTarget
from llmops_assets.serving.slots import Colour, Environment
from llmops_assets.settings import Settings
from llmops_assets.storage.columns import Result
from llmops_assets.storage.folder import FolderStore
from llmops_assets.storage.store import digest_of

SIZES = (1000, 3000, 10_000)
RELEASES_PER_MODEL = 100
MADE = (
    "model_spec", "training_data", "evaluation_data", "checkpoint", "evaluation",
    "converted_weights", "engine", "packaged_model",
)  # fmt: skip
"""Each asset rests on the one before."""
HAPPENED = ("registered_model", "staging_deployment")
JUDGED = BUILT[:4]
INCIDENT_EVERY = 10
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
RUNS = 5
APPENDS = 20
SAMPLE = 1000
LIMIT_SECONDS = 2.0
Case = TypeVar("Case")
PRODUCTION = Environment.PRODUCTION
KIB, MIB = 1024, 1024 * 1024


@dataclass
class World:
    """An installation with nothing in it but evidence."""

    platform: Platform
    artifact: str
    """Digest of the one artifact, whatever the asset."""
    routes: dict[str, Entry] = field(default_factory=dict)
    """The entry of each model's newest route."""
    releases: int = 0
    statements: int = 0
    served: dict[str, list[datetime]] = field(default_factory=dict)
    """When each model's routes changed."""


@dataclass(frozen=True)
class Row:
    """What was measured at one size; seconds and bytes."""

    releases: int
    statements: int
    filling: float
    append: float
    first: float
    entries: float
    audit: float
    serving: float
    verify: float
    content: float
    disk: float
    index: int
    memory: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="Releases.")
    parser.add_argument("--folder", type=Path, help="For the log; by default that of tempfile.")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="llmops-evidence-", dir=options.folder))
    try:
        world = new_world(folder)
        print(HEADER, flush=True)
        rows: list[Row] = []
        for size in sorted(options.sizes):
            rows.append(measure(world, size, folder))
            print(line(rows[-1]), flush=True)
    finally:
        shutil.rmtree(folder)
    sys.exit(any(max(row.audit, row.serving) >= LIMIT_SECONDS for row in rows))


HEADER = (
    "releases statements   filling  append     first  entries    audit  serving    verify "
    "      record (disk)      index    memory"
)


def line(row: Row) -> str:
    return (
        f"{row.releases:8} {row.statements:10} {row.filling:7.0f}/s {row.append * 1e3:4.1f} ms "
        f"{row.first:7.1f} s {row.entries * 1e3:5.1f} ms {row.audit * 1e3:5.1f} ms "
        f"{row.serving * 1e3:5.1f} ms {row.verify:7.1f} s "
        f"{row.content / KIB:4.1f} KiB ({row.disk / KIB:4.1f}) "
        f"{row.index / MIB:6.1f} MiB {row.memory / MIB:5.0f} MiB"
    )


def new_world(folder: Path) -> World:
    settings = Settings(state=folder / "state")
    create_keys(settings.key_folder)
    platform = Platform(settings)
    (folder / "artifact").mkdir()
    (folder / "artifact" / "document.json").write_text("{}\n")
    artifact = platform.store.put(folder / "artifact", "application/vnd.llmops.benchmark")
    return World(platform, artifact.digest)


def measure(world: World, size: int, folder: Path) -> Row:
    """Lets the log grow to so many releases, and asks it."""
    platform = world.platform
    before = world.statements
    # A power loss here would only end the benchmark. A mock would remember each call.
    with patch("os.fsync", lambda descriptor: None):
        filling = seconds(lambda: fill(world, size))
    rate = (world.statements - before) / filling
    chance = random.Random(size)
    keys = [release(number).key for number in chance.sample(range(size), min(RUNS, size))]
    models = [Release.parse(key).model for key in keys]
    moments = [chance.choice(world.served[model]) for model in models]
    elsewhere = EvidenceIndex(folder / f"index-{size}" / "index.sqlite")
    newcomer = replace(platform.evidence, index=elsewhere)
    content, disk = record_size(platform.store, world.statements, chance)
    return Row(
        releases=world.releases,
        statements=world.statements,
        filling=rate,
        append=median(lambda number: append_one(world, number), range(APPENDS)),
        first=seconds(newcomer.checkpoint),
        entries=median(lambda key: list(platform.evidence.entries(release_chain(key))), keys),
        audit=median(lambda key: audit(platform, key), keys),
        serving=median(
            lambda asked: serving_at(platform, PRODUCTION, asked[0], asked[1]),
            list(zip(models, moments, strict=True)),
        ),
        verify=seconds(platform.evidence.verify),
        content=content,
        disk=disk,
        index=elsewhere.path.stat().st_size,
        memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB,
    )


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def median(work: Callable[[Case], object], cases: Sequence[Case]) -> float:
    return statistics.median(seconds(lambda case=case: work(case)) for case in cases)


def record_size(store: object, statements: int, chance: random.Random) -> tuple[float, float]:
    """Bytes of a record, and those that its two files take on the disk; means of a sample."""
    assert isinstance(store, FolderStore)
    content = disk = 0
    for sequence in chance.choices(range(statements), k=SAMPLE):
        logged = next(store.log(LOG, sequence))
        blob = store.root / "blobs" / logged.digest.replace(":", "/")
        place = store.root / "logs" / LOG / f"{sequence:012d}"
        content += blob.stat().st_size
        disk += sum(file.stat().st_blocks * 512 for file in (blob, place))
    return content / SAMPLE, disk / SAMPLE


def fill(world: World, size: int) -> None:
    for number in range(world.releases, size):
        key = release(number).key
        attestations = [
            Attestation(statement, (release_chain(key),)) for statement in built(world, number)
        ]
        attestations += operated(world, number)
        entries = world.platform.evidence.append(*attestations)
        model = Release.parse(key).model
        chain = route_chain(PRODUCTION, model)
        world.routes[model] = next(entry for entry in entries if chain in entry.leaf.links)
        world.served.setdefault(model, []).append(world.routes[model].time)
        world.releases += 1
        world.statements += len(entries)


def append_one(world: World, number: int) -> None:
    key = release(number).key
    statement = attest.lifecycle_event(result(world, key, "service_metrics", number))
    world.platform.evidence.append(Attestation(statement, (release_chain(key),)))
    world.statements += 1


def release(number: int) -> Release:
    model, version = divmod(number, RELEASES_PER_MODEL)
    return Release.by_hand(f"model-{model:04d}", BEGAN + timedelta(hours=version))


def built(world: World, number: int) -> Iterator[Statement]:
    """What is attested until a release stands before production."""
    key = release(number).key
    for asset, before in zip(MADE, (None, *MADE), strict=False):
        yield attest.provenance(result(world, key, asset, number, before))
    for gate in JUDGED:
        yield from attest.verdict(verdict(world, key, gate, number))
    for asset in HAPPENED:
        yield attest.lifecycle_event(result(world, key, asset, number))
    yield attest.verification_summary(
        release=key,
        model=Release.parse(key).model,
        package=world.artifact,
        environment=PRODUCTION,
        attestations=[digest_of(f"{key} {gate.name}".encode()) for gate in JUDGED],
        provenance=digest_of(key.encode()),
        policy=digest_of(b"policy"),
        passed=True,
        time=BEGAN,
    )


def operated(world: World, number: int) -> Iterator[Attestation]:
    """The route that leads to the release from now on, and now and then an incident."""
    key = release(number).key
    model = Release.parse(key).model
    before = world.routes.get(model)
    route = Route(
        environment=PRODUCTION,
        model=model,
        generation=number % RELEASES_PER_MODEL + 1,
        targets=(target(world, number),),
        actor="benchmark",
        reason="a better one",
        time=BEGAN,
        predecessor=None if before is None else before.digest,
    )
    named = [key] if before is None else [key, release(number - 1).key]
    chains = (route_chain(PRODUCTION, model), *map(release_chain, named))
    yield Attestation(attest.route_change(route), chains)
    if number % INCIDENT_EVERY == 0:
        incident = Incident(
            model=model,
            release=key,
            what="more than 1 % of the answers were errors",
            action="rolled back",
            actor="ada",
            detected=BEGAN,
            answered=BEGAN,
        )
        yield Attestation(attest.incident(incident), (incident_chain(model), release_chain(key)))


def target(world: World, number: int) -> RouteTarget:
    return RouteTarget(
        colour=(Colour.BLUE, Colour.GREEN)[number % 2],
        weight=100,
        package=world.artifact,
        release=release(number).key,
        version=number % RELEASES_PER_MODEL + 1,
        host="127.0.0.1",
        http_port=1,
        grpc_port=2,
        metrics_port=3,
    )


def result(world: World, key: str, asset: str, number: int, before: str | None = None) -> Result:
    """What an asset published; parameters and facts are about as long as real ones."""
    return Result(
        asset=asset,
        release=key,
        artifact=world.artifact,
        media_type="application/vnd.llmops.benchmark",
        action=digest_of(f"{asset} {number}".encode()),
        inputs={} if before is None else {before: world.artifact},
        parameters={f"parameter_{place}": place / 7 for place in range(12)},
        versions={"torch": "2.8.0", "transformers": "4.57.1", "onnxruntime": "1.23.0"},
        facts={f"fact_{place}": f"what was found there, {number}" for place in range(8)},
        started=BEGAN,
        finished=BEGAN + timedelta(minutes=number % 60),
    )


def verdict(world: World, key: str, gate: Gate, number: int) -> Verdict:
    """One with as many findings as a gate over a few slices has."""
    interval = Interval(low=0.95, high=0.99, confidence=0.95, method="wilson", n=1000)
    findings = [
        Finding(
            metric="exact_match",
            slice=name,
            value=0.97,
            interval=interval,
            n=1000,
            threshold="at least 0.9",
            decision=Decision.PASSED,
        )
        for name in ("de", "en", "es", "fr")
    ]
    return Verdict(
        gate=gate.name,
        release=key,
        decision=Decision.PASSED,
        measured={"exact_match": 0.97},
        threshold={"exact_match": "at least 0.9"},
        reason="0.97 is at least 0.9 in all slices.",
        findings=tuple(findings),
        subjects=dict.fromkeys(gate.subjects, world.artifact),
        dataset=world.artifact,
        baseline=NOTHING_SERVES,
        policy=digest_of(gate.name.encode()),
        action=gate.action,
        next_action=gate.next_action,
        owner=gate.owner,
        run=f"run {number}",
        time=BEGAN,
    )


if __name__ == "__main__":
    main()
