"""Secrets in a package: found in any text file, and never repeated."""

from __future__ import annotations

import json
import random
import shutil
import string
from pathlib import Path

import pytest

from llmops_assets.compliance.secrets import find_secrets
from llmops_assets.errors import DataError

from ..tiny_llama import tiny_llama

# Put together here, so that no scanner of this repository takes them for real ones.
GITHUB_TOKEN = "ghp_" + "wJ4kT9xQ2mV7nB5cR8yL3pF6sD1gH0zAeUiO"
AWS_KEY = "AKIA" + "Q6ZTM2XJ7PLR4WVN"
PRIVATE_KEY = "-----BEGIN " + "RSA PRIVATE KEY-----"


@pytest.fixture
def package(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """A copy of a real package that the toolchain made."""
    tiny = tiny_llama(tmp_path_factory.getbasetemp() / "tiny_llama")
    return Path(shutil.copytree(tiny.package, tmp_path / "package"))


def test_real_package_is_clean(package: Path) -> None:
    """Its tokenizer, its config and its code must not be taken for secrets."""
    report = find_secrets(package)
    assert report.problems == ()
    assert any(name.endswith("model.onnx") for name in report.binary)
    assert report.scanned + len(report.binary) == sum(path.is_file() for path in package.rglob("*"))


@pytest.mark.parametrize(
    ("name", "line", "kind", "secret"),
    [
        ("config.json", f'  "token": "{GITHUB_TOKEN}",', "GitHub Token", GITHUB_TOKEN),
        ("model.py", f'KEY = "{AWS_KEY}"', "AWS Access Key", AWS_KEY),
        ("notes.txt", PRIVATE_KEY, "Private Key", PRIVATE_KEY),
        ("settings.yaml", "password: hunter2-and-more", "Secret Keyword", "hunter2-and-more"),
        ("model.py", 'url = "https://me:s3cr3tword@host/"', "Basic Auth", "s3cr3tword"),
        # A token of its own form is looked for even among the words of a vocabulary.
        ("tokenizer.json", f'"{GITHUB_TOKEN}": 7,', "GitHub Token", GITHUB_TOKEN),
        # Names and comments with which detect-secrets lets a file or a line pass.
        ("weights.lock", f'token = "{GITHUB_TOKEN}"', "GitHub Token", GITHUB_TOKEN),
        ("data.bin", f'token = "{GITHUB_TOKEN}"', "GitHub Token", GITHUB_TOKEN),
        ("m.py", f'a = "{AWS_KEY}"  # pragma: allowlist secret', "AWS Access Key", AWS_KEY),
        # Behind a key that names no digest.
        ("config.json", '"auth": "' + "9f86d081884c7d65" * 2 + '"', "Hex High", "9f86d081884c7d65"),
    ],
)
def test_leaked_secret_is_found(
    package: Path, name: str, line: str, kind: str, secret: str
) -> None:
    """Where it is must be said, what it is must not: the report is shown to many."""
    path = package / "repository" / name
    path.write_text(f"first line\n{line}\n")
    report = find_secrets(package)
    assert not report.passed
    found = next(finding for finding in report.findings if kind in finding.kind)
    assert found.path == f"repository/{name}"
    assert found.line == 2
    assert secret not in report.model_dump_json()
    assert any(f"repository/{name}:{found.line}: {kind}" in text for text in report.problems)


def test_digests_and_vocabularies_are_no_secrets(tmp_path: Path) -> None:
    """Manifests are full of digests, tokenizers of random letters; both look like keys."""
    digest = "".join(random.Random(0).choices("0123456789abcdef", k=64))
    (tmp_path / "manifest.json").write_text(
        json.dumps(
            {
                "digest": f"sha256:{digest}", "sha256": digest, "commit": digest[:40],
                "files": [{"path": "model.onnx", "sha512": digest * 2, "md5": digest[:32]}],
            },
            indent=2,
        )
    )  # fmt: skip
    (tmp_path / "compact.json").write_text(json.dumps({"name": "x", "content-hash": digest}))
    words = {string.ascii_uppercase + string.ascii_lowercase + "9876543210+/": 0, "password": 1}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}))
    report = find_secrets(tmp_path)
    assert report.problems == ()
    assert report.scanned == 3


def test_what_cannot_be_read_is_not_passed_over(tmp_path: Path) -> None:
    """Binary files are listed; one that only might be text is a problem."""
    (tmp_path / "model.onnx").write_bytes(b"\0\1")
    (tmp_path / "latin1.txt").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "outside.txt").symlink_to("/etc/hostname")
    report = find_secrets(tmp_path)
    assert report.binary == ("model.onnx",)
    assert report.scanned == 0
    (problem,) = report.problems
    assert problem.startswith("latin1.txt: neither UTF-8 text nor binary")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    """Nothing found because nothing was looked at is no pass."""
    with pytest.raises(DataError, match="There is no folder"):
        find_secrets(tmp_path / "gone")
