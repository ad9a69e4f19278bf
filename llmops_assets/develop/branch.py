"""The branch whose pushes make releases: a mirror of it here, and its commits.

The mirror is a bare repository in the state folder that only grows, one commit deep a
push. It may be deleted: what is needed of it is fetched again.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from llmops_assets.develop.remote import Remote
from llmops_assets.develop.spec_files import Repository, read_specs, specs_in
from llmops_assets.errors import SpecError, TriggerError
from llmops_assets.evidence.attest import APPROVERS_FILE
from llmops_assets.git import ask_git
from llmops_assets.settings import Settings
from llmops_assets.spec import ModelSpec, read_spec

logger = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
# What a server says that does not have a commit, or does not give single ones.
NOT_GIVEN = ("not our ref", "unadvertised object", "couldn't find remote ref")
# An export is what was committed, whatever the repository's attributes make of it.
ATTRIBUTES = "* -text -ident -filter -export-ignore -export-subst -working-tree-encoding\n"


def repository(settings: Settings) -> Repository:
    """Where commits are looked up: the mirror, or the repository that holds LLMOPS_MODELS.

    Raises:
        SettingsError: LLMOPS_GIT_REPOSITORY cannot be used.
        SpecError: it is not set, and LLMOPS_MODELS is in no repository.
    """
    remote = Remote.of(settings)
    if remote is not None:
        return _mirror(settings, remote)
    models = settings.models
    top = ask_git(models, "rev-parse", "--show-toplevel") if models.is_dir() else None
    if top is None:
        raise SpecError(
            f"There is no commit of {models}: it is in no git repository",
            cure="set LLMOPS_GIT_REPOSITORY, or LLMOPS_MODELS to a folder in a clone",
        )
    return Repository(Path(top), (), models.relative_to(top).as_posix())


def remote_head(settings: Settings) -> str:
    """The commit that the branch is at, asked of its repository; cheap.

    Raises:
        TriggerError: it does not answer, or has no such branch.
    """
    remote = _remote(settings)
    with _alone(settings, remote):
        return _remote_head(settings, remote)


def fetch(settings: Settings) -> str:
    """Brings the branch into the mirror, and returns the commit that it is at.

    Raises:
        TriggerError: its repository does not answer, or has no such branch.
    """
    remote = _remote(settings)
    name = f"refs/heads/{remote.branch}"
    with _alone(settings, remote):
        _fetch(settings, remote, f"+{name}:{name}")
    head = _mirror(settings, remote).resolve(name)
    assert head is not None  # it was fetched just now
    return head


def obtain(settings: Settings, commit: str) -> str | None:
    """The full hash of a commit that is here, or could be fetched; None for neither.

    Args:
        commit: a hash, perhaps abbreviated, or the branch; without a mirror, any revision.

    Raises:
        TriggerError: the repository does not answer.
        SpecError: git does not answer, or refuses.
    """
    commits = repository(settings)
    found = commits.resolve(commit)
    remote = Remote.of(settings)
    if found is not None or remote is None:
        return found
    if COMMIT.fullmatch(commit):
        with _alone(settings, remote):
            try:
                _fetch(settings, remote, commit)
            except TriggerError as error:
                if not any(words in str(error) for words in NOT_GIVEN):
                    raise
                logger.warning("%s does not give commit %s", remote.address, commit)
    else:
        # Only whole hashes can be asked for; but it may be newer than the last fetch.
        fetch(settings)
    return commits.resolve(commit)


def head_commit(settings: Settings) -> str | None:
    """The newest commit that was fetched of the branch; None without LLMOPS_GIT_REPOSITORY.

    Raises:
        TriggerError: none was, and its repository does not answer.
    """
    remote = Remote.of(settings)
    if remote is None:
        return None
    fetched = _mirror(settings, remote).resolve(f"refs/heads/{remote.branch}")
    return fetched or fetch(settings)


def author(settings: Settings, commit: str) -> str:
    """The e-mail address of a commit's author, as the commit claims.

    Raises:
        SpecError: the commit is not here.
    """
    return repository(settings).ask("show", "-s", "--format=%ae", commit) or "unknown"


def current_specs(settings: Settings) -> Mapping[str, ModelSpec]:
    """All valid specs as they are now, by model: of the newest commit that was fetched, or
    without LLMOPS_GIT_REPOSITORY the files in LLMOPS_MODELS. Unchanged ones are not parsed
    again.

    Raises:
        TriggerError: no commit was fetched yet, and its repository does not answer.
        SpecError: git does not answer.
    """
    commit = head_commit(settings)
    if commit is None:
        return _specs_in_folder(settings.models)
    commits = repository(settings)
    parsed = read_specs(commits, specs_in(commits, commit).values())
    return {spec.name: spec for spec in parsed.values() if isinstance(spec, ModelSpec)}


def tree(settings: Settings, commit: str) -> Path:
    """A read-only folder with all files of a commit. It may be deleted, and comes again.

    Args:
        commit: the full hash.

    Raises:
        SpecError: there is no such commit.
        TriggerError: it is not here, and its repository does not answer.
    """
    trees = settings.state / "git" / "trees"
    target = trees / commit
    if target.is_dir():
        return target
    if not COMMIT.fullmatch(commit) or obtain(settings, commit) is None:
        raise SpecError(
            f"There is no commit {commit}",
            expected="the commit that the release was made from",
            cure="push it again, or make a new release",
        )
    trees.mkdir(parents=True, exist_ok=True)
    with _locked(trees / ".lock", settings):
        if target.is_dir():
            return target
        for leftover in trees.glob(".partial-*"):  # of a process that was killed
            _remove(leftover)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=trees))
        _export(settings, commit, partial)
        (partial / "tree").rename(target)
        target.chmod(0o555)
        _remove(partial)
    return target


def _remote(settings: Settings) -> Remote:
    remote = Remote.of(settings)
    if remote is None:
        raise TriggerError(
            "There is no branch to read", cure="set LLMOPS_GIT_REPOSITORY to a path or URL"
        )
    return remote


def _mirror(settings: Settings, remote: Remote) -> Repository:
    # One for each branch: branches named a and a/b cannot be in one repository.
    folder = settings.state / "git" / f"{remote.key}-{remote.branch.replace('/', '%')}.git"
    return Repository(folder, ("--git-dir=.",), settings.git_models)


def _remote_head(settings: Settings, remote: Remote) -> str:
    name = f"refs/heads/{remote.branch}"
    mirror = _mirror(settings, remote).folder
    lines = remote.call(settings, mirror, "ls-remote", "--", remote.address, name)
    for line in lines:
        commit, _, found = line.partition("\t")
        if found == name and COMMIT.fullmatch(commit):
            return commit
    raise TriggerError(
        f"The repository {remote.address} has no branch {remote.branch}",
        expected=name,
        found="no such branch",
        cure="push it, or set LLMOPS_GIT_BRANCH to the branch that counts",
    )


def _fetch(settings: Settings, remote: Remote, what: str) -> None:
    # A git that outlived a killed process holds the mirror's folder until it has ended;
    # so after this call nobody uses what such a one left.
    _remote_head(settings, remote)
    mirror = _mirror(settings, remote).folder
    for leftover in (*mirror.glob("*.lock"), *mirror.glob("refs/**/*.lock")):
        leftover.unlink()
    remote.call(settings, mirror, "init", "--bare", "--quiet", "--template=", ".")
    (mirror / "info").mkdir(exist_ok=True)
    (mirror / "info" / "attributes").write_text(ATTRIBUTES)
    remote.call(
        settings, mirror, "--git-dir=.", "fetch", "--quiet", "--depth=1", "--no-tags",
        "--no-recurse-submodules", "--", remote.address, what,
    )  # fmt: skip


@contextmanager
def _alone(settings: Settings, remote: Remote) -> Iterator[None]:
    folder = _mirror(settings, remote).folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".turn"), settings):
        yield


@contextmanager
def _locked(path: Path, settings: Settings) -> Iterator[None]:
    lock = FileLock(path)
    try:
        # Whoever has it makes a few calls of git, each of which ends in time.
        lock.acquire(timeout=5 * settings.git_timeout_seconds)
    except Timeout as error:
        raise TriggerError(
            "Another process uses the mirror of the repository",
            found=f"a lock on {path}",
            cure="wait for its end; it is tried again",
        ) from error
    try:
        yield
    finally:
        lock.release()


def _export(settings: Settings, commit: str, partial: Path) -> None:
    """Puts a commit's files into `tree` in a folder."""
    archive, exported = partial / "archive.tar", partial / "tree"
    repository(settings).read(
        "archive", "--format=tar", f"--output={archive}", commit,
        timeout_seconds=settings.git_timeout_seconds,
    )  # fmt: skip
    exported.mkdir()
    with tarfile.open(archive) as tar:
        inside = [member for member in tar if _stays_inside(member, exported)]
        tar.extractall(exported, members=inside, filter="data")
    for folder, _, files in os.walk(exported):
        for name in files:
            file = Path(folder, name)
            if not file.is_symlink():
                file.chmod(file.stat().st_mode & 0o555)
        if Path(folder) != exported:  # which is renamed yet
            Path(folder).chmod(0o555)


def _stays_inside(member: tarfile.TarInfo, folder: Path) -> bool:
    """Whether it is no link that leads out of the folder."""
    try:
        tarfile.data_filter(member, str(folder))
    except tarfile.FilterError as error:
        logger.warning("left out of the export of a commit: %s", error)
        return False
    return True


def _remove(folder: Path) -> None:
    for below, _, _ in os.walk(folder):
        Path(below).chmod(0o700)
    shutil.rmtree(folder)


_read: dict[Path, tuple[tuple[int, ...], ModelSpec | None]] = {}


def _specs_in_folder(models: Path) -> Mapping[str, ModelSpec]:
    specs: dict[str, ModelSpec] = {}
    for path in sorted(models.glob("*.yaml")):
        if path.name == APPROVERS_FILE:
            continue
        try:
            status = path.stat()
        except FileNotFoundError:
            continue  # deleted since it was listed
        state = (status.st_mtime_ns, status.st_size, status.st_ino)
        if path not in _read or _read[path][0] != state:
            _read[path] = (state, _valid(path))
        if (spec := _read[path][1]) is not None:
            specs[spec.name] = spec
    return specs


def _valid(path: Path) -> ModelSpec | None:
    try:
        return read_spec(path)
    except SpecError as error:
        logger.warning("left out: %s", error)
        return None
