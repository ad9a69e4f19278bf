"""What a push means for each spec: only what really changed asks for a release."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmops_assets.develop import branch, pushes, spec_files
from llmops_assets.develop.pushes import Change, What
from llmops_assets.errors import SpecError, TriggerError
from llmops_assets.policy import Floors
from llmops_assets.release import Release
from llmops_assets.settings import Settings

from ..git_rig import Pushes, following, serve, spec_of
from ..release_rig import PlatformOnDoubles, Rig


@pytest.fixture
def remote(tmp_path: Path) -> Pushes:
    remote = Pushes(tmp_path.resolve() / "git")
    remote.push(parrot=spec_of("parrot"), raven=spec_of("raven"))
    return remote


@pytest.fixture
def platform(tmp_path: Path, remote: Pushes) -> PlatformOnDoubles:
    return following(tmp_path.resolve(), str(remote.bare))


def since(platform: PlatformOnDoubles, old: str | None, new: str) -> dict[str, Change]:
    branch.fetch(platform.settings)
    push = pushes.push_between(platform.settings, old, new)
    found = pushes.changes(platform, push)
    assert [change.file for change in found] == sorted(change.file for change in found)
    return {change.model: change for change in found}


def what(changes: dict[str, Change]) -> dict[str, What]:
    return {model: change.what for model, change in changes.items()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# why\n" + spec_of("parrot"), What.UNCHANGED),
        (spec_of("parrot").replace("{threads", "{  threads"), None),
        (spec_of("parrot").replace("metrics: [exact_match]", "metrics:\n  - exact_match"),
         What.UNCHANGED),
        (spec_of("parrot") + "retention: {archive_days: 365}\n", What.UNCHANGED),
        (spec_of("parrot", accuracy="0.95"), What.CHANGED),
        (spec_of("parrot", precision="int4"), What.CHANGED),
        (spec_of("raven"), What.BROKEN),
        ("name: [", What.BROKEN),
        ("", What.BROKEN),
    ],
)  # fmt: skip
def test_only_another_spec_is_a_change(
    platform: PlatformOnDoubles, remote: Pushes, text: str, expected: What | None
) -> None:
    """A gate or a flag; not a comment, a line break, or a default written out."""
    old = branch.fetch(platform.settings)
    changes = since(platform, old, remote.push(parrot=text))
    assert what(changes) == ({} if expected is None else {"parrot": expected})


def test_mistakes_name_file_and_line(platform: PlatformOnDoubles, remote: Pushes) -> None:
    """The author sees it in the failed check, and needs no log of a sensor."""
    old = branch.fetch(platform.settings)
    remote.write("models/Bad Name.yaml", spec_of("parrot"))
    remote.write("models/sub/parrot.yaml", "no spec, as it is in a folder")
    remote.write("models/notes.txt", "no spec either")
    (remote.models / "link.yaml").symlink_to("raven.yaml")
    remote.write("models/huge.yaml", "#" * (spec_files.LARGEST_SPEC_BYTES + 1))
    changes = since(platform, old, remote.push(
        parrot=spec_of("parrot", accuracy="0.95"),
        raven=spec_of("raven").replace("owner: team:tests", "owner: nobody"),
        crow=spec_of("parrot"),
    ))  # fmt: skip
    assert {model for model, kind in what(changes).items() if kind is What.BROKEN} == {
        "Bad Name", "raven", "crow", "link", "huge"
    }  # fmt: skip
    assert changes["parrot"].what is What.CHANGED
    assert "models/raven.yaml is not a valid model spec" in changes["raven"].detail
    assert "line 3: owner" in changes["raven"].detail
    assert "line 1: name is 'parrot', but the file is named 'crow'" in changes["crow"].detail
    assert "symbolic link" in changes["link"].detail
    head = branch.fetch(platform.settings)
    assert {change.model for change in pushes.broken_specs(platform, head)} == {
        "Bad Name", "raven", "crow", "link", "huge"
    }  # fmt: skip


def test_spec_below_the_policy_is_broken(
    platform: PlatformOnDoubles, remote: Pushes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be refused in its run; the author hears of it before."""
    old = branch.fetch(platform.settings)
    floors = Floors.model_validate({"accuracy": {"exact_match": {"at_least": 0.99}}})
    policy = platform.policy.model_copy(update={"floors": floors})
    monkeypatch.setattr(PlatformOnDoubles, "policy", property(lambda _: policy))
    new = remote.push(parrot=spec_of("parrot", accuracy="0.95"))
    change = since(platform, old, new)["parrot"]
    assert change.what is What.BROKEN
    assert "models/parrot.yaml: " in change.detail
    assert "the floor is 0.99" in change.detail


def test_broken_then_mended_is_a_change(platform: PlatformOnDoubles, remote: Pushes) -> None:
    """Nobody knows what the broken one was to be."""
    old = remote.push(parrot="name: [")
    branch.fetch(platform.settings)
    assert what(since(platform, old, remote.push(parrot=spec_of("parrot")))) == {
        "parrot": What.CHANGED
    }


def test_deleted_and_renamed(platform: PlatformOnDoubles, remote: Pushes) -> None:
    """A rename is a new model, and a proposal to retire the old one; nothing is deleted."""
    prompts = ("hello", "goodbye and thanks for all the fish in the sea")
    old = remote.push(parrot=spec_of("parrot").replace(*prompts))
    branch.fetch(platform.settings)
    new = remote.push(
        "parrot", "raven", crow=spec_of("crow").replace(*prompts), wren="name: wren\n"
    )
    changes = since(platform, old, new)
    assert changes["parrot"] == Change(
        "models/parrot.yaml", "parrot", What.RENAMED, "to models/crow.yaml"
    )
    assert changes["raven"].what is What.DELETED
    assert changes["crow"] == Change(
        "models/crow.yaml", "crow", What.CHANGED, "renamed from models/parrot.yaml"
    )
    assert changes["wren"].what is What.BROKEN
    push = pushes.push_between(platform.settings, old, new)
    asked = {pushes.release_of(change, push) for change in changes.values()}
    assert asked == {None, Release.from_commit("crow", new)}


def test_history_between_does_not_matter(platform: PlatformOnDoubles, remote: Pushes) -> None:
    """Both trees are compared: a force push back is the reverse of the push."""
    first = branch.fetch(platform.settings)
    second = remote.push(parrot=spec_of("parrot", accuracy="0.95"), owl=spec_of("owl"))
    assert what(since(platform, first, second)) == {"owl": What.CHANGED, "parrot": What.CHANGED}
    remote.force(first)
    assert what(since(platform, second, first)) == {"owl": What.DELETED, "parrot": What.CHANGED}
    assert since(platform, first, first) == {}
    assert what(since(platform, None, first)) == {"parrot": What.CHANGED, "raven": What.CHANGED}


def test_no_folder_of_specs_is_no_error(platform: PlatformOnDoubles, remote: Pushes) -> None:
    """It may come with a later push, or have gone with this one."""
    old = branch.fetch(platform.settings)
    remote.write("README.md", "no models any more\n")
    new = remote.push("parrot", "raven")
    assert what(since(platform, old, new)) == {"parrot": What.DELETED, "raven": What.DELETED}
    assert since(platform, None, new) == {}


def test_only_changed_files_are_read(
    platform: PlatformOnDoubles, remote: Pushes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand specs, of which one changed, cost one."""
    old = branch.fetch(platform.settings)
    new = remote.push(raven=spec_of("raven", accuracy="0.97"))
    branch.fetch(platform.settings)
    read: list[str] = []
    real = spec_files.parse_spec

    def counted(text: str, source: str, expected_name: str | None = None) -> object:
        read.append(source)
        return real(text, source, expected_name)

    monkeypatch.setattr(spec_files, "_parsed", {})
    monkeypatch.setattr(spec_files, "parse_spec", counted)
    assert what(since(platform, old, new)) == {"raven": What.CHANGED}
    assert read == ["models/raven.yaml"] * 2


@pytest.fixture
def rig(tmp_path: Path, remote: Pushes) -> Rig:
    """A platform that follows the branch and can deploy."""
    rig = Rig(tmp_path.resolve() / "rig")
    settings = rig.platform.settings.model_copy(update={"git_repository": str(remote.bare)})
    rig.platform = PlatformOnDoubles(settings)
    return rig


def test_where_the_old_commit_is_gone_releases_say_what_was(rig: Rig, remote: Pushes) -> None:
    """A deleted state folder and a rewritten branch together: still only what changed."""
    rig.freeze("parrot.m20260101t000000", spec_of("parrot"))
    rig.freeze("raven.m20260101t000000", spec_of("raven"))
    # Whose weights are not the spec's.
    rig.freeze("raven.v1", spec_of("raven", accuracy="0.99"))
    new = remote.push(parrot=spec_of("parrot", accuracy="0.95"), owl=spec_of("owl"))
    branch.fetch(rig.platform.settings)
    push = pushes.push_between(rig.platform.settings, "f" * 40, new)
    assert push.since_releases
    assert {c.model: c.what for c in pushes.changes(rig.platform, push)} == {
        "owl": What.CHANGED, "parrot": What.CHANGED, "raven": What.UNCHANGED
    }  # fmt: skip


def test_retirement_is_proposed_of_what_serves(rig: Rig, remote: Pushes) -> None:
    """Whoever deleted the spec is told what to decide; the release goes on serving."""
    old = branch.fetch(rig.platform.settings)
    assert pushes.serving_without_spec(rig.platform, old) == {}
    rig.freeze("parrot.v1", spec_of("parrot"))
    serve(rig.platform, "parrot", "parrot.v1")
    rig.freeze("raven.v1", spec_of("raven"))
    new = remote.push("parrot", "raven")
    branch.fetch(rig.platform.settings)
    push = pushes.push_between(rig.platform.settings, old, new)
    proposals = {c.model: pushes.proposal(rig.platform, c) for c in pushes.changes(
        rig.platform, push)}  # fmt: skip
    assert "`llmops deprecate parrot.v1`" in proposals["parrot"]
    assert "it serves in production" in proposals["parrot"]
    assert "`llmops deprecate raven.v1`" in proposals["raven"]
    assert "none serves" in proposals["raven"]
    assert pushes.serving_without_spec(rig.platform, new) == {"parrot": "parrot.v1"}
    rig.close()


def test_pushed_names_the_commit_or_says_why_not(
    tmp_path: Path, platform: PlatformOnDoubles, remote: Pushes
) -> None:
    """The job can be launched by hand, with a commit or without."""
    settings = platform.settings
    head = branch.fetch(settings)
    assert pushes.pushed(settings, None, None).commit == head
    assert pushes.pushed(settings, head[:12], None).commit == head
    with pytest.raises(SpecError, match="There is no commit"):
        pushes.pushed(settings, "f" * 40, None)
    with pytest.raises(TriggerError, match="LLMOPS_GIT_REPOSITORY"):
        pushes.pushed(Settings(state=tmp_path, models=tmp_path), None, None)
