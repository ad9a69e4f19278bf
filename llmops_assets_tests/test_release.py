"""Release keys: file names, Kubernetes labels and partition keys at once."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmops_assets.errors import ReleaseError
from llmops_assets.release import MODEL_NAME, ORIGIN, Release
from llmops_assets.storage.store import REF_NAME

# https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/
LABEL_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")

models = st.from_regex(MODEL_NAME, fullmatch=True)
origins = st.from_regex(ORIGIN, fullmatch=True)


@given(models, origins)
def test_every_valid_key_is_label_file_name_and_ref(model: str, origin: str) -> None:
    """The key is used in all of these without escaping, so no valid one may need it."""
    key = Release(model, origin).key
    assert LABEL_VALUE.fullmatch(key)
    assert REF_NAME.fullmatch(key)
    assert re.fullmatch(r"[a-z0-9.-]+", key)
    assert not key.startswith((".", "-"))
    assert ".." not in key


@given(models, origins)
def test_keys_round_trip(model: str, origin: str) -> None:
    """A key read from a partition must name the release it was made of."""
    release = Release(model, origin)
    assert Release.parse(release.key) == release
    assert str(release) == release.key


@given(st.text(max_size=70))
def test_parse_accepts_only_what_it_would_write(key: str) -> None:
    """Dagster takes any string as a partition key; this is the one place that checks."""
    try:
        release = Release.parse(key)
    except ReleaseError as error:
        assert error.cure
    else:
        assert release.key == key


@pytest.mark.parametrize(
    "key",
    [
        "", ".", "m", "m.", ".v1", "m.v", "m.x1", "m.v1\n", "m.v1 ", "m.v1.v2", "M.v1", "-m.v1",
        "m-.v1", "a/b.v1", "../m.v1", "m.g12345", "m.gABCDEF012345", "m.s2026", "m.m20260131",
        "m.v1234567890", "m" * 41 + ".v1", "m_1.v1", "m.v\u0661",
    ],
)  # fmt: skip
def test_malformed_keys_are_refused(key: str) -> None:
    """Among them paths, line ends and digits of other scripts."""
    with pytest.raises(ReleaseError, match="To do: "):
        Release.parse(key)


def test_constructors_give_the_documented_forms() -> None:
    """The form tells people, and the audit, how a release came about."""
    at = datetime(2026, 1, 31, 23, 30, tzinfo=timezone(-timedelta(hours=2)))
    assert Release.by_hand("m", at).key == "m.m20260201t013000"
    assert Release.by_hand("m", datetime(2026, 1, 31, tzinfo=UTC)).key == "m.m20260131t000000"
    assert Release.from_commit("m", "0123456789abcdef" * 2).key == "m.g0123456789ab"
    with pytest.raises(ReleaseError):
        Release.from_commit("m", "main")


def test_same_event_gives_the_same_release() -> None:
    """A trigger that fires twice must not start a second release."""
    commit = "f" * 40
    assert Release.from_commit("m", commit) == Release.from_commit("m", commit)
    assert len({Release.from_commit("m", commit), Release.from_commit("m", commit)}) == 1
