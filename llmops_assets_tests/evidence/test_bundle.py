"""Bundles: one file with all evidence about some releases, which others can read and check."""

from __future__ import annotations

import base64
import json
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import json_format
from in_toto_attestation.v1.statement import Statement as IntotoStatement

from llmops_assets.errors import EvidenceError
from llmops_assets.evidence import export as exporting
from llmops_assets.evidence.bundle import ATTESTATIONS, pack, unpack
from llmops_assets.evidence.export import check_free, export, write_bundle
from llmops_assets.evidence.gates import BUILT
from llmops_assets.evidence.leaves import Entry, release_chain
from llmops_assets.evidence.log import EvidenceLog
from llmops_assets.evidence.statements import AUDIT_EXPORT
from llmops_assets.evidence.verification import verify_bundle

from ..release_rig import PASSED, Rig
from . import intoto_models
from .evidence_rig import failures, fingerprint, into_production


@pytest.fixture(scope="module")
def produced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = Rig(tmp_path_factory.mktemp("bundle") / "rig")
    into_production(rig, 1)
    into_production(rig, 2)
    yield rig
    rig.close()


def test_two_releases_in_one_bundle(produced: Rig) -> None:
    """Statements about both, such as the route's change from one to the other, are there once,
    and each release is judged by the rules on its own."""
    content = export(produced.platform, ["parrot.v1", "parrot.v2"], "ada")
    found = verify_bundle(content, fingerprint(produced))
    assert found.holds, failures(found)
    assert found.releases == ("parrot.v1", "parrot.v2")
    lines = unpack(content)[ATTESTATIONS].splitlines()
    assert len(set(lines)) == len(lines)
    names = [check.name for check in found.checks]
    assert "parrot.v1: production route, generation 1" in names
    assert "parrot.v2: production route, generation 2" in names


def test_an_export_is_evidence_itself_and_closes_the_chains(produced: Rig) -> None:
    """Who took evidence out must be on record, and the record must say how much there was."""
    before = list(produced.platform.evidence.entries(release_chain("parrot.v1")))
    export(produced.platform, ["parrot.v1"], "bob")
    *_, last = produced.platform.evidence.entries(release_chain("parrot.v1"))
    assert last.statement.predicate_type == AUDIT_EXPORT
    assert last.statement.predicate["actor"] == "bob"
    chains = last.statement.predicate["chains"]
    assert chains[release_chain("parrot.v1")] == {"entries": len(before), "head": before[-1].digest}
    assert chains["anchors"] == {"entries": 0, "head": None}


def test_what_happens_during_an_export_is_in_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the newest verdict could be left out by exporting at the right moment."""
    rig.freeze("parrot.v1")
    append = EvidenceLog.append
    judged: list[str] = []

    def slow(log: EvidenceLog, *attestations, heads=None) -> tuple[Entry, ...]:
        if heads and not judged:
            judged.append("during the export")
            rig.judge("parrot.v1", BUILT[:1], PASSED)
        return append(log, *attestations, heads=heads)

    monkeypatch.setattr(EvidenceLog, "append", slow)
    content = export(rig.platform, ["parrot.v1"], "ada")
    found = verify_bundle(content, fingerprint(rig))
    assert found.holds, failures(found)
    statements = [
        json.loads(base64.b64decode(json.loads(line)["payload"]))
        for line in unpack(content)[ATTESTATIONS].splitlines()
    ]
    kinds = [statement["predicateType"].rsplit("/", 2)[1] for statement in statements]
    assert kinds == ["provenance", "gate-verdict", "test-result", "audit-export"]


def test_an_export_gives_up_on_a_release_that_never_rests(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must end, and say why."""
    rig.freeze("parrot.v1")
    append = EvidenceLog.append

    def busy(log: EvidenceLog, *attestations, heads=None) -> tuple[Entry, ...]:
        if heads:
            rig.judge("parrot.v1", BUILT[:1], PASSED)
        return append(log, *attestations, heads=heads)

    monkeypatch.setattr(EvidenceLog, "append", busy)
    monkeypatch.setattr(exporting, "ATTEMPTS", 2)
    with pytest.raises(EvidenceError, match="changed all the time"):
        export(rig.platform, ["parrot.v1"], "ada")


def test_every_attestation_is_read_by_intoto(produced: Rig) -> None:
    """An auditor's tools know in-toto, not this platform."""
    content = export(produced.platform, ["parrot.v2"], "ada")
    lines = unpack(content)[ATTESTATIONS].splitlines()
    for line in lines:
        payload = base64.b64decode(json.loads(line)["payload"])
        message = json_format.Parse(payload, intoto_models.STATEMENT())
        IntotoStatement.copy_from_pb(message).validate()
    assert len(lines) > 60


def test_what_the_readme_says_works_without_this_platform(produced: Rig, tmp_path: Path) -> None:
    """Evidence that only its author's program can check is no evidence: the readme's commands,
    with common tools, on an unpacked bundle."""
    content = export(produced.platform, ["parrot.v1"], "ada")
    (tmp_path / "bundle.zip").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "bundle.zip") as archive:
        archive.extractall(tmp_path)

    def run(script: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("sha256sum trust_root.json").split()[0] == fingerprint(produced)[7:]
    checked = run(
        "tail -n 1 attestations.intoto.jsonl | jq -r .payload | base64 -d "
        """| jq -r '.subject[] | .digest.sha256 + "  " + .name' | sha256sum -c"""
    )
    # All but what the log's own signatures protect.
    assert len(checked.splitlines()) == len(unpack(content)) - 4
    assert all(line.endswith(": OK") for line in checked.splitlines())
    statement = run("sed -n 1p attestations.intoto.jsonl | tr -d '\\n' | sha256sum").split()[0]
    assert run("sed -n 1p leaves.jsonl | jq -r .leaf.statement").strip() == f"sha256:{statement}"
    readme = (tmp_path / "README.txt").read_text()
    assert fingerprint(produced) in readme
    run(
        """
        hex=$(jq -r '.keys[] | select(.role == "evidence") | .keyval.public' trust_root.json)
        printf '302a300506032b6570032100%s' "$hex" | tr -d ' ' | xxd -r -p > key.der 2>/dev/null \\
          || printf '302a300506032b6570032100%s' "$hex" \\
             | sed 's/../\\\\x&/g' | xargs -0 printf > key.der
        sed -n 1p attestations.intoto.jsonl > one.json
        jq -r .payload one.json | base64 -d > payload
        type=$(jq -r .payloadType one.json)
        { printf 'DSSEv1 %d %s %d ' ${#type} "$type" $(stat -c %s payload); cat payload; } > signed
        jq -r '.signatures[0].sig' one.json | base64 -d > signature
        openssl pkeyutl -verify -pubin -keyform DER -inkey key.der -rawin \\
          -in signed -sigfile signature
        """
    )


def test_the_same_files_are_the_same_archive() -> None:
    """Verifying compares archives, so that writing one must have a single outcome."""
    files = {"b": b"2", "a/c": b"1" * 1000}
    assert pack(files) == pack(dict(reversed(files.items())))
    assert unpack(pack(files)) == files


@pytest.mark.parametrize("fault", ["twice", "overlapping"])
def test_archive_that_would_grow_is_refused_unread(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small file can name the same bytes many times, and fill the memory of who reads them."""
    whole = pack({"a": bytes(1000), "b": bytes(1000)})
    entries = whole.index(b"PK\x01\x02")
    second = whole.index(b"PK\x01\x02", entries + 1)
    changed = bytearray(whole)
    if fault == "twice":
        changed[second + 46 : second + 47] = b"a"
    else:
        for entry in (entries, second):
            changed[entry + 24 : entry + 28] = (len(whole) - 10).to_bytes(4, "little")

    def read(*_: object) -> bytes:
        raise AssertionError("a file was read")

    monkeypatch.setattr(zipfile.ZipFile, "read", read)
    with pytest.raises(EvidenceError, match=fault[:7]):
        unpack(bytes(changed))


def test_no_file_is_replaced_unless_asked_for(tmp_path: Path) -> None:
    """The file that is there may be the evidence of last year."""
    path = tmp_path / "evidence.zip"
    check_free(path, force=False)
    write_bundle(b"old", path, force=False)
    with pytest.raises(EvidenceError, match="exists already"):
        write_bundle(b"new", path, force=False)
    assert path.read_bytes() == b"old"
    write_bundle(b"new", path, force=True)
    assert path.read_bytes() == b"new"
    with pytest.raises(EvidenceError, match="cannot be written"):
        write_bundle(b"new", tmp_path / "missing" / "evidence.zip", force=False)
    assert [found.name for found in tmp_path.iterdir()] == ["evidence.zip"]


def test_a_release_that_nothing_is_known_of(rig: Rig) -> None:
    """An empty bundle would look like a clean record."""
    with pytest.raises(EvidenceError, match=r"no evidence about parrot\.v9"):
        export(rig.platform, ["parrot.v9"], "ada")
