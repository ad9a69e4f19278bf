"""Releases after the first: under traffic, at the price of what changed, until they retire."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import pytest
from dagster import DagsterEventType

from llmops_assets.retire.archive import ArchiveFile, restore
from llmops_assets.serving.slots import Colour, Environment
from llmops_assets.storage.folder import FolderStore
from llmops_assets_tests.lifecycle.conftest import FirstRelease
from llmops_assets_tests.lifecycle.kills import runs_module
from llmops_assets_tests.lifecycle.stack_user import MODEL, StackUser
from llmops_assets_tests.lifecycle.traffic import Traffic, percentile, problems, slowest

TRAINER = "llmops_assets.develop.train"
BUILDER = "llmops_assets.toolchains.onnxruntime_genai.build"
CLIENTS = 3
PAUSE_SECONDS = 0.05
STEADY_SECONDS = 20.0
LARGEST_FACTOR = 5.0


@dataclass(frozen=True)
class Replacement:
    """A release that took the place of another."""

    former: str
    former_colour: Colour
    key: str
    colour: Colour


@pytest.fixture(scope="module")
def second_release(user: StackUser, first_release: FirstRelease) -> Replacement:
    """A release of the same spec, promoted under traffic."""
    former = user.serving()
    key = user.release()
    known = {q["prompt"]: q["answer"] for q in user.spec["serving"]["known_answers"]}
    with Traffic(user.gateway_url, MODEL, known, CLIENTS, PAUSE_SECONDS) as traffic:
        time.sleep(STEADY_SECONDS)
        run = user.promote(key)
    start, end = _moments_of(user, run)
    steady = [r for r in traffic.between(0, start) if r.began + r.seconds < start]
