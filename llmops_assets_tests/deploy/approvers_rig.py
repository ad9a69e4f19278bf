"""A release in staging, people with OpenSSH keys, and a policy of approvers on a protected ref."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from llmops_assets.deploy.accepted_approvers import SIGNATURES_FOLDER
from llmops_assets.deploy.approval import RecordedDecision
from llmops_assets.deploy.signed_decision import (
    SignedDecision,
    decision_about,
    read_signed,
    sign_decision,
)
from llmops_assets.develop.specs import SpecSource
from llmops_assets.evidence import attest
from llmops_assets.evidence.approver_keys import signer_of
from llmops_assets.evidence.dsse import Envelope, Signer
from llmops_assets.evidence.gates import STAGED
from llmops_assets.evidence.leaves import APPROVALS, Entry, release_chain
from llmops_assets.evidence.log import Attestation
from llmops_assets.evidence.statements import Statement
from llmops_assets.platform import SPEC_FILE
from llmops_assets.spec import ModelSpec, canonical, parse_spec

from ..git_rig import git
from ..release_rig import PASSED, SPEC, PlatformOnDoubles, Rig

RELEASE = "parrot.v1"
REF = "refs/heads/approvers"
AUTHOR = "ada@example.org"
"""Author and committer of every commit, see `git_rig.git`."""


class Person:
    """Somebody with a key of their own."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.file = folder / f"{name}_ed25519"
        key = Ed25519PrivateKey.generate()
        folder.mkdir(parents=True, exist_ok=True)
        self.file.write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        )
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        self.public = f"{public.decode()} {name}@laptop"

    @property
    def signer(self) -> Signer:
        return signer_of(self.file, lambda: "")


class ApproversRig(Rig):
    """The rig in a git repository whose ref `approvers` has the policy."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.people = {
            name: Person(root / "keys", name)
            for name in ("grace", "heidi", "ada", "ivan", "late", "mallory")
        }
        git(root, "init", "--quiet", "--initial-branch=main")
        (root / ".gitignore").write_text("state/\nkeys/\npolicy/\n")
        self.commit = self.commit_all()
        self.checkout = root / "policy"
        git(root, "worktree", "add", "--quiet", "-b", "approvers", str(self.checkout))
        self.write_policy(self.policy())
        settings = self.platform.settings.model_copy(update={"approvers_ref": REF})
        self.platform = PlatformOnDoubles(settings)

    def commit_all(self, folder: Path | None = None, *options: str) -> str:
        git(folder or self.root, "add", "--all")
        git(folder or self.root, "commit", "--quiet", "--allow-empty", "-m", "change", *options)
        return git(folder or self.root, "rev-parse", "HEAD")

    def policy(self, *, required: int = 1, change: int = 2, **extra: Any) -> dict[str, Any]:
        """grace and heidi may approve; so might ada, who wrote the change, and ivan, who asked."""
        people = {
            "grace": ["grace@example.org"], "heidi": [], "ada": [AUTHOR], "ivan": [], "late": [],
        }  # fmt: skip
        keys: dict[str, dict[str, Any]] = {n: {"key": self.people[n].public} for n in people}
        keys["late"]["valid_until"] = "2026-01-01T00:00:00Z"
        return {
            "approvers": [
                {"name": name, "identities": names, "keys": [keys[name]]}
                for name, names in people.items()
            ],
            "groups": {"reviewers": ["grace", "heidi", "ada", "ivan", "late"]},
            "rules": [{"models": "parrot", "approvers": ["reviewers"], "required": required}],
            "policy_change": {"required": change},
            **extra,
        }

    def write_policy(
        self, policy: Mapping[str, Any], signatures: Mapping[str, Envelope] | None = None
    ) -> bytes:
        """Commits a policy to the protected ref, with who signed it in the same commit."""
        content = json.dumps(policy, indent=1).encode()  # which is YAML as well
        models = self.checkout / "models"
        models.mkdir(exist_ok=True)
        (models / "approvers.yaml").write_bytes(content)
        folder = models / SIGNATURES_FOLDER
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for name, envelope in (signatures or {}).items():
            (folder / f"{name}.json").write_text(envelope.model_dump_json())
        self.commit_all(self.checkout)
        return content

    def freeze(self, release: str, text: str = SPEC, requested_by: str = "ivan") -> ModelSpec:
        spec = parse_spec(text, "test")
        source = SpecSource(file="models/parrot.yaml", commit=self.commit, changed=False)
        self.publish(
            release,
            "model_spec",
            {SPEC_FILE: json.dumps(canonical(spec)), "source.json": source.model_dump_json()},
            facts={"requested_by": requested_by},
        )
        self.platform.columns.enlist(spec.name, release)
        return spec

    def stage(self, release: str = RELEASE, version: int = 1) -> None:
        """Brings a release to where somebody decides."""
        self.build(release, version)
        self.publish(release, "staging_deployment", {"document.json": f'{{"v": {version}}}'})
        self.judge(release, STAGED, PASSED)

    def decided(
        self, by: str = "grace", release: str = RELEASE, *, days: float = 1, **changes: Any
    ) -> SignedDecision:
        """What somebody would sign, with changes."""
        decided = decision_about(
            self.platform, release,
            self.platform.columns.get(release, "packaged_model").artifact,
            approver=by, decision="approve", reason="it answers", valid=timedelta(days=days),
        )  # fmt: skip
        return decided.model_copy(update=changes)

    def sign(self, decided: SignedDecision, by: str | None = None) -> Envelope:
        return sign_decision(decided, self.people[by or decided.approver].signer)

    def force(self, envelope: Envelope, release: str = RELEASE) -> Entry:
        """Puts a decision into the log past all checks, as whoever has the platform's key can."""
        said = read_signed(envelope)
        recorded = RecordedDecision(
            release=release, approver=said.approver, decision=said.decision, reason=said.reason,
            package=said.package, time=said.time, evidence="signed", envelope=envelope,
        )  # fmt: skip
        chains = (APPROVALS, release_chain(release))
        return self.platform.evidence.append(Attestation(attest.decision(recorded), chains))[0]


def edited(envelope: Envelope, **changes: Any) -> Envelope:
    """An envelope whose predicate was changed after it was signed."""
    statement = Statement.parse(base64.b64decode(envelope.payload))
    changed = statement.model_copy(update={"predicate": {**statement.predicate, **changes}})
    payload = base64.b64encode(changed.payload()).decode("ascii")
    return envelope.model_copy(update={"payload": payload})


def shifted(by: timedelta) -> type[datetime]:
    """A clock that is wrong, or somebody who comes later."""

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + by

    return Shifted
