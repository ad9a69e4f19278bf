"""Two releases that went through everything, for tests that only read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from dagster import DagsterInstance

from ..release_rig import Rig
from ..test_reporting import APPROVE, Runs, failures
from .audited import AUDITED_SPEC, record_release

FIRST, SECOND = "parrot.v1", "parrot.v2"
OTHER_PRECISION = AUDITED_SPEC.replace(
    "engine: {toolchain: onnxruntime_genai}",
    "engine: {toolchain: onnxruntime_genai, precision: fp32}",
)


@pytest.fixture(scope="session")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """The first release retired and gone, the second in production with another precision."""
    rig = Rig(tmp_path_factory.mktemp("audited") / "rig")
    with DagsterInstance.ephemeral() as instance:
        runs = Runs(rig, instance)
        for version, release in enumerate((FIRST, SECOND), start=1):
            record_release(rig, release, version, AUDITED_SPEC if version == 1 else OTHER_PRECISION)
            results = [runs.assets(release, "staging_deployment")]
            results.append(runs.job("promote", release, APPROVE))
            results += [runs.job(job, release) for job in ("observe", "scale")]
            assert all(result.success for result in results), list(map(failures, results))
        for job in ("deprecate", "archive_release", "remove", "audit"):
            result = runs.job(job, FIRST)
            assert result.success, failures(result)
    yield rig
    rig.close()
