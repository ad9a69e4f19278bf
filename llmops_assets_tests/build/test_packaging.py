"""The package's gate: what leaves Build is whole and is what was judged."""

from __future__ import annotations

import pytest

from llmops_assets.build.packaging import judge_package, tree_of
from llmops_assets.evidence.verdicts import Judgement
from llmops_assets.spec import parse_spec

from ..release_rig import MODEL, SPEC, Rig

CONFIG = f'name: "{MODEL}"\nbackend: "python"\nmax_batch_size: 0\n'
FOLDER = f"repository/{MODEL}/version"
PACKAGE: dict[str, str | bytes] = {
    "package.json": "{}",
    f"repository/{MODEL}/config.pbtxt": CONFIG,
    f"{FOLDER}/model.onnx": "engine bytes",
    f"{FOLDER}/tokenizer.json": "tokenizer",
}


def judge(rig: Rig, files: dict[str, str | bytes]) -> Judgement:
    rig.publish("parrot.v1", "engine", {"model.onnx": "engine bytes", "engine.json": "{}"})
    rig.publish("parrot.v1", "checkpoint", {"tokenizer.json": "tokenizer", "model": "weights"})
    rig.publish("parrot.v1", "packaged_model", files)
    return judge_package(parse_spec(SPEC, "test"), rig.platform.column("parrot.v1"))


def without(*names: str) -> dict[str, str | bytes]:
    return {name: content for name, content in PACKAGE.items() if name not in names}


def test_whole_package_passes(rig: Rig) -> None:
    """The sidecar and the weights of the checkpoint stay behind on purpose."""
    judgement = judge(rig, PACKAGE)
    assert judgement.passed, judgement.reason


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (without(f"{FOLDER}/model.onnx"), "model.onnx of the engine is not in the package"),
        ({**PACKAGE, f"{FOLDER}/model.onnx": "other"}, "model.onnx of the engine is not"),
        (without(f"{FOLDER}/tokenizer.json"), "tokenizer.json of the checkpoint is not"),
        (without(f"repository/{MODEL}/config.pbtxt"), "config.pbtxt of parrot cannot be read"),
        ({**PACKAGE, f"repository/{MODEL}/config.pbtxt": "name: {"}, "cannot be read"),
        ({**PACKAGE, f"repository/{MODEL}/config.pbtxt": "no_such_field: 1"}, "cannot be read"),
        ({**PACKAGE, f"repository/{MODEL}/config.pbtxt": b"\xff\xfe"}, "cannot be read"),
        ({**PACKAGE, f"repository/{MODEL}/config.pbtxt": 'name: "other"'}, "names the model other"),
        (without("package.json"), "does not say how to serve and ask the package"),
        ({**PACKAGE, "package.json": '{"asked": {"promt": "x"}}'}, "does not say how to serve"),
        (
            {"package.json": "{}", "repository/other/config.pbtxt": 'name: "other"'},
            "there is no model parrot",
        ),
        ({"package.json": "{}", "model.onnx": "engine bytes"}, "no folder repository/"),
    ],
)
def test_broken_package_fails(rig: Rig, files: dict[str, str | bytes], problem: str) -> None:
    """Triton would find each of these only in front of an empty slot."""
    judgement = judge(rig, files)
    assert not judgement.passed
    assert problem in judgement.reason
    assert judgement.measured["problems"]


def test_tree_shows_every_file_with_its_size(rig: Rig) -> None:
    """It is what people see of a package in the UI."""
    result = rig.publish("parrot.v1", "packaged_model", PACKAGE)
    lines = tree_of(rig.platform.store.describe(result.artifact)).splitlines()
    assert [line.split() for line in lines] == [
        [str(len(content)), name] for name, content in sorted(PACKAGE.items())
    ]
