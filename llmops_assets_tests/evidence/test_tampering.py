"""Nothing that is done to evidence goes unnoticed, tried thousands of times.

What is done to a bundle is caught by whoever has it and the trust root's fingerprint; what is
done to the store by the platform's next look. What nobody can notice is in docs/evidence.md: a
rewriting, with the key, of all that came after the newest anchor.
"""

from __future__ import annotations

import base64
import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from llmops_assets.deploy.approval import record_approval
from llmops_assets.errors import LLMOpsError
from llmops_assets.evidence.anchors import anchor_in_git, held_in_git
from llmops_assets.evidence.bundle import ANCHORED, ATTESTATIONS, LEAVES, pack, unpack
from llmops_assets.evidence.export import export
from llmops_assets.evidence.gates import BUILT
from llmops_assets.evidence.index import EvidenceIndex
from llmops_assets.evidence.leaves import release_chain
from llmops_assets.evidence.log import LOG, EvidenceLog
from llmops_assets.evidence.package_signature import sign_once
from llmops_assets.evidence.verification import verify_bundle
from llmops_assets.evidence.witnesses import GitWitness, Witnesses
from llmops_assets.storage.folder import FolderStore
from llmops_assets.storage.store import canonical_json, digest_of

from ..git_rig import git
from ..release_rig import PASSED, Rig
from .evidence_rig import failures, fingerprint, into_production

# Different mutations of each kind; together more than 2,000.
OF_FIELDS = 1250
OF_FIELDS_IN_PRODUCTION = 100
OF_ARCHIVES = 400
OF_LOGS = 250
OF_BLOBS = 150
assert OF_FIELDS + OF_ARCHIVES + OF_LOGS + OF_BLOBS >= 2000

OPERATIONS = ("change", "remove", "duplicate", "retype")
SEED = 20261124


def tries(least: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A property tried often enough, always with the same examples."""

    def decorated(test: Callable[..., None]) -> Callable[..., None]:
        # Some examples repeat others; what counts is counted by the test.
        limits = settings(
            max_examples=int(least * 1.3), deadline=None, database=None,
            phases=[Phase.generate],
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
        )  # fmt: skip
        return seed(SEED)(limits(test))

    return decorated


@dataclass(frozen=True)
class Exported:
    """A bundle of a release in production, and what it takes to verify it."""

    content: bytes
    files: dict[str, bytes]
    fingerprint: str
    witnesses: Witnesses

    def tampering_is_caught(self, content: bytes) -> bool:
        return not verify_bundle(content, self.fingerprint, self.witnesses).holds


def export_of(root: Path, make: Callable[[Rig], object]) -> Exported:
    git(root, "init", "--quiet", "--bare", "anchors.git")
    rig = Rig(root / "rig")
    try:
        make(rig)
        repository = str(root / "anchors.git")
        anchor_in_git(rig.platform.evidence, repository)
        content = export(rig.platform, ["parrot.v1"], "ada")
        witnesses = Witnesses(git=(GitWitness(repository, held_in_git(repository)),))
        found = verify_bundle(content, fingerprint(rig), witnesses)
        assert found.holds, failures(found)
        return Exported(content, unpack(content), fingerprint(rig), witnesses)
    finally:
        rig.close()


def packaged(rig: Rig) -> None:
    """Few statements, and a file of every kind: quickly verified thousands of times."""
    rig.freeze("parrot.v1")
    rig.publish("parrot.v1", "packaged_model", {"package.json": "{}", "weights": "w" * 200})
    package = rig.platform.columns.get("parrot.v1", "packaged_model").artifact
    sign_once(rig.platform.store, package, rig.platform.settings)
    rig.judge("parrot.v1", BUILT[:1], PASSED)
    record_approval(rig.platform, "parrot.v1", "grace", "approve", "looks well", package)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_of(tmp_path_factory.mktemp("packaged"), packaged)


@pytest.fixture(scope="module")
def exported_from_production(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_of(tmp_path_factory.mktemp("production"), lambda rig: into_production(rig, 1))


class Twice(list[tuple[str, Any]]):
    """An object with a key that stands there twice."""


def dump(value: Any) -> str:
    """Canonical JSON, but for objects that have a key twice."""
    if isinstance(value, Twice):
        return "{" + ",".join(f"{json.dumps(k)}:{dump(v)}" for k, v in value) + "}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{dump(v)}" for k, v in sorted(value.items())) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths of every value within a JSON value, containers as well."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def changed(value: Any, at: int) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        place = at % max(len(value), 1)
        digit = "0" if value[place : place + 1] != "0" else "1"
        return value[:place] + digit + value[place + 1 :]
    return {} if value else {"more": 1}


def retyped(value: Any) -> Any:
    """The nearest value of another type."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, bool) or value is None:
        return str(value)
    return str(value) if isinstance(value, int | float) else dump(value)


def mutated(document: Any, path: tuple[str | int, ...], operation: str, at: int) -> str:
    """The document's JSON with one operation at one place."""
    document = copy.deepcopy(document)
    holders = [document]
    for key in path[:-1]:
        holders.append(holders[-1][key])
    holder, key = holders[-1], path[-1]
    if operation == "change":
        holder[key] = changed(holder[key], at)
    elif operation == "retype":
        holder[key] = retyped(holder[key])
    elif operation == "remove":
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(int(key), holder[int(key)])
    else:
        twice = Twice([*sorted(holder.items()), (str(key), holder[key])])
        if len(holders) == 1:
            return dump(twice)
        holders[-2][path[-2]] = twice
    return dump(document)


Field = tuple[str, int, tuple[str | int, ...], bool]
"""File, line and path of a JSON value, and whether it is inside of a signed payload."""


def fields_of(files: dict[str, bytes]) -> list[Field]:
    """Every JSON value of a bundle."""
    found: list[Field] = []
    for name, content in files.items():
        if name.endswith((".md", ".html", ".txt", "content", "model.sig")):
            continue
        lines = content.splitlines() if name.endswith(".jsonl") else [content]
        for number, line in enumerate(lines):
            document = json.loads(line)
            found += [(name, number, path, False) for path in places(document)]
            if name == ATTESTATIONS:
                statement = json.loads(base64.b64decode(document["payload"]))
                found += [(name, number, path, True) for path in places(statement)]
    return found


def tamper_with_fields(exported: Exported, least: int) -> None:
    fields = fields_of(exported.files)
    # Reports are long, and one digest protects each: the log's own files count more.
    log = [field for field in fields if field[0] in (ATTESTATIONS, LEAVES, ANCHORED)]
    tried: set[str] = set()
    kinds: set[tuple[str, str]] = set()

    @tries(least)
    @given(
        field=st.one_of(st.sampled_from(log), st.sampled_from(fields)),
        operation=st.sampled_from(OPERATIONS),
        at=st.integers(0, 1000),
    )
    def caught(field: Field, operation: str, at: int) -> None:
        name, number, path, inside = field
        content = exported.files[name]
        lines = content.split(b"\n") if name.endswith(".jsonl") else [content]
        document = json.loads(lines[number])
        if inside:
            statement = json.loads(base64.b64decode(document["payload"]))
            payload = mutated(statement, path, operation, at).encode()
            document["payload"] = base64.b64encode(payload).decode()
            lines[number] = canonical_json(document)
        else:
            lines[number] = mutated(document, path, operation, at).encode()
        tampered = {**exported.files, name: b"\n".join(lines)}
        if tampered == exported.files:
            return  # nothing was changed, so there is nothing to catch
        content = pack(tampered)
        tried.add(digest_of(content))
        kinds.add((name.rpartition("/")[2], operation))
        assert exported.tampering_is_caught(content), (field, operation)

    caught()
    print(f"\n{len(tried)} mutations of {len(fields)} fields, {len(kinds)} kinds")
    assert len(tried) >= least


def test_every_field_of_a_bundle(exported: Exported) -> None:
    """An auditor believes single fields: each one in any file, changed in any way, is caught."""
    tamper_with_fields(exported, OF_FIELDS)


def test_fields_of_a_bundle_of_a_release_in_production(exported_from_production: Exported) -> None:
    """The same where every kind of statement is there: deployments, routes and approvals."""
    tamper_with_fields(exported_from_production, OF_FIELDS_IN_PRODUCTION)


def test_every_file_of_a_bundle_and_every_byte_of_its_archive(exported: Exported) -> None:
    """Files that are dropped, added, swapped, emptied, lines in another order, and any flipped
    bit, also those of the archive itself."""
    names = sorted(exported.files)
    lined = [name for name in (ATTESTATIONS, LEAVES, ANCHORED) if exported.files[name]]
    tried: set[str] = set()

    def flipped(content: bytes, bit: int) -> bytes:
        changed = bytearray(content)
        changed[bit // 8 % len(content)] ^= 1 << bit % 8
        return bytes(changed)

    @tries(OF_ARCHIVES)
    @given(data=st.data())
    def caught(data: st.DataObject) -> None:
        kind = data.draw(st.sampled_from(("flip", "flip in file", "cut", "drop", "swap", "add",
                                          "empty", "lines")))  # fmt: skip
        files, name = dict(exported.files), data.draw(st.sampled_from(names))
        content: bytes | None = None
        if kind == "flip":
            bit = data.draw(st.integers(0, 8 * len(exported.content) - 1))
            content = flipped(exported.content, bit)
        elif kind == "cut":
            content = exported.content[: -data.draw(st.integers(1, len(exported.content)))]
        elif kind == "flip in file":
            files[name] = flipped(files[name] or b"\0", data.draw(st.integers(0, 10**7)))
        elif kind == "drop":
            del files[name]
        elif kind == "swap":
            other = data.draw(st.sampled_from(names))
            files[name], files[other] = files[other], files[name]
        elif kind == "add":
            files[f"{name}{data.draw(st.integers(0, 99))}"] = files[name]
        elif kind == "empty":
            files[name] = b""
        else:
            name = data.draw(st.sampled_from(lined))
            lines = files[name].splitlines(keepends=True)
            one, other = (data.draw(st.integers(0, len(lines) - 1)) for _ in range(2))
            how = data.draw(st.sampled_from(("exchange", "duplicate", "drop")))
            if how == "exchange":
                lines[one], lines[other] = lines[other], lines[one]
            elif how == "duplicate":
                lines.insert(other, lines[one])
            else:
                del lines[one]
            files[name] = b"".join(lines)
        content = pack(files) if content is None else content
        if content == exported.content:
            return  # two equal files, or an empty one: the same bytes
        tried.add(digest_of(content))
        assert exported.tampering_is_caught(content), (kind, name)

    caught()
    print(f"\n{len(tried)} mutations of the archive, {len(names)} files")
    assert len(tried) >= OF_ARCHIVES * 0.9


def test_the_same_entries_of_both_files_left_out(exported_from_production: Exported) -> None:
    """Whoever hides a failed verdict drops its statement and its leaf; the chain tells."""
    exported = exported_from_production
    attestations = exported.files[ATTESTATIONS].splitlines(keepends=True)
    leaves = exported.files[LEAVES].splitlines(keepends=True)
    for number in range(len(leaves)):
        files = {
            **exported.files,
            ATTESTATIONS: b"".join(attestations[:number] + attestations[number + 1 :]),
            LEAVES: b"".join(leaves[:number] + leaves[number + 1 :]),
        }
        assert exported.tampering_is_caught(pack(files)), number


@dataclass
class Kept:
    """A small log in a store, and what it takes to put it back after each attack."""

    rig: Rig
    log: Path
    pristine: Path
    repository: str

    def entry(self, sequence: int) -> Path:
        return self.log / f"{sequence:012d}"

    def restore(self) -> None:
        shutil.rmtree(self.log)
        shutil.copytree(self.pristine, self.log)

    @property
    def size(self) -> int:
        return len(list(self.pristine.iterdir()))

    def point(self, sequence: int, record: dict[str, Any]) -> None:
        """Puts another record at a place of the log, with the digest that the store wants."""
        content = canonical_json(record)
        digest = digest_of(content)
        blobs = self.rig.platform.settings.store / "blobs" / "sha256"
        blob = blobs / digest.removeprefix("sha256:")
        if not blob.exists():
            blob.write_bytes(content)
        self.entry(sequence).write_text(digest + "\n")

    def record(self, sequence: int) -> dict[str, Any]:
        digest = self.entry(sequence).read_text().strip()
        return dict(self.rig.platform.store.record(digest))

    def read(self) -> None:
        """What the platform reads anyhow: the log with what it remembers of it."""
        self.rig.platform.evidence.verify()

    def read_elsewhere(self, folder: Path) -> None:
        """Reads the log on a machine that never saw it, so by its signatures alone."""
        known = self.rig.platform.evidence
        EvidenceLog(
            FolderStore(self.rig.platform.settings.store),
            EvidenceIndex(folder / "index.sqlite"),
            known.signer,
            known.keys,
        ).verify()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    root = tmp_path_factory.mktemp("log")
    git(root, "init", "--quiet", "--bare", "anchors.git")
    rig = Rig(root / "rig")
    rig.freeze("parrot.v1")
    rig.publish("parrot.v1", "checkpoint", {"weights": "w" * 200, "config.json": "{}"})
    rig.judge("parrot.v1", BUILT[:1], PASSED)
    anchor_in_git(rig.platform.evidence, str(root / "anchors.git"))
    log = rig.platform.settings.store / "logs" / LOG
    shutil.copytree(log, root / "pristine")
    yield Kept(rig, log, root / "pristine", str(root / "anchors.git"))
    rig.close()


def is_caught(read: Callable[[], None]) -> bool:
    try:
        read()
    except LLMOpsError:
        return True
    return False


def test_every_field_of_the_log(kept: Kept, tmp_path: Path) -> None:
    """Whoever writes the store can make digests fit; signatures and tree do not, wherever the
    log is read."""
    records = {sequence: kept.record(sequence) for sequence in range(kept.size)}
    fields = [(sequence, path) for sequence in records for path in places(records[sequence])]
    statements = {
        sequence: json.loads(base64.b64decode(record["envelope"]["payload"]))
        for sequence, record in records.items()
    }
    inside = [(sequence, path) for sequence in records for path in places(statements[sequence])]
    tried: set[str] = set()

    @tries(OF_LOGS)
    @given(
        where=st.one_of(
            st.tuples(st.just(False), st.sampled_from(fields)),
            st.tuples(st.just(True), st.sampled_from(inside)),
        ),
        # A store's records are JSON values: a key cannot stand there twice.
        operation=st.sampled_from(("change", "remove", "retype")),
        at=st.integers(0, 1000),
        remade=st.booleans(),
    )
    def caught(where: Any, operation: str, at: int, remade: bool) -> None:
        in_statement, (sequence, path) = where
        if in_statement:
            record = copy.deepcopy(records[sequence])
            payload = mutated(statements[sequence], path, operation, at).encode()
            record["envelope"]["payload"] = base64.b64encode(payload).decode()
        else:
            record = json.loads(mutated(records[sequence], path, operation, at))
        if remade and isinstance(record.get("leaf"), dict) and "envelope" in record:
            # A careful attacker also names the changed statement in the leaf.
            record["leaf"]["statement"] = digest_of(canonical_json(record["envelope"]))
        if record == records[sequence]:
            return  # nothing was changed
        tried.add(digest_of(canonical_json([sequence, record])))
        kept.point(sequence, record)
        try:
            assert is_caught(kept.read), (where, operation)
            elsewhere = tmp_path / str(len(tried))
            if len(tried) % 5 == 0:
                assert is_caught(lambda: kept.read_elsewhere(elsewhere)), (where, operation)
        finally:
            kept.restore()

    caught()
    kept.read()
    print(f"\n{len(tried)} mutations of the log, {len(fields) + len(inside)} fields")
    assert len(tried) >= OF_LOGS


def test_entries_of_the_log_gone_or_exchanged(kept: Kept) -> None:
    """Every entry deleted, every two exchanged, every entry in the place of every other, and
    the log cut anywhere: the platform's next reading of the release tells."""

    def next_read() -> None:
        for _ in kept.rig.platform.evidence.entries(release_chain("parrot.v1")):
            pass

    def attempt(attack: Callable[[], None], read: Callable[[], None], what: str) -> None:
        try:
            attack()
            assert is_caught(read), what
        finally:
            kept.restore()

    def exchange(one: int, other: int) -> None:
        text = kept.entry(one).read_text()
        kept.entry(one).write_text(kept.entry(other).read_text())
        kept.entry(other).write_text(text)

    def cut(size: int) -> None:
        for sequence in range(size, kept.size):
            kept.entry(sequence).unlink()

    tried = 0
    for one in range(kept.size):
        attempt(kept.entry(one).unlink, kept.read, f"entry {one} deleted")
        attempt(partial(cut, one), next_read, f"cut to {one}")
        tried += 2
        for other in range(one):
            attempt(partial(exchange, one, other), kept.read, f"{one} and {other}")
            replace = partial(kept.point, one, kept.record(other))
            attempt(replace, kept.read, f"{other} in place of {one}")
            tried += 2
    print(f"\n{tried} logs with entries gone or exchanged")


def test_a_log_cut_before_its_anchor_on_a_machine_that_never_saw_it(
    kept: Kept, tmp_path: Path
) -> None:
    """The index may be lost with the machine. Then the cut log looks whole, as the docs say,
    and only what was put elsewhere tells: it must refuse the next anchor."""
    known = kept.rig.platform.evidence
    anchored = kept.size - 1
    for size in range(1, anchored):
        for sequence in range(size, kept.size):
            kept.entry(sequence).unlink()
        forgetful = EvidenceLog(
            known.store, EvidenceIndex(tmp_path / f"{size}.sqlite"), known.signer, known.keys
        )
        try:
            forgetful.verify()  # signatures alone cannot tell
            with pytest.raises(LLMOpsError, match="cut or rewritten"):
                anchor_in_git(forgetful, kept.repository)
        finally:
            kept.restore()


def test_an_older_copy_of_the_whole_store(rig: Rig, tmp_path: Path) -> None:
    """A store put back to what it was last week has no failed verdict of this week: the index
    beside it remembers."""
    rig.freeze("parrot.v1")
    rig.judge("parrot.v1", BUILT[:1], PASSED)
    shutil.copytree(rig.platform.settings.store, tmp_path / "old")
    rig.judge("parrot.v1", BUILT[:1], PASSED)
    shutil.rmtree(rig.platform.settings.store)
    shutil.copytree(tmp_path / "old", rig.platform.settings.store)
    for read in (
        lambda: list(rig.platform.evidence.entries(release_chain("parrot.v1"))),
        lambda: rig.judge("parrot.v1", BUILT[:1], PASSED),
    ):
        with pytest.raises(LLMOpsError, match="is gone"):
            read()


def test_every_bit_of_stored_blobs(kept: Kept) -> None:
    """Disks rot and people edit: a blob that any bit differs in is refused when it is read,
    be it a record, a manifest or a file."""
    store = kept.rig.platform.store
    blobs = kept.rig.platform.settings.store / "blobs" / "sha256"
    results = kept.rig.platform.columns.assets("parrot.v1").values()
    files = {
        file.digest: result.artifact
        for result in results
        for file in store.describe(result.artifact).files
    }
    records = [kept.entry(sequence).read_text().strip() for sequence in range(kept.size)]
    records += [result.artifact for result in results]
    tried: set[tuple[str, int]] = set()

    def read(digest: str) -> None:
        if digest in files:
            # What was checked out before is a copy of its own, and is right.
            checkout = kept.rig.platform.settings.store / "checkouts" / files[digest][7:]
            shutil.rmtree(checkout, ignore_errors=True)
            store.open(files[digest])
        else:
            store.record(digest)

    @tries(OF_BLOBS)
    @given(digest=st.sampled_from([*records, *files]), bit=st.integers(0, 10**6))
    def caught(digest: str, bit: int) -> None:
        blob = blobs / digest.removeprefix("sha256:")
        content = blob.read_bytes()
        bit %= 8 * len(content)
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        blob.chmod(0o644)
        blob.write_bytes(damaged)
        tried.add((digest, bit))
        try:
            assert is_caught(lambda: read(digest)), (digest, bit)
        finally:
            blob.write_bytes(content)

    caught()
    print(f"\n{len(tried)} flipped bits in {len(records) + len(files)} blobs")
    assert len(tried) >= OF_BLOBS
