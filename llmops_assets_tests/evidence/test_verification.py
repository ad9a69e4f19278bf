"""Verification: what holds is said to hold, and every broken rule is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from llmops_assets.deploy.approval import record_approval
from llmops_assets.deploy.revocation import revoke
from llmops_assets.errors import EvidenceError
from llmops_assets.evidence import attest
from llmops_assets.evidence.bundle import Bundle, pack, read_bundle, trust_root_file, unpack
from llmops_assets.evidence.documents import check_documents, layers
from llmops_assets.evidence.export import export, take
from llmops_assets.evidence.gates import (
    ACCURACY,
    APPROVED,
    BUILT,
    CANARY,
    CANDIDATE_SMOKE,
    PROVEN,
    STAGED,
)
from llmops_assets.evidence.keys import create_keys
from llmops_assets.evidence.leaves import release_chain
from llmops_assets.evidence.live_verification import verify_release
from llmops_assets.evidence.log import Attestation
from llmops_assets.evidence.results import AttestedResults
from llmops_assets.evidence.verdicts import WaiverUse
from llmops_assets.evidence.verification import Verification, verify_bundle, verify_taken
from llmops_assets.evidence.waivers import Waiver
from llmops_assets.evidence.witnesses import Witnesses
from llmops_assets.operate.rollback import roll_back
from llmops_assets.serving.slots import Environment

from ..release_rig import FAILED, MODEL, PASSED, Rig, deploy
from .evidence_rig import approve, failures, fingerprint, into_production

RELEASE = "parrot.v1"
BY_NOBODY = "sha256:" + "2" * 64


def verified(rig: Rig, release: str = RELEASE) -> Verification:
    return verify_taken(take(rig.platform, release), release)


def admit(rig: Rig, gates=PROVEN, environment: Environment = Environment.PRODUCTION) -> None:
    rig.platform.admit(RELEASE, gates, rig.platform.column(RELEASE), environment)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """State of a platform with a release that passed every gate that production asks for."""
    rig = Rig(tmp_path_factory.mktemp("made") / "rig")
    rig.build(RELEASE, 1)
    # Not as events: what was let through differs from test to test.
    for asset in ("staging_deployment", "production_candidate"):
        rig.publish(RELEASE, asset, {"document.json": "{}"})
    rig.judge(RELEASE, [gate for gate in STAGED if gate not in BUILT], PASSED)
    approve(rig, RELEASE)
    rig.judge(RELEASE, [CANDIDATE_SMOKE], PASSED)
    yield rig.platform.settings.state
    rig.close()


@pytest.fixture
def ready(rig: Rig, made: Path) -> Rig:
    """A platform of the test's own in that state; nothing has traffic yet."""
    shutil.copytree(made, rig.platform.settings.state, dirs_exist_ok=True)
    return rig


def run_verify(
    folder: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command, with an empty environment and home, in another folder."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "llmops_assets.cli", "verify", *arguments],
        cwd=folder, env={"HOME": str(home), "LC_ALL": "C.UTF-8", **environment},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_a_bundle_is_verified_where_nothing_of_the_platform_is(ready: Rig, tmp_path: Path) -> None:
    """The auditor has a file and a fingerprint; no settings, no store, no keys. Each way of
    ending has its own exit code."""
    rig = ready
    admit(rig)
    deploy(rig, 1)
    content = export(rig.platform, [RELEASE], "ada")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "evidence.zip").write_bytes(content)
    rig.root.rename(tmp_path / "gone")
    try:
        good = run_verify(elsewhere, "evidence.zip", "--root", fingerprint_of(content))
        assert (good.returncode, good.stderr) == (0, "")
        assert "complete up to its export at" in good.stdout
        assert "no anchor outside of the platform" in good.stdout
        assert "production route, generation 1" in good.stdout
        assert "approved by grace" in good.stdout
        by_variable = run_verify(
            elsewhere, "evidence.zip", "--json", LLMOPS_TRUST_ROOT=fingerprint_of(content)
        )
        assert json.loads(by_variable.stdout)["holds"] is True
        unknown = run_verify(elsewhere, "evidence.zip")
        assert unknown.returncode == 2
        assert "Ask the platform's operator for its fingerprint" in unknown.stderr
        (elsewhere / "bad.zip").write_bytes(content.replace(b"grace", b"graze"))
        bad = run_verify(elsewhere, "bad.zip", "--root", fingerprint_of(content))
        assert bad.returncode == 1
        assert "FAILED" in bad.stdout
        assert "complete up to" not in bad.stdout
        assert run_verify(elsewhere, "no.zip", "--root", "0" * 64).returncode == 2
        # Verifying leaves nothing behind.
        assert {path.name for path in elsewhere.iterdir()} == {"evidence.zip", "bad.zip", "home"}
    finally:
        (tmp_path / "gone").rename(rig.root)


def fingerprint_of(content: bytes) -> str:
    return read_bundle(unpack(content)).trust_root.fingerprint


def test_a_bundle_that_brings_its_own_trust(rig: Rig, tmp_path: Path) -> None:
    """A forger signs everything anew, perfectly; only the fingerprint tells."""
    rig.freeze(RELEASE)
    forger = Rig(tmp_path / "forger")
    try:
        forger.freeze(RELEASE)
        forged = export(forger.platform, [RELEASE], "ada")
        assert verify_bundle(forged, fingerprint(forger)).holds
        found = verify_bundle(forged, fingerprint(rig))
        assert "another trust root" in failures(found)
        # Nor does the right trust root beside their signatures help.
        files = unpack(forged)
        files["trust_root.json"] = unpack(export(rig.platform, [RELEASE], "ada"))["trust_root.json"]
        assert "trusted key" in failures(verify_bundle(pack(files), fingerprint(rig)))
    finally:
        forger.close()


def test_a_bundle_cut_to_an_earlier_export(rig: Rig) -> None:
    """All entries up to an earlier export are a whole bundle of that time; with files or
    entries of another time it is none."""
    rig.freeze(RELEASE)
    first = unpack(export(rig.platform, [RELEASE], "ada"))
    rig.judge(RELEASE, [ACCURACY][:0], PASSED)
    second = unpack(export(rig.platform, [RELEASE], "bob"))
    for name in first:
        if first[name] != second.get(name):
            mixed = pack({**second, name: first[name]})
            assert not verify_bundle(mixed, fingerprint(rig)).holds, name
    earlier = read_bundle(second)
    shorter = Bundle(
        earlier.trust_root, earlier.checkpoint, earlier.attestations[:-1], earlier.leaves[:-1],
        earlier.anchored, earlier.documents,
    )  # fmt: skip
    found = verify_bundle(pack(shorter.files()), fingerprint(rig))
    assert "is not that of its export" in failures(found)
    assert trust_root_file(earlier.trust_root) == second["trust_root.json"]


def test_an_entry_that_the_exporter_left_out(rig: Rig) -> None:
    """Who has the key can sign an export that counts fewer entries; the entries themselves
    still name each other."""
    rig.freeze(RELEASE)
    rig.judge(RELEASE, BUILT[:1], PASSED)
    whole = take(rig.platform, RELEASE)
    assert verify_taken(whole, RELEASE).holds
    for gone in range(len(whole.leaves) - 1):
        rest = [place for place in range(len(whole.leaves)) if place != gone]
        bundle = replace(
            whole,
            attestations=tuple(whole.attestations[place] for place in rest),
            leaves=tuple(whole.leaves[place] for place in rest),
        )
        assert f"chain releases/{RELEASE} are missing" in failures(verify_taken(bundle, RELEASE))


def test_an_anchor_that_is_asked_for_and_not_there(rig: Rig) -> None:
    """Without one, whoever has the key could have rewritten everything."""
    rig.freeze(RELEASE)
    content = export(rig.platform, [RELEASE], "ada")
    found = verify_bundle(content, fingerprint(rig), require_anchor=True)
    assert "nothing outside of the platform" in failures(found)


def test_what_was_let_through_in_every_way_that_is_allowed(rig: Rig) -> None:
    """Two promotions, a rollback to what is still warm, and staging: no false alarm, as a
    verifier that cries wolf is ignored."""
    into_production(rig, 1)
    into_production(rig, 2)
    roll_back(rig.platform, MODEL, "ada", "it stammers")
    for release in (RELEASE, "parrot.v2"):
        found = verified(rig, release)
        assert found.holds, failures(found)
    details = [check.detail for check in verified(rig).checks]
    assert any("still warm" in detail for detail in details)


BrokenRule = Callable[[Rig], None]


def nobody_let_it_through(rig: Rig) -> None:
    pass


def it_was_refused(rig: Rig) -> None:
    rig.judge(RELEASE, [CANDIDATE_SMOKE], FAILED)
    with pytest.raises(Exception, match="may not go on"):
        admit(rig)


def refused_after_it_was_let_through(rig: Rig) -> None:
    admit(rig)
    it_was_refused_now(rig)


def it_was_refused_now(rig: Rig) -> None:
    rig.judge(RELEASE, [CANDIDATE_SMOKE], FAILED)
    with pytest.raises(Exception, match="may not go on"):
        admit(rig)


def for_staging_only(rig: Rig) -> None:
    admit(rig, BUILT, Environment.STAGING)


def without_the_last_gates(rig: Rig) -> None:
    admit(rig, APPROVED)


def by_who_asked_for_it(rig: Rig) -> None:
    approve(rig, RELEASE, "Ada@example.org")
    admit(rig)


def rejected_meanwhile(rig: Rig) -> None:
    admit(rig)
    package = rig.platform.columns.get(RELEASE, "packaged_model").artifact
    record_approval(rig.platform, RELEASE, "eve", "reject", "no", package)


def revoked_meanwhile(rig: Rig) -> None:
    admit(rig)
    revoke(rig.platform, RELEASE, "eve", "it stammers")


def _summary(rig: Rig, attestations: list[str], passed: bool = True) -> None:
    """A verification summary that `admit` would not write, signed with the right key."""
    summary = attest.verification_summary(
        release=RELEASE, model=MODEL, environment="production", provenance=None, passed=passed,
        package=rig.platform.columns.get(RELEASE, "packaged_model").artifact,
        attestations=attestations, policy="sha256:" + "0" * 64, time=datetime.now(UTC),
    )  # fmt: skip
    rig.platform.evidence.append(Attestation(summary, (release_chain(RELEASE),)))


def _verdicts(rig: Rig) -> list[str]:
    found = rig.platform.standings(RELEASE, PROVEN, rig.platform.column(RELEASE))
    return [digest for standing in found for digest in standing.statements]


def a_failed_verdict_among_the_inputs(rig: Rig) -> None:
    rig.judge(RELEASE, [ACCURACY], FAILED)
    _summary(rig, _verdicts(rig))


def a_verdict_about_bytes_that_the_release_never_made(rig: Rig) -> None:
    inputs = _verdicts(rig)
    (judged,) = rig.judge(RELEASE, [ACCURACY], PASSED)
    other = judged.model_copy(update={"subjects": {**judged.subjects, "checkpoint": BY_NOBODY}})
    statement, _ = attest.verdict(other)
    (entry,) = rig.platform.evidence.append(Attestation(statement, (release_chain(RELEASE),)))
    _summary(rig, [*inputs, entry.leaf.statement])


def a_verdict_about_what_the_release_has_not(rig: Rig) -> None:
    inputs = _verdicts(rig)
    (judged,) = rig.judge(RELEASE, [ACCURACY], PASSED)
    other = judged.model_copy(update={"subjects": {**judged.subjects, "adapter": BY_NOBODY}})
    statement, _ = attest.verdict(other)
    (entry,) = rig.platform.evidence.append(Attestation(statement, (release_chain(RELEASE),)))
    _summary(rig, [*inputs, entry.leaf.statement])


def a_verdict_that_a_later_one_replaced(rig: Rig) -> None:
    inputs = _verdicts(rig)
    rig.judge(RELEASE, [ACCURACY], FAILED)
    _summary(rig, inputs)


def an_expired_waiver(rig: Rig) -> None:
    (failed,) = rig.judge(RELEASE, [ACCURACY], FAILED)
    now = datetime.now(UTC)
    waiver = Waiver(
        gate="accuracy", release=RELEASE, owner="grace", reason="the slice is new",
        expires=now - timedelta(hours=1),
    )  # fmt: skip
    use = WaiverUse(release=RELEASE, gate="accuracy", waiver=waiver, judged=failed.time, time=now)
    statement = attest.waiver_use(use, failed)
    (entry,) = rig.platform.evidence.append(Attestation(statement, (release_chain(RELEASE),)))
    _summary(rig, [*_verdicts(rig), entry.leaf.statement])


def inputs_that_are_not_there(rig: Rig) -> None:
    _summary(rig, [*_verdicts(rig), "sha256:" + "1" * 64])


def no_approval_among_the_inputs(rig: Rig) -> None:
    _summary(rig, [])


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (nobody_let_it_through, "no verification summary for production came before it"),
        (it_was_refused, "says no"),
        (refused_after_it_was_let_through, "says no"),
        (for_staging_only, "no verification summary for production came before it"),
        (without_the_last_gates, "does not rest on a verdict of candidate_smoke"),
        (by_who_asked_for_it, "Ada@example.org approved, and ada asked for the release"),
        (rejected_meanwhile, "eve had rejected it"),
        (revoked_meanwhile, "the approval had been revoked"),
        (
            a_failed_verdict_among_the_inputs,
            "accuracy had failed, and it rests on no waiver in force",
        ),
        (
            a_verdict_about_bytes_that_the_release_never_made,
            f"the verdict of accuracy is about checkpoint {BY_NOBODY}, which no statement",
        ),
        (
            a_verdict_about_what_the_release_has_not,
            f"the verdict of accuracy is about adapter {BY_NOBODY}, which no statement",
        ),
        (a_verdict_that_a_later_one_replaced, "that it rests on was not the newest"),
        (an_expired_waiver, "accuracy had failed, and it rests on no waiver in force"),
        (inputs_that_are_not_there, "which is not there before it"),
        (no_approval_among_the_inputs, "nobody is recorded to have approved it"),
    ],
)
def test_traffic_that_broke_a_rule(ready: Rig, broken: BrokenRule, said: str) -> None:
    """Signatures prove who wrote it. Whether the rules were kept is what an auditor asks: each
    rule that somebody with the key broke is named."""
    broken(ready)
    deploy(ready, 1)
    assert said in failures(verified(ready))


def test_a_rollback_to_what_never_served_well(rig: Rig) -> None:
    """A warm release whose canary failed must not get its traffic back."""
    into_production(rig, 1)
    rig.judge(RELEASE, [CANARY], FAILED)
    into_production(rig, 2)
    route, digest = rig.platform.routes.current(Environment.PRODUCTION, MODEL)
    assert route is not None
    back = [target.model_copy(update={"weight": 100 - target.weight}) for target in route.targets]
    # Its first admission is still the newest, and nothing was wrong with that.
    assert verified(rig).holds
    rig.judge(RELEASE, [ACCURACY], FAILED)
    with pytest.raises(Exception, match="may not go on"):
        admit(rig)
    rig.platform.routes.change(
        Environment.PRODUCTION, MODEL, back, actor="eve", reason="now", expected=digest
    )
    assert "says no" in failures(verified(rig))


def test_manifest_that_is_nested_without_end() -> None:
    """A stack trace would end the verification of all other documents as well."""
    with pytest.raises(EvidenceError, match=r"manifest\.json is no manifest"):
        layers(b'{"layers":' + b"[" * 100_000, "manifest.json")


def test_documents_that_no_statement_stands_behind(rig: Rig) -> None:
    """Who has the key can sign an export of any files: a spec that was never judged, a file
    that is in no manifest, a package signed by others."""
    into_production(rig, 1)
    bundle = take(rig.platform, RELEASE)
    root = bundle.trust_root
    entries = list(rig.platform.evidence.entries(release_chain(RELEASE)))
    folder = f"releases/{RELEASE}"
    signature = bundle.documents[f"{folder}/packaged_model/model.sig"]
    spec = bundle.documents[f"{folder}/model_spec/manifest.json"]
    for changed in (
        {f"{folder}/engine/manifest.json": spec},
        {f"{folder}/made_up/manifest.json": spec},
        {f"{folder}/model_spec/manifest.json": spec.replace(b"spec.json", b"nope.json")},
        {f"{folder}/model_spec/files/spec.json": b"{}"},
        {f"{folder}/model_spec/files/other.json": b"{}"},
        {f"{folder}/packaged_model/model.sig": signature.replace(b"a", b"b", 1)},
    ):
        with pytest.raises(EvidenceError):
            check_documents({**bundle.documents, **changed}, RELEASE, entries, root)
    checked, words = check_documents(bundle.documents, RELEASE, entries, root)
    assert checked == len(bundle.documents)
    assert "signature covers all 3 files" in words


def test_a_release_on_the_installation(ready: Rig) -> None:
    """Who runs the platform checks log and artifacts as well: damage that no statement shows."""

    rig = ready

    def check(*, deep: bool) -> Verification:
        return verify_release(
            rig.platform, RELEASE, Witnesses(), require_anchor=False, deep=deep,
            progress=lambda what, done, of: None,
        )  # fmt: skip

    assert check(deep=True).holds
    package = rig.platform.store.describe(
        rig.platform.columns.get(RELEASE, "packaged_model").artifact
    )
    blobs = rig.platform.settings.store / "blobs" / "sha256"
    blob = blobs / package.files[0].digest.removeprefix("sha256:")
    blob.chmod(0o644)
    blob.write_bytes(b"other bytes")
    checkout = rig.platform.settings.store / "checkouts" / package.digest.removeprefix("sha256:")
    if checkout.exists():
        for file in checkout.rglob("*"):
            if file.is_file():
                file.chmod(0o644)
                file.write_bytes(b"other bytes")
    assert check(deep=False).holds
    assert "damaged" in failures(check(deep=True))


def test_deep_counts_what_is_gone_as_damaged(ready: Rig) -> None:
    """What statements name is what is looked for: whoever empties the store, its refs and
    records of results among it, must not have less to show."""
    digest = ready.platform.columns.get(RELEASE, "engine").artifact
    record = AttestedResults(ready.platform.evidence).results(RELEASE)["engine"]
    for gone in (digest, record):
        (ready.platform.settings.store / "blobs" / gone.replace(":", "/")).unlink()
    (check,) = (
        check
        for check in verify_release(
            ready.platform, RELEASE, Witnesses(), require_anchor=False, deep=True,
            progress=lambda what, done, of: None,
        ).checks
        if check.name == "artifacts"
    )  # fmt: skip
    assert check.holds is False
    assert "engine: " in check.detail
    assert digest.removeprefix("sha256:") in check.detail


def test_a_release_that_is_not_there(rig: Rig) -> None:
    """A mistyped key must not look like tampering."""
    rig.freeze(RELEASE)
    with pytest.raises(EvidenceError, match=r"no evidence about parrot\.v9"):
        verify_release(
            rig.platform, "parrot.v9", Witnesses(), require_anchor=False, deep=False,
            progress=lambda what, done, of: None,
        )  # fmt: skip


def test_what_is_neither_a_file_nor_a_release(tmp_path: Path) -> None:
    """A typing mistake is said to be one, and looking makes nothing."""
    for subject in ("README.txt", "no.zip", "a/b.zip", "parrot"):
        done = run_verify(tmp_path, subject)
        assert done.returncode == 2
        assert f"{subject}: there is no such file, and no release key" in done.stderr
    (tmp_path / "evidence.zip").write_bytes(b"")
    done = run_verify(tmp_path, "evidence.zip", "--root", "abc")
    assert done.returncode == 2
    assert "`llmops audit export`" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"evidence.zip", "home"}


def test_keys_of_another_installation_verify_nothing_here(rig: Rig, tmp_path: Path) -> None:
    """A bundle is verified against the fingerprint that was given, whatever keys are here."""
    rig.freeze(RELEASE)
    content = export(rig.platform, [RELEASE], "ada")
    create_keys(tmp_path / "keys")
    (tmp_path / "evidence.zip").write_bytes(content)
    done = run_verify(tmp_path, "evidence.zip", LLMOPS_KEYS=str(tmp_path / "keys"))
    assert done.returncode == 1
    assert "another trust root" in done.stdout
    assert "this installation's own" in done.stdout
