"""Verification of a release on the installation itself: its evidence, the log, its artifacts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmops_assets.errors import EvidenceError, LLMOpsError, StoreError
from llmops_assets.evidence.export import check_known, take
from llmops_assets.evidence.leaves import release_chain
from llmops_assets.evidence.statements import LIFECYCLE_EVENT, PROVENANCE
from llmops_assets.evidence.verification import Check, Verification, verify_taken
from llmops_assets.evidence.witnesses import Witnesses

if TYPE_CHECKING:
    from llmops_assets.platform import Platform

Progress = Callable[[str, int, int], None]
"""Gets what is being done, how much of it is done, and how much there is."""


def verify_release(
    platform: Platform,
    release: str,
    witnesses: Witnesses,
    *,
    require_anchor: bool,
    deep: bool,
    progress: Progress,
) -> Verification:
    """Reads the whole evidence log and checks it, and the release's evidence as in a bundle.

    Args:
        platform: the installation; its trust root is trusted.
        release: its key.
        witnesses: what the verifier has of the log from elsewhere; read before this is called,
            as the log must be at least as long as what they have.
        require_anchor: whether it fails when none of them vouches for the log.
        deep: whether the release's artifacts are read and hashed as well.
        progress: see `Progress`.

    Raises:
        ReleaseError: the key is malformed.
        EvidenceError: there is nothing about the release in a log that is whole.
    """
    checks = [_check("log", lambda: _log(platform, progress))]
    if checks[0].holds:
        check_known(platform.evidence, release)
    found: Verification | None = None

    def evidence() -> str:
        nonlocal found
        bundle = take(platform, release, progress)
        found = verify_taken(bundle, release, witnesses, require_anchor=require_anchor)
        return f"{len(bundle.leaves)} entries taken from the log"

    checks.append(_check("evidence", evidence))
    if deep:
        checks.append(_check("artifacts", lambda: _artifacts(platform, release, progress)))
    if found is None:
        return Verification(
            releases=(release,), trust_root="", checks=tuple(checks), complete_up_to=None
        )
    return found.model_copy(update={"checks": (*checks, *found.checks)})


def _check(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name=name, holds=True, detail=check())
    except LLMOpsError as error:
        return Check(name=name, holds=False, detail=str(error))


def _log(platform: Platform, progress: Progress) -> str:
    checkpoint = platform.evidence.verify(
        lambda done, size: progress("reading the evidence log", done, size)
    )
    return f"all {checkpoint.size} entries, each signed and as this installation remembers it"


def _artifacts(platform: Platform, release: str, progress: Progress) -> str:
    """Hashes all that signed statements say the release made; what is gone counts as damaged.

    Raises:
        EvidenceError: naming every artifact that the store does not have as it was signed.
    """
    chain = platform.evidence.entries(release_chain(release), PROVENANCE, LIFECYCLE_EVENT)
    assets = {made.sha256: made.name for entry in chain for made in entry.statement.subject}
    size, problems = 0, []
    for done, (digest, asset) in enumerate(assets.items()):
        progress("hashing artifacts", done, len(assets))
        try:
            size += platform.store.open(digest)[0].size
        except StoreError as error:
            problems.append(f"{asset}: {error}")
    progress("hashing artifacts", len(assets), len(assets))
    if problems:
        raise EvidenceError(
            f"Artifacts of {release} are missing or damaged",
            expected=f"{len(assets)} artifacts, as signed statements name them",
            found="; ".join(problems),
            cure="restore the store's blobs from a backup",
        )
    return f"{len(assets)} artifacts, {size} bytes, are what signed statements say"
