"""A real bare repository, a clone to push from, and a platform that follows its branch."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from llmops_assets.evidence.keys import create_keys
from llmops_assets.serving.routes import RouteTarget
from llmops_assets.serving.slots import Colour, Environment
from llmops_assets.settings import Settings

from .release_rig import SPEC, PlatformOnDoubles

WHO = "ada@example.org"


def git(folder: Path, *arguments: str) -> str:
    """Output of git in a folder, as somebody whose configuration is empty."""
    identity = {f"GIT_{who}_{what}": WHO
                for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}  # fmt: skip
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        check=True, capture_output=True, text=True, timeout=30,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), **identity},
    )  # fmt: skip
    return done.stdout.strip()


def spec_of(model: str, **replaced: str) -> str:
    """A valid spec; `accuracy` is the threshold of its accuracy gate, `precision` its engine's."""
    text = SPEC.replace("name: parrot", f"name: {model}")
    text = text.replace("at_least: 0.9,", f"at_least: {replaced.get('accuracy', '0.9')},")
    return text.replace(
        "toolchain: onnxruntime_genai",
        f"toolchain: onnxruntime_genai, precision: {replaced.get('precision', 'int8')}",
    )


class Pushes:
    """A bare repository and its author's clone; the branch is `main`, the folder `models`."""

    def __init__(self, root: Path) -> None:
        self.bare = root / "team.git"
        self.clone = root / "clone"
        root.mkdir(parents=True, exist_ok=True)
        git(root, "init", "--quiet", "--bare", "--initial-branch=main", str(self.bare))
        git(root, "init", "--quiet", "--initial-branch=main", str(self.clone))
        git(self.clone, "remote", "add", "origin", str(self.bare))
        self.models = self.clone / "models"
        self.models.mkdir()

    def commit(self, *deleted: str, **specs: str) -> str:
        """Commits specs by model (`_` for `-`), without pushing; returns the commit."""
        for model, text in specs.items():
            self.write(f"models/{model.replace('_', '-')}.yaml", text)
        for model in deleted:
            (self.models / f"{model}.yaml").unlink()
        git(self.clone, "add", "--all")
        git(self.clone, "commit", "--quiet", "--allow-empty", "--message", "change")
        return git(self.clone, "rev-parse", "HEAD")

    def push(self, *deleted: str, **specs: str) -> str:
        """Commits and pushes; returns the commit."""
        commit = self.commit(*deleted, **specs)
        git(self.clone, "push", "--quiet", "--force", "origin", "HEAD:refs/heads/main")
        return commit

    def force(self, commit: str) -> None:
        """Makes the branch what it was at a commit."""
        git(self.clone, "reset", "--quiet", "--hard", commit)
        git(self.clone, "push", "--quiet", "--force", "origin", f"{commit}:refs/heads/main")

    def write(self, path: str, content: str | bytes) -> None:
        file = self.clone / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)


def following(root: Path, repository: str, **settings: object) -> PlatformOnDoubles:
    """A platform in a folder of its own that follows the branch of a repository."""
    values = {"git_timeout_seconds": 20.0, **settings}
    checkout = root / "checkout" / "models"
    checkout.mkdir(parents=True, exist_ok=True)
    read = Settings.model_validate(
        {"state": root / "state", "models": checkout, "git_repository": repository, **values}
    )
    create_keys(read.key_folder)
    return PlatformOnDoubles(read)


def serve(platform: PlatformOnDoubles, model: str, release: str) -> None:
    """Records a release as what serves in production."""
    target = RouteTarget(
        colour=Colour.BLUE, weight=100, package="sha256:" + "0" * 64, release=release,
        version=1, host="127.0.0.1", http_port=1, grpc_port=2, metrics_port=3,
    )  # fmt: skip
    platform.routes.change(
        Environment.PRODUCTION, model, [target], actor="ada", reason="test", expected=None
    )
