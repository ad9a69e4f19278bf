"""Documents beside the log in a bundle, and whether statements stand behind them.

    releases/<release>/<asset>/manifest.json   OCI manifest of an artifact: digests of its files
    releases/<release>/<asset>/files/<path>    a file of it that auditors read
    releases/<release>/packaged_model/model.sig
                                               OpenSSF signature of the package's files
    releases/<release>/<name>                  made for the export, such as the audit page

An artifact is known by the digest of its manifest, which the statement of how it was made
names. So a file that its manifest names is the file that the release was judged by.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from llmops_assets.errors import EvidenceError
from llmops_assets.evidence.attest import PACKAGE
from llmops_assets.evidence.keys import TrustRoot
from llmops_assets.evidence.leaves import Entry
from llmops_assets.evidence.package_signature import SIGNATURE_FILE, check_files, signed_files
from llmops_assets.evidence.statements import PROVENANCE
from llmops_assets.storage.store import digest_of

MANIFEST = "manifest.json"
FILES = "files"
TITLE = "org.opencontainers.image.title"


def folder_of(release: str) -> str:
    """Where a bundle has the documents of a release."""
    return f"releases/{release}"


def manifest_name(release: str, asset: str) -> str:
    """Where a bundle has the manifest of an artifact."""
    return f"{folder_of(release)}/{asset}/{MANIFEST}"


def file_name(release: str, asset: str, path: str) -> str:
    """Where a bundle has a file of an artifact."""
    return f"{folder_of(release)}/{asset}/{FILES}/{path}"


def signature_name(release: str) -> str:
    """Where a bundle has the signature of a release's package."""
    return f"{folder_of(release)}/{PACKAGE}/{SIGNATURE_FILE}"


def check_documents(
    documents: Mapping[str, bytes], release: str, entries: Sequence[Entry], root: TrustRoot
) -> tuple[int, str]:
    """Checks that every manifest is of a release's artifact, and every file in its manifest.

    Args:
        documents: all in the bundle, by name; that these are the exported ones was checked.
        release: its key.
        entries: its chain, verified.
        root: says whose signatures of packages count.

    Returns:
        How many there are, and what was checked in words.

    Raises:
        EvidenceError: naming the first document that no statement stands behind.
    """
    made = {
        (entry.statement.subject[0].name, entry.statement.subject[0].sha256)
        for entry in entries
        if entry.statement.predicate_type == PROVENANCE
    }
    manifests: dict[str, Mapping[str, str]] = {}
    files = 0
    prefix = f"{folder_of(release)}/"
    own = {name: content for name, content in documents.items() if name.startswith(prefix)}
    for name, content in own.items():
        asset, _, rest = name.removeprefix(prefix).partition("/")
        if rest == MANIFEST:
            if (asset, digest_of(content)) not in made:
                raise _unnamed(name, f"an artifact {asset} of {release}", digest_of(content))
            manifests[asset] = layers(content, name)
    for name, content in own.items():
        asset, _, rest = name.removeprefix(prefix).partition("/")
        if rest.startswith(f"{FILES}/"):
            expected = manifests.get(asset, {}).get(rest.removeprefix(f"{FILES}/"))
            if expected != digest_of(content):
                raise _unnamed(name, f"a file that the manifest of {asset} names", expected)
            files += 1
    words = f"{len(manifests)} manifests and {files} files of artifacts that statements name"
    signature = own.get(signature_name(release))
    package = own.get(manifest_name(release, PACKAGE))
    if signature is None or package is None:
        return len(own), f"{words}; no signed package"
    signed = signed_files(signature, root, digest_of(package))
    check_files(manifests[PACKAGE], signed, "The package's manifest")
    return len(own), (
        f"{words}; the package's signature covers all {len(signed)} files of its manifest "
        "(their bytes are not here: `model_signing verify key` checks a package with them)"
    )


def layers(manifest: bytes, name: str) -> Mapping[str, str]:
    """The files of an OCI image manifest: digest by path.

    Args:
        manifest: its bytes.
        name: names it in messages.

    Raises:
        EvidenceError: it is none.
    """
    try:
        return {
            layer["annotations"][TITLE]: layer["digest"] for layer in json.loads(manifest)["layers"]
        }
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise EvidenceError(
            f"{name} is no manifest of an artifact",
            expected="an OCI image manifest whose layers have titles",
            found=error,
            cure="verify with the version of the platform that wrote it",
        ) from error


def _unnamed(name: str, expected: str, found: object) -> EvidenceError:
    return EvidenceError(
        f"No signed statement stands behind {name}",
        expected=expected,
        found=found,
        cure="do not rely on this document; ask for the evidence again",
    )
