"""The mirror of a branch, on real repositories: outages, rewritten history, hostile addresses."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import psutil
import pytest

from llmops_assets.develop import branch, spec_files
from llmops_assets.develop.remote import Remote
from llmops_assets.errors import LLMOpsError, SettingsError, SpecError, TriggerError
from llmops_assets.settings import Settings

from ..git_rig import WHO, Pushes, following, git, spec_of

SECRET = "hunter2hunter2"


@pytest.fixture
def pushes(tmp_path: Path) -> Pushes:
    pushes = Pushes(tmp_path.resolve() / "git")
    pushes.push(parrot=spec_of("parrot"), raven=spec_of("raven"))
    return pushes


@pytest.fixture
def settings(tmp_path: Path, pushes: Pushes) -> Settings:
    return following(tmp_path.resolve(), str(pushes.bare)).settings


def mirror(settings: Settings) -> Path:
    return branch.repository(settings).folder


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_branch_is_followed(tmp_path: Path, pushes: Pushes, form: str) -> None:
    """Paths and URLs."""
    settings = following(tmp_path, form.format(pushes.bare)).settings
    first = git(pushes.clone, "rev-parse", "HEAD")
    assert branch.remote_head(settings) == branch.fetch(settings) == first
    assert branch.head_commit(settings) == first
    assert branch.author(settings, first) == WHO
    second = pushes.push(parrot=spec_of("parrot", accuracy="0.95"))
    assert branch.remote_head(settings) == second
    assert branch.head_commit(settings) == first, "only a fetch brings it here"
    assert branch.fetch(settings) == second
    assert branch.obtain(settings, first) == first, "what was released stays readable"


def test_mirror_stays_shallow_and_beside_other_repositories(tmp_path: Path, pushes: Pushes) -> None:
    """A state folder inside of a clone, as by default: git must not take that for the mirror."""
    for number in range(3):
        pushes.push(parrot=spec_of("parrot", accuracy=f"0.9{number + 1}"))
    git(pushes.clone, "config", "url./nowhere/.insteadOf", str(pushes.bare))
    settings = following(pushes.clone, str(pushes.bare)).settings
    assert branch.repository(settings).resolve("HEAD") is None
    branch.fetch(settings)
    name = "refs/heads/main"
    assert git(mirror(settings), "--git-dir=.", "rev-list", "--count", name) == "1"
    assert branch.repository(settings).resolve("HEAD~1") is None


def test_without_a_repository_there_is_no_head(tmp_path: Path) -> None:
    """Triggers that ask for the head then release the files as they are."""
    settings = Settings(state=tmp_path, models=tmp_path / "models")
    assert branch.head_commit(settings) is None
    with pytest.raises(TriggerError, match="LLMOPS_GIT_REPOSITORY"):
        branch.fetch(settings)


def test_head_is_fetched_where_it_never_was(settings: Settings, pushes: Pushes) -> None:
    """A schedule may be due before the git trigger's first tick."""
    assert branch.head_commit(settings) == git(pushes.clone, "rev-parse", "HEAD")


def test_missing_branch_and_repository_say_what_to_do(tmp_path: Path, pushes: Pushes) -> None:
    """The two mistakes that everybody makes once."""
    with pytest.raises(TriggerError, match=r"no branch release/1.*LLMOPS_GIT_BRANCH"):
        branch.remote_head(following(tmp_path, str(pushes.bare), git_branch="release/1").settings)
    settings = following(tmp_path, str(tmp_path / "nowhere.git")).settings
    with pytest.raises(TriggerError, match=r"does not appear to be a git.*`git ls-remote"):
        branch.fetch(settings)


def test_deleted_mirror_is_fetched_again(settings: Settings, pushes: Pushes) -> None:
    """The state folder may be cleaned; commits of releases must come back one by one."""
    first = branch.fetch(settings)
    second = pushes.push(parrot=spec_of("parrot", accuracy="0.95"))
    shutil.rmtree(mirror(settings))
    assert branch.obtain(settings, first) == first
    shutil.rmtree(mirror(settings))
    assert branch.obtain(settings, second[:12]) == second, "as a release's name has it"
    assert branch.obtain(settings, "f" * 40) is None
    assert branch.obtain(settings, "f" * 12) is None


def test_outage_is_no_missing_commit(settings: Settings, pushes: Pushes) -> None:
    """Else the trigger would compare with releases whenever the network is down."""
    branch.fetch(settings)
    pushes.bare.rename(pushes.bare.with_name("away.git"))
    with pytest.raises(TriggerError):
        branch.obtain(settings, "f" * 40)


def test_what_a_killed_fetch_left_is_cleared(settings: Settings, pushes: Pushes) -> None:
    """Git removes its locks itself, but not when it is killed with -9."""
    branch.fetch(settings)
    head = pushes.push(parrot=spec_of("parrot", accuracy="0.95"))
    for name in ("shallow.lock", "config.lock", "refs/heads/main.lock", "HEAD.lock"):
        (mirror(settings) / name).touch()
    assert branch.fetch(settings) == head


def test_many_at_once_share_a_mirror(settings: Settings, pushes: Pushes) -> None:
    """Runs on several workers ask for their commits while the trigger fetches."""
    head = git(pushes.clone, "rev-parse", "HEAD")
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: branch.fetch(settings), range(4))) == {head}
        assert len(set(pool.map(lambda _: branch.tree(settings, head), range(4)))) == 1


def test_branches_whose_names_are_in_each_others_way(tmp_path: Path, pushes: Pushes) -> None:
    """One repository cannot hold branches `a` and `a/b`, but may over time."""
    git(pushes.clone, "push", "--quiet", "origin", "HEAD:refs/heads/a")
    branch.fetch(following(tmp_path, str(pushes.bare), git_branch="a").settings)
    git(pushes.clone, "push", "--quiet", "origin", ":refs/heads/a", "HEAD:refs/heads/a/b")
    branch.fetch(following(tmp_path, str(pushes.bare), git_branch="a/b").settings)


def test_hanging_remote_is_given_up_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead server must not hold the daemon, nor fill the machine with processes."""
    marker = tmp_path / "pid"
    fake = tmp_path / "ssh"
    fake.write_text(f"#!/bin/sh\nsleep 600 &\necho $! >> {marker}\nwait\n")
    fake.chmod(0o755)
    monkeypatch.setenv("GIT_SSH_COMMAND", str(fake))
    settings = following(tmp_path, "git@example.org:x.git", git_timeout_seconds=1.5).settings
    started = time.monotonic()
    with pytest.raises(TriggerError, match=r"stopped after 2 s"):
        branch.remote_head(settings)
    assert time.monotonic() - started < 15
    pids = [int(pid) for pid in marker.read_text().split()]
    assert pids
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_ssh_never_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question on a terminal that nobody reads looks like a hanging sensor."""
    monkeypatch.delenv("GIT_SSH_COMMAND", raising=False)
    seen = tmp_path / "arguments"
    fake = tmp_path / "bin" / "ssh"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" GIT_TERMINAL_PROMPT=$GIT_TERMINAL_PROMPT > {seen}\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    with pytest.raises(TriggerError):
        branch.remote_head(following(tmp_path, "ssh://git@example.org/x.git").settings)
    for part in ("BatchMode=yes", "ConnectTimeout=", "git@example.org", "GIT_TERMINAL_PROMPT=0"):
        assert part in seen.read_text()


@pytest.mark.parametrize(
    "address",
    [
        "--upload-pack=touch /tmp/x",
        "-x",
        "ext::sh -c touch% /tmp/x",
        "relative/path",
        f"http://ada:{SECRET}@example.org/x.git",
        f"ssh://ada:{SECRET}@example.org/x.git",
        "ssh://-oProxyCommand=x/y",
        "ssh://-x@example.org/y",
        "-x@example.org:y",
        "example.org:-x",
        "git://example.org/x.git",
        f"https://ada:{SECRET}@[bad/x.git",
        "https:///x.git",
        "",
    ],
)
def test_other_addresses_are_refused(tmp_path: Path, address: str) -> None:
    """Git reads some of these as options or commands; none is shown, for its password."""
    with pytest.raises(SettingsError, match="LLMOPS_GIT_REPOSITORY") as caught:
        branch.remote_head(following(tmp_path, address).settings)
    assert SECRET not in str(caught.value)


def test_password_is_in_no_error_nor_name(tmp_path: Path) -> None:
    """Errors of ticks are shown to everybody who may read Dagster."""
    settings = following(tmp_path, f"https://ada:{SECRET}@127.0.0.1:1/x.git").settings
    with pytest.raises(TriggerError) as caught:
        branch.remote_head(settings)
    shown = [str(caught.value), repr(caught.value.__cause__), repr(Remote.of(settings))]
    assert not any(SECRET in text for text in shown)
    assert SECRET not in mirror(settings).name
    same = following(tmp_path, "https://127.0.0.1:1/x.git").settings
    assert mirror(same) == mirror(settings), "another password is no other repository"


@pytest.fixture
def https(tmp_path: Path, pushes: Pushes) -> Iterator[tuple[int, list[str | None]]]:
    """A server of the repository with a certificate of its own; the credentials it got."""
    git(pushes.bare, "update-server-info")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
         "-subj", "/CN=127.0.0.1", "-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "crt")],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    seen: list[str | None] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization"))
            super().do_GET()

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(pushes.bare)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "crt", tmp_path / "key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port, seen
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes the server's certificate")
def test_password_reaches_the_server_and_no_command_line(
    tmp_path: Path,
    pushes: Pushes,
    https: tuple[int, list[str | None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever is on the machine can list command lines, and git's helpers get the address."""
    port, seen = https
    real = shutil.which("git")
    log = tmp_path / "commands"
    fake = tmp_path / "bin" / "git"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {real} "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("GIT_SSL_CAINFO", str(tmp_path / "crt"))
    monkeypatch.setenv("GIT_SSL_NO_VERIFY", "1")  # the certificate names no address
    settings = following(tmp_path, f"https://ada:{SECRET}@127.0.0.1:{port}/").settings
    assert branch.remote_head(settings) == git(pushes.clone, "rev-parse", "HEAD")
    assert set(seen) == {"Basic YWRhOmh1bnRlcjJodW50ZXIy"}
    assert "ls-remote" in log.read_text()
    assert SECRET not in log.read_text()


def test_tree_is_the_commit_and_cannot_be_changed(settings: Settings, pushes: Pushes) -> None:
    """A release's tasks and code are what was pushed, whatever git's attributes would do."""
    pushes.write(".gitattributes", "secret.py export-ignore\nline.txt text eol=crlf\n")
    pushes.write("secret.py", "x = 1\n")
    pushes.write("line.txt", "a\nb\n")
    (pushes.clone / "inside.py").symlink_to("secret.py")
    (pushes.clone / "outside").symlink_to("/etc/passwd")
    (pushes.clone / "above").symlink_to("../../other")
    commit = pushes.push()
    tree = branch.tree(settings, commit)
    assert (tree / "secret.py").read_text() == "x = 1\n"
    assert (tree / "line.txt").read_bytes() == b"a\nb\n"
    assert (tree / "inside.py").read_text() == "x = 1\n"
    assert not (tree / "outside").is_symlink()
    assert not (tree / "above").is_symlink()
    assert not (tree / ".git").exists()
    for path in (tree, tree / "secret.py", tree / "models", tree / "models" / "parrot.yaml"):
        assert path.stat().st_mode & 0o222 == 0
    assert branch.tree(settings, commit) == tree
    with pytest.raises(SpecError, match="There is no commit"):
        branch.tree(settings, "f" * 40)
    with pytest.raises(SpecError, match="There is no commit"):
        branch.tree(settings, "../../x")


def test_half_written_tree_is_never_seen(
    settings: Settings, pushes: Pushes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker killed in the midst of an export leaves nothing that counts as the commit."""
    commit = branch.fetch(settings)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            branch.tree(settings, commit)
    trees = settings.state / "git" / "trees"
    assert [path.name for path in trees.glob("[!.]*")] == []
    assert (branch.tree(settings, commit) / "models" / "raven.yaml").is_file()
    assert list(trees.glob(".partial-*")) == []


def test_current_specs_are_the_valid_ones_of_the_head(
    settings: Settings, pushes: Pushes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One team's mistake must not stop the schedule of all; and no spec is parsed twice."""
    pushes.push(
        owl=spec_of("owl").replace("owner: team:tests", "owner: nobody"),
        gull="name: [", crow=spec_of("raven"),
    )  # fmt: skip
    pushes.write("models/waivers/tern.yaml", spec_of("tern"))
    pushes.write("models/latin.yaml", b"name: \xff\n")
    pushes.write(os.fsdecode(b"models/\xff.yaml"), "x")
    (pushes.models / "link.yaml").symlink_to("parrot.yaml")
    pushes.push()
    branch.fetch(settings)
    assert set(branch.current_specs(settings)) == {"parrot", "raven"}

    def parsed_again(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(spec_files, "parse_spec", parsed_again)
    assert set(branch.current_specs(settings)) == {"parrot", "raven"}


def test_current_specs_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without git: files are read again when they change, and only then."""
    models = tmp_path.resolve() / "models"
    models.mkdir()
    settings = Settings(state=tmp_path, models=models)
    for name in ("parrot", "raven"):
        (models / f"{name}.yaml").write_text(spec_of(name))
    (models / "owl.yaml").write_text("name: owl")
    assert set(branch.current_specs(settings)) == {"parrot", "raven"}
    (models / "raven.yaml").unlink()
    (models / "owl.yaml").write_text(spec_of("owl"))
    assert set(branch.current_specs(settings)) == {"parrot", "owl"}
    read: list[Path] = []
    monkeypatch.setattr(branch, "read_spec", lambda path: read.append(path))
    assert set(branch.current_specs(settings)) == {"parrot", "owl"}
    assert read == []


def test_a_thousand_specs_are_current_in_time(tmp_path: Path, pushes: Pushes) -> None:
    """Each tick of a trigger asks for them, and must end well within 2 s."""
    for number in range(1000):
        pushes.write(f"models/m{number}.yaml", spec_of(f"m{number}"))
    pushes.push()
    settings = following(tmp_path, str(pushes.bare)).settings
    branch.fetch(settings)
    assert len(branch.current_specs(settings)) == 1002
    started = time.process_time()
    assert len(branch.current_specs(settings)) == 1002
    assert time.process_time() - started < 0.5


def test_text_nested_without_end_ends_nothing(settings: Settings, pushes: Pushes) -> None:
    """libyaml recurses in C: such a push would end the code server, not only the tick."""
    pushes.push(owl="[" * 300_000, gull="- " * 300_000)
    branch.fetch(settings)
    assert set(branch.current_specs(settings)) == {"parrot", "raven"}


def test_errors_have_a_cure(tmp_path: Path) -> None:
    """Whoever reads a failed tick at night needs to know what to do."""
    with pytest.raises(LLMOpsError) as caught:
        branch.remote_head(following(tmp_path, "/nowhere").settings)
    assert caught.value.cure
